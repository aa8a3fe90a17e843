//! Parity with `transformers` on a small random checkpoint of every family in `fixtures/parity`
//! (`fixtures/parity/make_parity.py` made them).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{Device, Tensor, Var};
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{
    Checkpoint, CheckpointWriter, DType, Decoder, ExpertPacking, Format, GenerateOptions,
    LanguageModel, Scheme, Tokens, generate,
};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// f32 on both sides: rounding of sums of at most 128 terms, relative to the largest value.
const TOLERANCE: f32 = 1e-4;
/// bf16 weights on both sides, but PyTorch rounds every result to bf16 (2^-9 relative) and we
/// compute in f32. The residual stream of these models passes about ten roundings, each of the size
/// of its largest values, and the head multiplies what they add up to by its norm: 10 · 2^-9 is
/// 2 %, and twice that is allowed. The fixtures guarantee the same choice of experts.
const BF16_TOLERANCE: f32 = 0.04;

/// Every folder with a fixture, and how many layers of its model are dense.
const FOLDERS: [(&str, usize); 9] = [
    ("olmoe", 0),
    ("mixtral", 0),
    ("qwen2_moe", 0),
    ("qwen3_moe", 0),
    ("deepseek", 1),
    ("deepseek_v2", 1),
    ("deepseek_v2_lite", 1),
    ("deepseek_v3", 1),
    ("phimoe", 0),
];

fn families() -> impl Iterator<Item = &'static str> {
    FOLDERS.into_iter().map(|(name, _)| name)
}

fn fixture(family: &str) -> PathBuf {
    let parity = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    parity.join(family)
}

fn model(family: &str) -> Decoder {
    Decoder::load(&Checkpoint::open(&fixture(family)).unwrap()).unwrap()
}

/// Logits `[2 · T, V]` of the reference's ids.
fn logits(model: &Decoder, ids: &[u32], rows: usize) -> Tensor {
    let tokens = Tokens { ids, rows };
    let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
    model.logits(&hidden).unwrap()
}

struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn load(family: &str) -> Self {
        let path = fixture(family).join("reference.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    fn ids(&self) -> Vec<u32> {
        let ids = self.numbers("input_ids");
        ids.into_iter().map(|i| i as u32).collect()
    }

    /// The numbers of a tensor of integers.
    fn numbers(&self, name: &str) -> Vec<i64> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    #[track_caller]
    fn check(&self, name: &str, ours: &Tensor) {
        self.check_within(name, ours, TOLERANCE);
    }

    #[track_caller]
    fn check_within(&self, name: &str, ours: &Tensor, tolerance: f32) {
        let expected = &self.0[name];
        let ours = ours.reshape(expected.shape()).unwrap();
        let scale = expected
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap();
        let error = (expected - ours)
            .unwrap()
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0);
        let (error, scale) = (
            error.unwrap().to_scalar::<f32>().unwrap(),
            scale.to_scalar::<f32>().unwrap(),
        );
        assert!(
            error <= tolerance * scale,
            "{name}: error {error} of {scale}"
        );
    }
}

#[test]
fn forward_matches_transformers() {
    for (family, dense) in FOLDERS {
        let (reference, model) = (Reference::load(family), model(family));
        let ids = reference.ids();
        let (mut seen, mut routed) = (0, 0);
        let hidden = model
            .forward(Tokens { ids: &ids, rows: 2 }, None, &mut |l, x, routing| {
                reference.check(&format!("hidden_{l}"), x);
                seen += 1;
                let Some(routing) = routing else {
                    return Ok(());
                };
                routed += 1;
                reference.check(&format!("router_logits_{l}"), &routing.logits);
                reference.check(&format!("topk_weight_{l}"), &routing.gates);
                let chosen: Vec<i64> = routing.chosen.iter().map(|&e| e.into()).collect();
                assert_eq!(
                    chosen,
                    reference.numbers(&format!("topk_index_{l}")),
                    "{family}"
                );
                Ok(())
            })
            .unwrap();
        assert_eq!((seen, routed), (2 + dense, 2), "{family}");
        reference.check("final_norm", &hidden);
        reference.check("logits", &model.logits(&hidden).unwrap());
    }
}

