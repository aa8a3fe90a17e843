//! Whole layers of candle's tensors on a GPU against the plain reference.

use super::super::block::Shape;
use super::reference::{Layer, Matrices, Number, cut, random, seeded, values};
use super::tensors::device;
use super::{LIMITED, SHAPES, SOFTMAX, distance, shape};
use crate::{AdapterParts, LayerParts, WholeLayer};
use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, f16};

/// A layer as tensors.
pub(super) struct Parts<'a> {
    layer: &'a Layer,
    pub(super) router: Tensor,
    correction: Option<Tensor>,
    /// Of the dense positions, or of those that keep their expert beside an adapter.
    pub(super) dense: [Tensor; 3],
    pub(super) bases: [Tensor; 3],
    /// `V` and `U` of the kept experts.
    pub(super) kept: [[Tensor; 3]; 2],
    /// `V` and `Uᵀ` of the other adapted positions.
    pub(super) adapters: [[Tensor; 3]; 2],
    starts: Vec<usize>,
    vectors: Option<Tensor>,
    originals: Option<[Tensor; 3]>,
}

impl<'a> Parts<'a> {
    /// Of slots of these ranks, all those that keep their expert alike.
    pub(super) fn new(layer: &'a Layer, device: &Device, dtype: DType, ranks: &[usize]) -> Self {
        let s = layer.shape;
        let (of_kept, ranks) = ranks.split_at(s.kept);
        let tensor = |numbers: &[f64], shape: &[usize]| {
            let on_host = Tensor::from_vec(numbers.to_vec(), shape, &Device::Cpu).unwrap();
            on_host.to_dtype(DType::F32).unwrap()
        };
        // What is empty cannot be copied to a GPU.
        let put = |t: Tensor| match t.elem_count() {
            0 => Tensor::zeros(t.shape(), dtype, device).unwrap(),
            _ => t.to_device(device).unwrap().to_dtype(dtype).unwrap(),
        };
        let stacks = |of: &Matrices, n: usize, gate: [usize; 2], down: [usize; 2]| {
            let shapes = [gate, gate, down].map(|[rows, columns]| [n, rows, columns]);
            let all = of.each();
            std::array::from_fn(|i| put(tensor(all[i], &shapes[i])))
        };
        let mut starts = vec![0];
        ranks
            .iter()
            .for_each(|rank| starts.push(starts[starts.len() - 1] + rank));
        // Components one behind the other, as many of a slot as it has.
        let components = |of: &Matrices, widths: [usize; 3], turned: bool| {
            let all = of.each();
            std::array::from_fn(|i| {
                let shape = match turned {
                    true => [s.adapted, widths[i], s.rank],
                    false => [s.adapted, s.rank, widths[i]],
                };
                let stack = tensor(all[i], &shape);
                let stack = if turned {
                    stack.transpose(1, 2).unwrap()
                } else {
                    stack
                };
                let slots = ranks.iter().enumerate().map(|(slot, rank)| {
                    let of_slot = stack.get(s.kept + slot).unwrap();
                    of_slot.narrow(0, 0, *rank).unwrap()
                });
                let slots: Vec<Tensor> = slots.collect();
                match slots.is_empty() {
                    true => put(Tensor::zeros((0, widths[i]), DType::F32, &Device::Cpu).unwrap()),
                    false => put(Tensor::cat(&slots, 0).unwrap()),
                }
            })
        };
        let [h, f] = [s.hidden, s.inner];
        let own = |of: &Matrices, widths: [usize; 3], turned: bool| {
            let (all, rank) = (of.each(), of_kept.first().copied().unwrap_or(0));
            std::array::from_fn(|i| {
                let (shape, ranks) = match turned {
                    true => ([s.adapted, widths[i], s.rank], 2),
                    false => ([s.adapted, s.rank, widths[i]], 1),
                };
                let own = tensor(all[i], &shape).narrow(0, 0, s.kept).unwrap();
                put(own.narrow(ranks, 0, rank).unwrap().contiguous().unwrap())
            })
        };
        let originals = stacks(&layer.originals, s.adapted, [f, h], [h, f]);
        let part = |first: usize, count: usize| {
            originals
                .each_ref()
                .map(|w| w.narrow(0, first, count).unwrap())
        };
        let correction = layer.bias.as_ref();
        Self {
            layer,
            router: tensor(&layer.router, &[s.experts, h])
                .to_device(device)
                .unwrap(),
            correction: correction.map(|bias| Tensor::new(&bias[..], device).unwrap()),
            dense: match s.kept {
                0 => stacks(&layer.dense, s.dense, [f, h], [h, f]),
                kept => part(0, kept),
            },
            bases: stacks(&layer.bases, s.groups, [f, h], [h, f]),
            kept: [
                own(&layer.a, [h, h, f], false),
                own(&layer.b, [f, f, h], true),
            ],
            adapters: [
                components(&layer.a, [h, h, f], false),
                components(&layer.b, [f, f, h], true),
            ],
            starts,
            vectors: layer
                .vectors
                .as_ref()
                .map(|(all, _)| put(tensor(all, &[all.len() / h, h]))),
            originals: (layer.beta > 0.0 && s.adapted > s.kept)
                .then(|| part(s.kept, s.adapted - s.kept)),
        }
    }

