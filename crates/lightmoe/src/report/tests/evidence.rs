//! An invented run that has all that a page can show.

use super::*;
use crate::contrast::{Answer, AnswerPair, LoadPair};
use crate::settings::Settings;
use lightmoe_compress::methods::{MethodName, PlanOptions};
use lightmoe_compress::plan::{ModelSummary, Parameters, Ratio, SlotPlan};
use serde_json::json;

/// A plan of 6 layers with 32 experts: of each five experts, two are kept.
pub(super) fn plan() -> Plan {
    let slot = |layer: usize, expert: usize| SlotPlan {
        expert,
        form: if (expert * 7 + layer * 3) % 5 < 2 {
            SlotForm::Dense
        } else {
            SlotForm::adapted(Some((expert + layer) % 3), 4, expert / 3 == 1)
        },
        score: (1 + (expert * 13 + layer * 5) % 32) as f64 / 528.0,
        weight: None,
        bytes: None,
        damage: None,
    };
    let layer = |layer: usize| LayerPlan {
        layer,
        threshold: Some(0.3 + 0.02 * layer as f64),
        router_norm: Some(1.5 - 0.1 * layer as f64),
        main: None,
        factored: None,
        groups: 3,
        slots: (0..32).map(|expert| slot(layer, expert)).collect(),
    };
    Plan {
        schema_version: 1,
        method: MethodName::Lightmoe,
        model: ModelSummary {
            family: "olmoe".to_owned(),
            hidden_size: 128,
            intermediate_size: 64,
            num_experts: 32,
            top_k: 4,
            layers: 6,
        },
        settings: PlanOptions {
            rank: 4,
            ..PlanOptions::default()
        }
        .settings(),
        ratio: Ratio {
            target: Some(0.5),
            achieved: 0.502,
        },
        p_hat: Some(0.35),
        parameters: Parameters {
            before: 3_560_000,
            after: 1_772_880,
            trained: 240_000,
        },
        damage: None,
        layers: (0..6).map(layer).collect(),
    }
}

pub(super) fn coverage() -> Vec<LayerCoverage> {
    let tokens = |layer: u64, expert: u64| match (expert * 31 + layer * 17) % 29 {
        0 => 0,
        n => n * n * 7,
    };
    let layer = |layer: u64| {
        let tokens: Vec<_> = (0..32).map(|expert| tokens(layer, expert)).collect();
        let sum: u64 = tokens.iter().sum();
        LayerCoverage {
            layer: layer as usize,
            share: tokens.iter().map(|&t| t as f64 / sum as f64).collect(),
            tokens_per_expert: tokens,
        }
    };
    (0..6).map(layer).collect()
}

pub(super) fn curve() -> Vec<Point> {
    let point = |step: usize| {
        let x = step as f64;
        Point {
            step,
            loss: 0.6 + 2.4 * (-x / 60.0).exp() + 0.08 * (x * 1.7).sin() * (x * 0.31).cos(),
            balance: None,
            distance: None,
            lr: 1e-3,
            beta: (1.0 - x / 150.0).max(0.0),
            grad_norm: 1.0,
            tokens: 2048,
        }
    };
    (0..300).map(point).collect()
}

/// Every layer's load, one answer that is the same and one that is not.
pub(super) fn contrast() -> Contrast {
    let load = |layer: usize| {
        let tokens = |shift: usize| (0..32).map(move |e| ((e * 7 + layer + shift) % 19) as u64);
        LoadPair {
            layer,
            original: tokens(0).collect(),
            result: tokens(3).collect(),
        }
    };
    let answer = |text: &str| Answer {
        text: text.to_owned(),
        whole: true,
    };
    let pair = |result: &str| AnswerPair {
        prompt: "How many stones?".to_owned(),
        target: "12".to_owned(),
        original: answer("it is 12"),
        result: answer(result),
    };
    Contrast {
        schema_version: 1,
        task: "math".to_owned(),
        examples: 40,
        tokens: 1234,
        load: (0..6).map(load).collect(),
        answers: vec![pair("it is 12"), pair("it is 13")],
    }
}

/// A model that strays, the later the layer the less.
pub(super) fn divergence() -> DivergenceFile {
    let estimate = |value: f64| json!({"value": value, "stderr": 0.1 * value});
    let distance = |kl: f64| json!({"kl": estimate(kl), "top1_agreement": estimate(1.0 - kl), "nll_increase": estimate(kl)});
    let layers: Vec<_> = (0..6)
        .map(|layer| {
            let mut of_layer = distance(0.06 / f64::from(layer + 1));
            of_layer["layer"] = json!(layer);
            of_layer
        })
        .collect();
    let model = json!({"name": "m", "fingerprint": "f"});
    let text = json!({
        "name": "math", "fingerprint": "f", "rows": 40, "tokens": 160,
        "whole": distance(0.125), "layers": layers,
        "kl_quantiles": {"median": 0.01, "p99": 2.5, "max": 3.25},
        "perplexity": {"original": 2.0, "compressed": 2.2, "ratio": 1.1, "ratio_stderr": 0.01},
    });
    let file = json!({
        "schema_version": 1, "lightmoe_version": "0.1.0", "original": model, "compressed": model,
        "texts": [text],
    });
    serde_json::from_value(file).unwrap()
}

/// The recipe of the sample.
pub(super) fn recipe(settings: &str) -> Recipe {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/olmoe-nano");
    let config = Path::new(folder).join("config.json");
    let config = lightmoe_models::ModelConfig::from_file(&config).unwrap();
    Recipe::resolve(Settings::parse(settings).unwrap(), &config).unwrap()
}

pub(super) fn sibling(name: &str, bytes: u64, score: f64) -> Sibling {
    let mut results = sample();
    results.bytes.after = bytes;
    let tasks = results.stages.get_mut(&Stage::Recovered).unwrap();
    let scores = tasks.get_mut("math").unwrap();
    scores.get_mut("exact_match").unwrap().value = score;
    Sibling {
        name: name.to_owned(),
        results,
        inputs: None,
    }
}

/// All that a page can show.
pub(super) fn evidence() -> Evidence {
    let mut other = sibling("other", 1, 1.0);
    other.results.task = "code".to_owned();
    Evidence {
        run: PathBuf::from("runs/mine"),
        results: sample(),
        inputs: None,
        plan: plan(),
        recipe: recipe("seed = 7"),
        coverage: coverage(),
        curve: curve(),
        contrast: Some(contrast()),
        divergence: Some(divergence()),
        siblings: vec![
            sibling("better", 6_000_000, 0.56),
            sibling("worse", 8_000_000, 0.5),
            other,
        ],
    }
}
