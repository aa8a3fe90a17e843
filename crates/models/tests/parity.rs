//! Parity with `transformers` on the small random OLMoE checkpoint of `fixtures/parity/olmoe`
//! (`fixtures/parity/make_parity.py` made it).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{Device, Tensor, Var};
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{Checkpoint, Decoder, GenerateOptions, Tokens, generate};
use std::collections::HashMap;
use std::path::PathBuf;

/// f32 on both sides: rounding of sums of at most 128 terms, relative to the largest value.
const TOLERANCE: f32 = 1e-4;

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity/olmoe")
}

struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn load() -> Self {
        let path = fixture().join("reference.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    fn ids(&self) -> Vec<u32> {
        let ids = self.0["input_ids"]
            .flatten_all()
            .unwrap()
            .to_vec1::<i64>()
            .unwrap();
        ids.into_iter().map(|i| i as u32).collect()
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
    let reference = Reference::load();
    let model = Decoder::load(&Checkpoint::open(&fixture()).unwrap()).unwrap();
    let ids = reference.ids();
    let mut seen = 0;
    let hidden = model
        .forward(Tokens { ids: &ids, rows: 2 }, None, &mut |l, x, routing| {
            reference.check(&format!("hidden_{l}"), x);
            reference.check(&format!("router_logits_{l}"), &routing.logits);
            reference.check(&format!("topk_weight_{l}"), &routing.gates);
            let chosen: Vec<i64> = routing.chosen.iter().map(|&e| e.into()).collect();
            let expected = reference.0[&format!("topk_index_{l}")]
                .flatten_all()
                .unwrap();
            assert_eq!(chosen, expected.to_vec1::<i64>().unwrap(), "layer {l}");
            seen += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, 2);
    reference.check("final_norm", &hidden);
    reference.check("logits", &model.logits(&hidden).unwrap());
}

#[test]
fn loss_and_gradients_match_transformers() {
    let reference = Reference::load();
    let mut model = Decoder::load(&Checkpoint::open(&fixture()).unwrap()).unwrap();
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
    for name in reference.0.keys().filter(|n| n.starts_with("grad.")) {
        let name = &name["grad.".len()..];
        let grad = match name.split_once(".experts.") {
            Some((layer, rest)) => {
                let (expert, projection) = rest.split_once('.').unwrap();
                let var = &vars[&format!("{layer}.experts.{projection}")];
                grads
                    .get(var)
                    .unwrap()
                    .get(expert.parse().unwrap())
                    .unwrap()
            }
            None => grads.get(&vars[name]).unwrap().clone(),
        };
        reference.check(&format!("grad.{name}"), &grad);
        checked += 1;
    }
    assert!(checked >= 10, "only {checked} gradients were compared");
}

#[test]
fn greedy_generation_with_cache_matches_transformers() {
    let reference = Reference::load();
    let model = Decoder::load(&Checkpoint::open(&fixture()).unwrap()).unwrap();
    let options = GenerateOptions {
        max_new_tokens: 24,
        temperature: 0.0,
        top_p: None,
        seed: 0,
        eos: None,
    };
    let prompt = reference.ids()[..8].to_vec();
    let out = generate(&model, &[prompt], &options, &mut |_| true).unwrap();
    let expected = reference.0["generated"]
        .flatten_all()
        .unwrap()
        .to_vec1::<i64>()
        .unwrap();
    assert_eq!(
        out[0].iter().map(|&t| i64::from(t)).collect::<Vec<_>>(),
        expected
    );
}
