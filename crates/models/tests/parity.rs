//! Parity with `transformers` on a small random checkpoint of every family in `fixtures/parity`
//! (`fixtures/parity/make_parity.py` made them).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{Device, Tensor, Var};
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{
    Checkpoint, CheckpointWriter, DType, Decoder, Family, GenerateOptions, Tokens, generate, names,
};
use std::collections::HashMap;
use std::path::PathBuf;

/// f32 on both sides: rounding of sums of at most 128 terms, relative to the largest value.
const TOLERANCE: f32 = 1e-4;

/// Every family that runs.
fn families() -> impl Iterator<Item = Family> {
    Family::ALL.into_iter().filter(|f| f.is_runnable())
}

fn fixture(family: Family) -> PathBuf {
    let parity = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    parity.join(family.name())
}

fn model(family: Family) -> Decoder {
    Decoder::load(&Checkpoint::open(&fixture(family)).unwrap()).unwrap()
}

struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn load(family: Family) -> Self {
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
            error <= TOLERANCE * scale,
            "{name}: error {error} of {scale}"
        );
    }
}

#[test]
fn forward_matches_transformers() {
    for family in families() {
        let (reference, model) = (Reference::load(family), model(family));
        let ids = reference.ids();
        let mut seen = 0;
        let hidden = model
            .forward(Tokens { ids: &ids, rows: 2 }, None, &mut |l, x, routing| {
                reference.check(&format!("hidden_{l}"), x);
                reference.check(&format!("router_logits_{l}"), &routing.logits);
                reference.check(&format!("topk_weight_{l}"), &routing.gates);
                let chosen: Vec<i64> = routing.chosen.iter().map(|&e| e.into()).collect();
                assert_eq!(
                    chosen,
                    reference.numbers(&format!("topk_index_{l}")),
                    "{family}"
                );
                seen += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, 2);
        reference.check("final_norm", &hidden);
        reference.check("logits", &model.logits(&hidden).unwrap());
    }
}

/// A short sequence beside a long one, padded on the right, is the short one alone.
#[test]
fn a_padded_batch_matches_single_sequences_of_transformers() {
    let mut checked = 0;
    for family in families() {
        let (reference, model) = (Reference::load(family), model(family));
        let Some(alone) = reference.0.get("lengths_logits") else {
            continue;
        };
        let mut ids = reference.ids();
        let (short, half) = (alone.dim(0).unwrap(), ids.len() / 2);
        ids[half + short..].fill(1);
        let tokens = Tokens { ids: &ids, rows: 2 };
        let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
        let ours = model.logits(&hidden.narrow(0, half, short).unwrap());
        reference.check("lengths_logits", &ours.unwrap());
        checked += 1;
    }
    assert_eq!(checked, 3);
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
                vars.insert(names::stored(family, name), var);
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
        for name in reference.0.keys().filter(|n| n.starts_with("grad.")) {
            let name = &name["grad.".len()..];
            let grad = match name.split_once(".experts.") {
                Some((layer, rest)) => {
                    let (expert, projection) = rest.split_once('.').unwrap();
                    let var = &vars[&format!("{layer}.experts.{projection}")];
                    let stacked = grads.get(var).unwrap();
                    stacked.get(expert.parse().unwrap()).unwrap()
                }
                None => grads.get(&vars[name]).unwrap().clone(),
            };
            reference.check(&format!("grad.{name}"), &grad);
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
        let options = GenerateOptions {
            max_new_tokens: expected.len(),
            temperature: 0.0,
            top_p: None,
            seed: 0,
            eos: None,
        };
        let prompt = reference.ids()[..8].to_vec();
        let out = generate(&model, &[prompt], &options, &mut |_| true).unwrap();
        let ours: Vec<i64> = out[0].iter().map(|&t| i64::from(t)).collect();
        assert_eq!(ours, expected, "{family}");
        assert!(ours.len() >= 24);
    }
}

/// What we write of a model is the file that was read: the same names, shapes and numbers.
#[test]
fn a_written_model_has_the_published_names() {
    for family in families() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let mut writer = CheckpointWriter::new(&path, DType::F32, family).unwrap();
        let model = model(family);
        model.write(&mut writer).unwrap();
        writer.finish(&model.config().raw).unwrap();
        let load = |path: PathBuf| {
            let path = path.join("model.safetensors");
            candle_core::safetensors::load(path, &Device::Cpu).unwrap()
        };
        let (ours, theirs) = (load(path), load(fixture(family)));
        assert_eq!(ours.len(), theirs.len(), "{family}");
        for (name, tensor) in theirs {
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(&ours[&name]), values(&tensor), "{family}: {name}");
        }
    }
}
