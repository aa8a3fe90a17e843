//! `config.json`, and what is computed from it before any weights are read.
//!
//! An input is a whole file; or a byte that chooses one of the seeds, and an object of keys to
//! change in it, so that a mutation meets the sizes more often than the syntax.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe::inspect::Summary;
use lightmoe_compress::estimate;
use lightmoe_compress::methods::{MethodName, PlanOptions};
use lightmoe_models::{BankLayout, Manifest, ModelConfig, Rotary};
use serde_json::{Map, Value};
use std::path::Path;

/// Models of more layers or experts are read, but not listed tensor by tensor.
const LISTED: usize = 64;

const SEEDS: [&[u8]; 9] = [
    include_bytes!("../seeds/config/olmoe"),
    include_bytes!("../seeds/config/built"),
    include_bytes!("../seeds/config/mixtral"),
    include_bytes!("../seeds/config/qwen2_moe"),
    include_bytes!("../seeds/config/qwen3_moe"),
    include_bytes!("../seeds/config/deepseek"),
    include_bytes!("../seeds/config/deepseek_v2"),
    include_bytes!("../seeds/config/deepseek_v3"),
    include_bytes!("../seeds/config/phimoe"),
];

fn read(input: &[u8]) -> Option<Value> {
    let (first, rest) = input.split_first()?;
    let Some(seed) = SEEDS.get(usize::from(*first)) else {
        return serde_json::from_slice(input).ok();
    };
    let changes: Map<String, Value> = serde_json::from_slice(rest).ok()?;
    let mut config: Map<String, Value> = serde_json::from_slice(seed).expect("a seed is JSON");
    config.extend(changes);
    Some(Value::Object(config))
}

fuzz_target!(|input: &[u8]| {
    let path = Path::new("config.json");
    let Some(value) = read(input) else {
        return;
    };
    let Ok(config) = ModelConfig::from_json(&value, path) else {
        return;
    };
    // Which no number that is none would pass.
    assert_eq!(
        ModelConfig::from_json(&config.raw, path).expect("read before"),
        config
    );
    assert!(config.attention_scale().is_finite());
    let parameters = config.parameters().total();
    assert!(config.active_parameters() > 0 && parameters > 0);
    for (rank, groups) in [(1, 0), (16, 3)] {
        let options = PlanOptions {
            rank,
            groups,
            ..PlanOptions::default()
        };
        if let Ok(estimate) = estimate(&config, 0.3, MethodName::Lightmoe, &options) {
            assert!(estimate.parameters_after < parameters);
        }
    }
    let _ = Rotary::new(&config);
    let Ok(layout) = BankLayout::of(&config, path) else {
        return;
    };
    if config.num_layers.saturating_mul(config.moe.num_experts) > LISTED {
        return;
    }
    let manifest = Manifest::of(&config, &layout).expect("a layout that was checked");
    if layout == BankLayout::dense(&config) {
        assert_eq!(manifest.parameters(), parameters);
    }
    let raw = layout.annotate(&config).expect("a layout that was checked");
    let again = ModelConfig::from_json(&raw, path).expect("a config that was read");
    assert_eq!(
        BankLayout::of(&again, path).expect("a layout of ours"),
        layout
    );
    if let Ok(summary) = Summary::of_config(&config, path) {
        assert_eq!(summary.parameters, manifest.parameters());
    }
});