    pub(super) fn parts(&self) -> LayerParts<'_> {
        let s = self.layer.shape;
        LayerParts {
            router: &self.router,
            correction: self.correction.as_ref(),
            choice: self.layer.choice,
            top_k: s.top_k,
            position: &self.layer.position,
            dense: (s.dense + s.kept > 0).then(|| self.dense.each_ref()),
            bases: (s.groups > 0).then(|| self.bases.each_ref()),
            groups: &self.layer.group_of[s.kept..],
            adapters: (self.starts.last() != Some(&0)).then(|| AdapterParts {
                a: self.adapters[0].each_ref(),
                b: self.adapters[1].each_ref(),
                starts: &self.starts,
            }),
            vectors: self
                .vectors
                .as_ref()
                .zip(self.layer.vectors.as_ref())
                .map(|(all, (_, of))| (all, &of[..])),
            kept: (s.kept > 0).then(|| self.kept.each_ref().map(|of| of.each_ref())),
            originals: self.originals.as_ref().map(|of| of.each_ref()),
            beta: self.originals.as_ref().map_or(0.0, |_| self.layer.beta),
        }
    }
}

/// Runs a layer whose slots have these ranks, in turn, and holds each token against the reference.
fn check<T: Number>(device: &Device, mut layer: Layer, ranks: &[usize], tokens: &[usize]) {
    let dtype = match T::KIND {
        crate::cuda::ElementKind::Bf16 => DType::BF16,
        crate::cuda::ElementKind::F16 => DType::F16,
    };
    let ranks = cut(&mut layer, ranks);
    let parts = Parts::new(&layer, device, dtype, &ranks);
    let whole = WholeLayer::new(&parts.parts()).unwrap();
    let whole = whole.unwrap_or_else(|| panic!("{:?} is not taken", layer.shape));
    let hidden = layer.shape.hidden;
    for &tokens in tokens {
        let mut rng = seeded(tokens as u64);
        let x = values(&random::<T>(&mut rng, tokens * hidden, 1));
        let on_gpu = Tensor::from_vec(x.clone(), (tokens, hidden), &Device::Cpu).unwrap();
        let on_gpu = on_gpu
            .to_dtype(DType::F32)
            .unwrap()
            .to_device(device)
            .unwrap();
        let on_gpu = on_gpu.to_dtype(dtype).unwrap();
        let run = || {
            let y = whole
                .forward(&on_gpu)
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap();
            y.flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        let given = run();
        let choices: Vec<_> = x
            .chunks(hidden)
            .map(|x| layer.choose(&layer.logits(x)))
            .collect();
        let expected = layer.forward(&x, &choices);
        for (t, (given, expected)) in given
            .chunks(hidden)
            .zip(expected.chunks(hidden))
            .enumerate()
        {
            let distance = distance(given, expected);
            assert!(
                distance < 1e-2,
                "{dtype:?}, {tokens} tokens of {:?}: token {t} is off by {distance:.1e}",
                layer.shape
            );
        }
        assert!(given == run(), "two runs differ");
    }
}

#[test]
fn quick_whole_layers_of_tensors() {
    let Some(device) = device() else { return };
    let plain = SHAPES.iter().filter(|(shape, _)| shape.kept == 0);
    for (i, &(shape, without)) in plain.enumerate() {
        let layer = |seed| Layer::random::<bf16>(seed, shape, without, SOFTMAX, false);
        check::<bf16>(
            &device,
            layer(i as u64),
            &[shape.rank.max(1)],
            &[1, 5, 40, 33],
        );
        check::<bf16>(&device, layer(50 + i as u64), &[3, 8, 5, 1], &[3, 70]);
        if shape.adapted > 0 && shape.hidden < 300 {
            let wide = Shape { rank: 200, ..shape };
            let layer = Layer::random::<bf16>(70 + i as u64, wide, without, SOFTMAX, false);
            check::<bf16>(&device, layer, &[200, 3, 17, 9, 64], &[2, 50]);
        }
        if shape.groups > 0 && without == 0 {
            check::<bf16>(&device, layer(80 + i as u64), &[0], &[2, 50]);
        }
    }
}

/// Constants, which are slots without components, beside slots with biases and without.
#[test]
fn quick_whole_layers_of_tensors_with_vectors() {
    let Some(device) = device() else { return };
    let (shape, without) = SHAPES[1];
    for ranks in [[24, 0, 7], [0, 0, 0], [200, 0, 3]] {
        let wide = Shape {
            rank: ranks[0].max(8),
            ..shape
        };
        let mut layer = Layer::random::<bf16>(31, wide, without, SOFTMAX, false);
        let of: Vec<_> = (0..shape.positions())
            .map(|p| (p % 3 > 0).then_some(p / 2))
            .collect();
        let vectors = random::<bf16>(&mut seeded(32), of.len().div_ceil(2) * shape.hidden, 1);
        layer.vectors = Some((values(&vectors), of));
        check::<bf16>(&device, layer, &ranks, &[1, 8, 50]);
    }
}

#[test]
fn whole_layers_of_tensors_in_f16() {
    let Some(device) = device() else { return };
    let (shape, without) = SHAPES[1];
    let layer = Layer::random::<f16>(1, shape, without, SOFTMAX, false);
    check::<f16>(&device, layer, &[24, 7], &[1, 9, 64]);
}

/// More tokens than run at once, and DeepSeek's choice.
#[test]
fn large_and_limited_whole_layers_of_tensors() {
    let Some(device) = device() else { return };
    let layer = Layer::random::<bf16>(9, SHAPES[0].0, 0, SOFTMAX, false);
    check::<bf16>(&device, layer, &[8], &[8200]);
    let shape = shape(64, 32, 32, 6, [20, 9], 2, 8);
    let layer = Layer::random::<bf16>(7, shape, 1, LIMITED, true);
    check::<bf16>(&device, layer, &[8], &[4, 100]);
}

#[test]
fn whole_layers_of_tensors_that_kernels_do_not_take() {
    let Some(device) = device() else { return };
    let (shape, without) = SHAPES[0];
    let layer = Layer::random::<bf16>(1, shape, without, SOFTMAX, false);
    let whole = |dtype, change: &dyn Fn(&mut Parts<'_>)| {
        let ranks = vec![shape.rank; shape.adapted];
        let mut parts = Parts::new(&layer, &device, dtype, &ranks);
        change(&mut parts);
        WholeLayer::new(&parts.parts()).unwrap().is_some()
    };
    assert!(whole(DType::BF16, &|_| ()));
    assert!(!whole(DType::F32, &|_| ()));
    assert!(!whole(DType::BF16, &|parts| {
        parts.router = (&parts.router * 1.0001).unwrap();
    }));
    assert!(!whole(DType::BF16, &|parts| {
        parts.bases[0] = Var::from_tensor(&parts.bases[0])
            .unwrap()
            .as_tensor()
            .clone();
    }));
    assert!(!whole(DType::BF16, &|parts| {
        parts.dense[1] = parts.dense[1].to_dtype(DType::F16).unwrap();
    }));
}
