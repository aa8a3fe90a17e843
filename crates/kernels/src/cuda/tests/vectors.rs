//! What positions give beside what they compute.

use super::super::grouped::Path;
use super::reference::{random, seeded, values};
use super::{SHAPES, SOFTMAX, Way, gpu, layer, run};
use half::bf16;

/// Vectors that some positions give are added, once for each choice, whichever way the layer runs.
#[test]
fn quick_vectors_are_added() {
    let Some(gpu) = gpu() else { return };
    for &(shape, without) in SHAPES.iter().filter(|(shape, _)| shape.hidden < 300) {
        let mut layer = layer::<bf16>(21, shape, without, SOFTMAX);
        let count = shape.positions().div_ceil(2);
        let vectors: Vec<bf16> = random(&mut seeded(22), count * shape.hidden, 1);
        // Some positions have the same one, others none.
        let of: Vec<_> = (0..shape.positions())
            .map(|p| (p % 3 > 0).then_some(p / 2))
            .collect();
        let block = layer.upload::<bf16>(&gpu);
        let block = block
            .with_vectors(&gpu, gpu.upload(&vectors).unwrap().into(), &of)
            .unwrap();
        layer.vectors = Some((values(&vectors), of));
        for (tokens, way) in [
            (1, Way::Decode),
            (9, Way::Decode),
            (70, Way::Grouped(Path::Mma)),
        ] {
            run(&gpu, &layer, &block, tokens, way, tokens as u64);
        }
    }
    let (shape, without) = SHAPES[0];
    let block = layer::<bf16>(1, shape, without, SOFTMAX).upload::<bf16>(&gpu);
    let vectors = gpu.upload(&vec![bf16::ONE; 2 * shape.hidden]).unwrap();
    let mut of = vec![Some(0); shape.positions()];
    of[1] = Some(2);
    let refused = block.with_vectors(&gpu, vectors.into(), &of).unwrap_err();
    assert!(refused.to_string().contains("vectors"), "{refused}");
}
