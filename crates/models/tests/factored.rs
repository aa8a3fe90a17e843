//! Factored bases from their whole matrices, through training, and back; and what is multiplied out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use lightmoe_models::{
    Bank, Checkpoint, CheckpointWriter, Decoder, Family, Format, LayerLayout, Placement,
    Projections, Scheme, largest_rows, multiplied_out,
};
use serde_json::json;
use support::{
    Folder, Random, assert_close, bank_of, config, config_with, factored_layers, logits, mixed,
    values,
};

const F32: f64 = 1e-5;

/// Random whole bases for a bank.
fn whole_bases(bank: &Bank, random: &mut Random) -> Projections {
    let n = bank.base_count();
    Projections {
        gate: random.tensor(&[n, 12, 16], 0.0, 0.5),
        up: random.tensor(&[n, 12, 16], 0.0, 0.5),
        down: random.tensor(&[n, 16, 12], 0.0, 0.5),
    }
}

/// A factored bank begins its training as the bank of the whole bases, and ends it as the bank of what
/// is left of them.
#[test]
fn factored_bases_are_whole_while_they_train() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.of_layers(&original, factored_layers());
    let (ids, mut random) = (Random::new(2).ids(12), Random::new(7));
    let mut model = Decoder::load(&compressed).unwrap();
    let mut expected = model.clone();
    for (bank, whole) in model.banks_mut().zip(expected.banks_mut()) {
        let bases = whole_bases(bank, &mut random);
        bank.unfold_bases(&bases).unwrap();
        (whole.factored, whole.bases) = (None, Some(bases));
    }
    assert_close(&logits(&model, &ids, 1), &logits(&expected, &ids, 1), F32);
    let message = model.tensors().unwrap_err().to_string();
    assert!(message.contains("finish the recovery"), "{message}");
    let mut early = model.clone();
    let message = bank_of(&mut early, 0).fold_bases().unwrap_err().to_string();
    assert!(message.contains("than the 2 that stay"), "{message}");
    let layers = factored_layers();
    for (bank, layer) in model.banks_mut().zip(&layers) {
        let shape = layer.factored.unwrap();
        for (p, stack) in bank.bases.as_mut().unwrap().named_mut() {
            let each = (0..stack.dim(0).unwrap()).map(|base| {
                let s = stack.get(base).unwrap();
                let (places, rows) = largest_rows(&s, shape.rows(p)).unwrap();
                let places = Tensor::new(places, &Device::Cpu).unwrap();
                let zeros = s.zeros_like().unwrap();
                zeros.index_add(&places, &rows, 0).unwrap()
            });
            *stack = Tensor::stack(&each.collect::<Vec<_>>(), 0).unwrap();
        }
    }
    let trained = logits(&model, &ids, 1);
    model
        .banks_mut()
        .for_each(|bank| bank.fold_bases().unwrap());
    let folded = logits(&model, &ids, 1);
    assert_close(&folded, &trained, F32);
    let path = folder.write(
        "folded",
        &model.tensors().unwrap(),
        &compressed.config().raw,
    );
    let written = Decoder::load(&Checkpoint::open(&path).unwrap()).unwrap();
    assert_eq!(values(&logits(&written, &ids, 1)), values(&folded));
}

/// Places above 256 are no numbers of bf16: one that moved must not be taken for one that was rounded.
#[test]
fn places_that_moved_are_written_as_they_are() {
    let folder = Folder::new();
    let original = folder.original(&config_with(json!({"intermediate_size": 600})));
    let compressed = folder.of_layers(&original, factored_layers());
    let placement = Placement {
        dtype: DType::BF16,
        ..Placement::default()
    };
    let start = compressed.on(&placement);
    let mut model = Decoder::load(&start).unwrap();
    let mut moved = Vec::new();
    for bank in model.banks_mut() {
        let places = &mut bank.factored.as_mut().unwrap().places.gate;
        // Each to what its place would be rounded to, or one on.
        let each = places.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let each = each
            .iter()
            .map(|&p| match bf16::from_f32(p as f32).to_f32() as u32 {
                rounded if rounded != p && rounded < 600 => rounded,
                _ => p,
            });
        let each: Vec<u32> = each.collect();
        *places = Tensor::from_vec(each.clone(), places.dims(), &Device::Cpu).unwrap();
        moved.push(each);
    }
    let (config, path) = (compressed.config(), folder.path("moved"));
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let layout = compressed.layout();
    let writer = CheckpointWriter::for_model(&path, &format, config, layout).unwrap();
    model.write_over(&writer, &start).unwrap();
    writer.finish(&config.raw).unwrap();
    let mut written = Decoder::load(&Checkpoint::open(&path).unwrap()).unwrap();
    for (bank, expected) in written.banks_mut().zip(moved) {
        let places = &bank.factored.as_ref().unwrap().places.gate;
        let places = places.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(places, expected);
    }
}

#[test]
fn the_largest_rows_stay_in_their_order() {
    let s = [[1f32, 0.0], [0.0, -3.0], [2.0, 2.0], [0.0, 3.0], [0.0, 0.0]];
    let s = Tensor::new(&s, &Device::Cpu).unwrap();
    let rows = |count| largest_rows(&s, count).unwrap();
    assert_eq!(rows(1).0, [1]);
    assert_eq!(rows(2).0, [1, 3]);
    assert_eq!(rows(4).0, [0, 1, 2, 3]);
    assert_eq!(values(&rows(2).1), [0.0, -3.0, 0.0, 3.0]);
    assert!(largest_rows(&s, 6).is_err());
}

/// A model whose experts hold the matrices multiplied out computes the same.
#[track_caller]
fn check_multiplied_out(layer: LayerLayout) {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.of_layers(&original, [layer.clone(), layer]);
    let mut expected = Decoder::load(&original).unwrap();
    for (l, bank) in expected.banks_mut().enumerate() {
        let dense = bank.dense.as_mut().unwrap();
        for (p, stack) in dense.named_mut() {
            let shape = [stack.dims()[1], stack.dims()[2]];
            let each = (0..8).map(|e| multiplied_out(&compressed, (l, e), p, shape).unwrap());
            *stack = Tensor::stack(&each.collect::<Vec<_>>(), 0).unwrap();
        }
    }
    let (model, ids) = (Decoder::load(&compressed).unwrap(), Random::new(2).ids(12));
    assert_close(&logits(&model, &ids, 1), &logits(&expected, &ids, 1), F32);
}

#[test]
fn mixtures_and_factored_bases_multiply_out() {
    check_multiplied_out(LayerLayout::from(vec![mixed(3, 4); 8]));
    let [factored, _] = factored_layers();
    check_multiplied_out(factored);
}
