//! `plan.json`, and what build makes of it for a model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_compress::plan::Plan;
use lightmoe_models::{BankLayout, Manifest, ModelConfig};
use serde_json::json;
use std::path::Path;
use std::sync::LazyLock;

static CONFIG: LazyLock<ModelConfig> = LazyLock::new(|| {
    let config = json!({
        "model_type": "olmoe", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2,
    });
    ModelConfig::from_json(&config, Path::new("config.json")).expect("a config of ours")
});

fuzz_target!(|text: &[u8]| {
    let Ok(mut plan) = Plan::decode(text) else {
        return;
    };
    let written = serde_json::to_vec(&plan).expect("a plan is JSON");
    assert_eq!(Plan::decode(&written).expect("written by us"), plan);
    plan.mean_replaced();
    if plan.check_model(&CONFIG).is_err() {
        return;
    }
    plan.recount(&CONFIG);
    let layout = plan.layout(&CONFIG);
    let manifest = Manifest::of(&CONFIG, &layout).expect("a plan that was checked");
    assert_eq!(manifest.parameters(), plan.parameters.after);
    let raw = layout.annotate(&CONFIG).expect("a plan that was checked");
    let path = Path::new("config.json");
    let built = ModelConfig::from_json(&raw, path).expect("a config of ours");
    assert_eq!(
        BankLayout::of(&built, path).expect("a layout of ours"),
        layout
    );
});
