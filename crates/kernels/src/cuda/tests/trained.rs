//! Whole layers of candle's tensors that train, against the plain reference.

use super::reference::{Layer, Matrices, Number, cut, random, seeded, values};
use super::tensors::device;
use super::whole::Parts;
use super::{SHAPES, SOFTMAX, distance, keeping, shape};
use crate::TrainedLayer;
use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, f16};

/// What trains in a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trains {
    /// Adapters and bases, as in LightMoE.
    Adapters,
    /// All there is.
    All,
    /// What comes before the layer.
    Nothing,
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let wide = tensor.to_dtype(DType::F64).unwrap();
    wide.flatten_all().unwrap().to_vec1().unwrap()
}

/// Makes variables of f32 of three stacks.
fn variables(of: &mut [Tensor; 3]) -> [Var; 3] {
    of.each_mut().map(|stack| {
        let var = Var::from_tensor(&stack.to_dtype(DType::F32).unwrap()).unwrap();
        *stack = var.as_tensor().clone();
        var
    })
}

/// Slot by slot, those from `first` on, `ranks` components of each as rows.
fn components(
    of: &Matrices,
    s: (usize, usize),
    first: usize,
    ranks: &[usize],
    turned: bool,
) -> [Vec<f64>; 3] {
    let (slots, rank) = s;
    of.each().map(|stack| {
        let size = stack.len() / slots;
        let width = size / rank;
        let mut all = Vec::new();
        for (slot, &own) in ranks.iter().enumerate() {
            let of_slot = &stack[(first + slot) * size..][..size];
            for component in 0..own {
                all.extend((0..width).map(|i| match turned {
                    true => of_slot[i * rank + component],
                    false => of_slot[component * width + i],
                }));
            }
        }
        all
    })
}

/// Slot by slot, those before `kept`, the first `own` components as columns.
fn columns(of: &Matrices, s: (usize, usize), kept: usize, own: usize) -> [Vec<f64>; 3] {
    let (slots, rank) = s;
    of.each().map(|stack| {
        let size = stack.len() / slots;
        let rows = stack[..kept * size].chunks(rank);
        rows.flat_map(|row| row[..own].to_vec()).collect()
    })
}

