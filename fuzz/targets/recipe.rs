//! A recipe file, and the choices made of it for a model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe::preflight::forecast;
use lightmoe::recipe::Recipe;
use lightmoe::settings::Settings;
use lightmoe_models::ModelConfig;
use serde_json::json;
use std::path::Path;
use std::sync::LazyLock;

static CONFIG: LazyLock<ModelConfig> = LazyLock::new(|| {
    let config = json!({
        "model_type": "olmoe", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2,
    });
    ModelConfig::from_json(&config, Path::new("config.json")).expect("a config of ours")
});

fuzz_target!(|text: &str| {
    let Ok(settings) = Settings::parse(text) else {
        return;
    };
    // The same keys, more of them needed.
    if let Ok(recipe) = Recipe::parse(text) {
        let _ = recipe.to_toml();
    }
    let Ok(recipe) = Recipe::resolve(settings, &CONFIG) else {
        return;
    };
    // Takes three quarters of the time, so not for each input.
    if text.len().is_multiple_of(8) {
        let written = recipe.to_toml().expect("a recipe is TOML");
        assert_eq!(Recipe::parse(&written).expect("written by us"), recipe);
    }
    let (beta, rate) = (recipe.annealing(), recipe.learning_rate());
    for step in [0, recipe.steps / 2, recipe.steps - 1] {
        assert!((0.0..=1.0).contains(&beta.beta(step, recipe.steps)));
        assert!(rate.at(step, recipe.steps) >= 0.0);
    }
    if let Ok(forecast) = forecast(&recipe, &CONFIG, 2, recipe.calibration_tokens) {
        assert!(!forecast.to_string().is_empty());
    }
});