/// A short sequence beside a long one, padded on the right, is the short one alone.
#[test]
fn a_padded_batch_matches_single_sequences_of_transformers() {
    for family in families() {
        let (reference, model) = (Reference::load(family), model(family));
        let alone = &reference.0["lengths_logits"];
        let mut ids = reference.ids();
        let (short, half) = (alone.dim(0).unwrap(), ids.len() / 2);
        ids[half + short..].fill(1);
        let tokens = Tokens { ids: &ids, rows: 2 };
        let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
        let ours = model.logits(&hidden.narrow(0, half, short).unwrap());
        reference.check("lengths_logits", &ours.unwrap());
    }
}

/// Two experts that are alike in everything tie in every token; the model does not care which.
#[test]
fn tied_experts_match_transformers() {
    for family in families() {
        let (reference, mut model) = (Reference::load(family), model(family));
        model
            .visit(&mut |name, _, tensor| {
                if name.contains(".mlp.gate.") || name.contains(".mlp.experts.") {
                    let mut rows: Vec<u32> = (0..tensor.dims()[0] as u32).collect();
                    rows[1] = 0;
                    *tensor = tensor.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
                }
                Ok(())
            })
            .unwrap();
        reference.check("ties_logits", &logits(&model, &reference.ids(), 2));
    }
}

#[test]
fn bf16_matches_transformers() {
    for family in families() {
        let reference = Reference::load(family);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bf16");
        let source = Checkpoint::open(&fixture(family)).unwrap();
        let format = Format::new(DType::BF16, source.scheme());
        let (config, layout) = (source.config(), source.layout());
        let writer = CheckpointWriter::for_model(&path, &format, config, layout).unwrap();
        Decoder::load(&source).unwrap().write(&writer).unwrap();
        writer.finish(&config.raw).unwrap();
        let rounded = Checkpoint::open(&path).unwrap();
        assert_eq!(rounded.dtype(), DType::BF16);
        let ours = logits(&Decoder::load(&rounded).unwrap(), &reference.ids(), 2);
        reference.check_within("bf16.logits", &ours, BF16_TOLERANCE);
    }
}

/// LongRoPE has other frequencies for texts beyond the original context.
#[test]
fn a_text_beyond_the_original_context_matches() {
    let reference = Reference::load("phimoe");
    let ids = reference.numbers("long_input_ids");
    let ids: Vec<u32> = ids.into_iter().map(|i| i as u32).collect();
    reference.check("long_logits", &logits(&model("phimoe"), &ids, 1));
}

#[test]
fn loss_and_gradients_match_transformers() {
    for family in families() {
        let (reference, mut model) = (Reference::load(family), model(family));
        let mut vars = HashMap::new();
        model
            .visit(&mut |name, _, tensor| {
                let var = Var::from_tensor(tensor)?;
                *tensor = var.as_tensor().clone();
                vars.insert(name.to_owned(), var);
                Ok(())
            })
            .unwrap();
        let ids = reference.ids();
        let (rows, len) = (2, ids.len() / 2);
        let tokens = Tokens { ids: &ids, rows };
        let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
        let at: Vec<u32> = (0..ids.len())
            .filter(|i| i % len < len - 1)
            .map(|i| i as u32)
            .collect();
        let targets: Vec<u32> = at.iter().map(|&i| ids[i as usize + 1]).collect();
        let hidden = hidden
            .index_select(&Tensor::new(at, &Device::Cpu).unwrap(), 0)
            .unwrap();
        let nll = cross_entropy(&model.logits(&hidden).unwrap(), &targets).unwrap();
        let loss = nll.mean_all().unwrap();
        reference.check("loss", &loss);
        let grads = loss.backward().unwrap();
        let mut checked = 0;
        // By the names of the files, experts one by one.
        let checkpoint = Checkpoint::open(&fixture(family)).unwrap();
        let (scheme, layout) = (checkpoint.scheme(), checkpoint.layout());
        let mut by_file = BTreeMap::new();
        for (name, var) in &vars {
            let Some(grad) = grads.get(var) else { continue };
            let mut add = |name: &str, grad: Tensor| {
                let place = scheme.place(name, grad.dims(), layout);
                by_file.insert(place.name, grad);
            };
            match name.split_once(".experts.") {
                None => add(name, grad.clone()),
                Some((layer, rest)) => {
                    for e in 0..grad.dims()[0] {
                        add(&format!("{layer}.experts.{e}.{rest}"), grad.get(e).unwrap());
                    }
                }
            }
        }
        for name in reference.0.keys().filter(|n| n.starts_with("grad.")) {
            let name = &name["grad.".len()..];
            let grad = &by_file[name];
            reference.check(&format!("grad.{name}"), grad);
            checked += 1;
        }
        assert!(checked >= 10, "{family}: only {checked} gradients");
    }
}