fn check<T: Number>(
    device: &Device,
    mut layer: Layer,
    ranks: &[usize],
    trains: Trains,
    tokens: usize,
) {
    let dtype = match T::KIND {
        crate::cuda::ElementKind::Bf16 => DType::BF16,
        crate::cuda::ElementKind::F16 => DType::F16,
    };
    let s = layer.shape;
    let ranks = match s.adapted {
        0 => Vec::new(),
        _ => cut(&mut layer, ranks),
    };
    let what = format!(
        "{dtype:?}, {trains:?}, {tokens} tokens of {s:?}, ranks {ranks:?}, share {}",
        layer.beta
    );
    let mut parts = Parts::new(&layer, device, dtype, &ranks);
    // As in models, where it does not train.
    parts.router = parts.router.to_dtype(dtype).unwrap();
    let (kept, replaced) = ranks.split_at(s.kept);
    let own_rank = kept.first().copied().unwrap_or(0);
    let has_adapters = replaced.iter().any(|&rank| rank > 0);
    let trained = trains != Trains::Nothing;
    let dense = (trains == Trains::All && s.dense > 0).then(|| variables(&mut parts.dense));
    let bases = (trained && s.groups > 0).then(|| variables(&mut parts.bases));
    let of_kept = (trained && s.kept > 0).then(|| parts.kept.each_mut().map(variables));
    let of_slots = (trained && has_adapters).then(|| parts.adapters.each_mut().map(variables));
    let on_gpu = TrainedLayer::new(&parts.parts()).unwrap();
    let on_gpu = on_gpu.unwrap_or_else(|| panic!("{what}: not taken"));

    let mut rng = seeded(tokens as u64);
    let [x, dout] = [1, 1].map(|inputs| values(&random::<T>(&mut rng, tokens * s.hidden, inputs)));
    let put = |numbers: &[f64], shape: (usize, usize), dtype| {
        let on_host = Tensor::from_vec(numbers.to_vec(), shape, &Device::Cpu).unwrap();
        let narrow = on_host.to_dtype(DType::F32).unwrap();
        narrow.to_device(device).unwrap().to_dtype(dtype).unwrap()
    };
    let logits: Vec<f64> = x.chunks(s.hidden).flat_map(|x| layer.logits(x)).collect();
    let choices: Vec<_> = logits.chunks(s.experts).map(|l| layer.choose(l)).collect();
    let chosen = on_gpu
        .choose(&put(&logits, (tokens, s.experts), DType::F32))
        .unwrap();
    let positions: Vec<u32> = choices.iter().flatten().map(|&(p, _)| p as u32).collect();
    assert_eq!(
        chosen.flatten_all().unwrap().to_vec1::<u32>().unwrap(),
        positions,
        "{what}"
    );
    let gates: Vec<f64> = choices.iter().flatten().map(|&(_, g)| g).collect();
    let gates = put(&gates, (1, gates.len()), DType::F32)
        .flatten_all()
        .unwrap();
    let gates = Var::from_tensor(&gates).unwrap();
    let of_x = Var::from_tensor(&put(&x, (tokens, s.hidden), dtype)).unwrap();
    let run = || {
        let y = on_gpu.forward(&of_x, &gates, &chosen).unwrap();
        let loss = (&y * put(&dout, (tokens, s.hidden), dtype))
            .unwrap()
            .sum_all()
            .unwrap();
        (numbers(&y), loss.backward().unwrap())
    };
    let (y, grads) = run();
    let far = distance(&y, &layer.forward(&x, &choices));
    assert!(far < 1e-2, "{what}: outputs are off by {far:.1e}");
    let host = layer.backward(&x, &choices, &dout);
    let near = |name: &str, var: &Var, expected: &[f64]| {
        let given = grads.get(var).map(numbers);
        if expected.iter().all(|&v| v == 0.0) {
            assert!(
                given.is_none_or(|given| given.iter().all(|&v| v == 0.0)),
                "{what}: {name}"
            );
            return;
        }
        let far = distance(&given.unwrap(), expected);
        assert!(far < 1e-2, "{what}: {name} are off by {far:.1e}");
    };
    near("inputs", &of_x, &host.x);
    near("gates", &gates, &host.gates);
    let three = |name: &str, vars: &[Var; 3], expected: [&Vec<f64>; 3]| {
        for (var, expected) in vars.iter().zip(expected) {
            near(name, var, expected);
        }
    };
    if let Some(vars) = &dense {
        three("dense experts", vars, host.dense.each());
    }
    if let Some(vars) = &bases {
        three("bases", vars, host.bases.each());
    }
    let sizes = (s.adapted, s.rank);
    if let Some([a, b]) = &of_kept {
        let ranks = vec![own_rank; s.kept];
        three(
            "V of kept experts",
            a,
            components(&host.a, sizes, 0, &ranks, false).each_ref(),
        );
        three(
            "U of kept experts",
            b,
            columns(&host.b, sizes, s.kept, own_rank).each_ref(),
        );
    }
    if let Some([a, b]) = &of_slots {
        three(
            "V of slots",
            a,
            components(&host.a, sizes, s.kept, replaced, false).each_ref(),
        );
        three(
            "U of slots",
            b,
            components(&host.b, sizes, s.kept, replaced, true).each_ref(),
        );
    }
    let (again, more) = run();
    assert!(y == again, "{what}: two runs differ");
    let dx = |grads: &candle_core::backprop::GradStore| numbers(grads.get(&of_x).unwrap());
    assert!(dx(&grads) == dx(&more), "{what}: two runs back differ");
    let dy = put(&dout, (tokens, s.hidden), dtype);
    let pulled = on_gpu.pull(&of_x, &gates, &chosen, &dy).unwrap();
    let pulled = pulled.backward().unwrap();
    assert!(dx(&grads) == dx(&pulled), "{what}: gradients alone differ");
}

#[test]
fn quick_layers_of_tensors_train() {
    let Some(device) = device() else { return };
    let all = SHAPES.iter().enumerate();
    // Experts are all adapted while they train, or none.
    let fit =
        all.filter(|(_, (shape, _))| shape.hidden < 300 && (shape.kept == 0 || shape.dense == 0));
    for (i, &(shape, without)) in fit {
        let layer = |seed, beta| {
            let mut layer = Layer::random::<bf16>(seed, shape, without, SOFTMAX, false);
            layer.beta = beta;
            layer
        };
        let seed = i as u64;
        let full = [shape.rank.max(1)];
        check::<bf16>(&device, layer(seed, 0.0), &full, Trains::Adapters, 40);
        check::<bf16>(&device, layer(10 + seed, 0.3), &full, Trains::All, 7);
        check::<bf16>(&device, layer(20 + seed, 1.0), &full, Trains::Nothing, 33);
    }
}

/// Kept experts have adapters of another rank than slots, whose own differ.
#[test]
fn quick_layers_of_mixed_ranks_train() {
    let Some(device) = device() else { return };
    let shape = keeping(4, shape(64, 72, 9, 3, [0, 9], 2, 16));
    let layer = || Layer::random::<bf16>(5, shape, 1, SOFTMAX, false);
    for ranks in [
        [8, 8, 8, 8, 16, 3, 0, 5, 9],
        [16, 16, 16, 16, 4, 4, 8, 4, 4],
        [3, 3, 3, 3, 8, 8, 8, 8, 8],
    ] {
        check::<bf16>(&device, layer(), &ranks, Trains::Adapters, 50);
    }
}

#[test]
fn layers_of_tensors_train_in_f16() {
    let Some(device) = device() else { return };
    let (shape, without) = SHAPES[1];
    let layer = Layer::random::<f16>(1, shape, without, SOFTMAX, false);
    check::<f16>(&device, layer, &[24, 7], Trains::Adapters, 64);
}