#[test]
fn greedy_generation_with_cache_matches_transformers() {
    for family in families() {
        let (reference, model) = (Reference::load(family), model(family));
        let expected = reference.numbers("generated");
        let options = GenerateOptions::greedy(expected.len(), Vec::new());
        let prompt = reference.ids()[..8].to_vec();
        let out = generate(&model, &[prompt], &options, &mut |_| true).unwrap();
        let ours: Vec<i64> = out[0].iter().map(|&t| i64::from(t)).collect();
        assert_eq!(ours, expected, "{family}");
        assert_eq!(ours.len(), 32);
    }
}

/// What we write of a model is the file that was read: the same names, shapes and numbers. With its
/// experts stacked, it has the names and shapes that transformers 5 writes, and the same numbers.
#[test]
fn a_written_model_has_the_names_of_transformers() {
    let names = fixture("fused_names.json");
    let names = std::fs::read_to_string(names).unwrap();
    let fused: BTreeMap<String, BTreeMap<String, Vec<usize>>> =
        serde_json::from_str(&names).unwrap();
    for family in families() {
        let folder = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&fixture(family)).unwrap();
        let (config, layout) = (source.config(), source.layout());
        let model = model(family);
        for packing in [ExpertPacking::Separate, ExpertPacking::Fused] {
            let path = folder.path().join("model");
            let scheme = Scheme {
                packing,
                ..source.scheme()
            };
            let format = Format::new(DType::F32, scheme);
            let writer = CheckpointWriter::for_model(&path, &format, config, layout).unwrap();
            model.write(&writer).unwrap();
            writer.finish(&config.raw).unwrap();
            let load = |path: PathBuf| {
                let path = path.join("model.safetensors");
                candle_core::safetensors::load(path, &Device::Cpu).unwrap()
            };
            let (ours, theirs) = (load(path.clone()), load(fixture(family)));
            if packing == ExpertPacking::Separate {
                assert_eq!(ours.len(), theirs.len(), "{family}");
                for (name, tensor) in theirs {
                    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    assert_eq!(values(&ours[&name]), values(&tensor), "{family}: {name}");
                }
                continue;
            }
            let shapes: BTreeMap<String, Vec<usize>> = ours
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
                .collect();
            assert_eq!(shapes, fused[family], "{family}");
            let read = Checkpoint::open(&path).unwrap();
            assert_eq!(read.scheme(), scheme, "{family}");
            assert!(read.extras().unwrap().is_empty());
            let read = Decoder::load(&read).unwrap().tensors().unwrap();
            for ((name, ours), (_, theirs)) in read.iter().zip(model.tensors().unwrap()) {
                let same = (ours - theirs).unwrap().abs().unwrap().sum_all().unwrap();
                assert_eq!(same.to_scalar::<f32>().unwrap(), 0.0, "{family}: {name}");
            }
        }
    }
}
