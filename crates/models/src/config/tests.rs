use super::*;
use serde_json::json;

fn fixture(name: &str) -> Value {
    let path = format!("{}/../../fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn olmoe_with(key: &str, value: Value) -> Result<ModelConfig> {
    changed("configs/olmoe-1b-7b-0924.json", key, value)
}

fn changed(name: &str, key: &str, value: Value) -> Result<ModelConfig> {
    let mut config = fixture(name);
    config[key] = value;
    ModelConfig::from_json(&config, Path::new("here/config.json"))
}

#[track_caller]
fn assert_refused(result: Result<ModelConfig>, words: &[&str]) {
    let message = result.unwrap_err().to_string();
    for word in words.iter().chain(&["here/config.json"]) {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn reads_the_published_olmoe() {
    let raw = fixture("configs/olmoe-1b-7b-0924.json");
    let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
    assert_eq!(config.family, Family::Olmoe);
    assert_eq!((config.hidden_size, config.vocab_size), (2048, 50304));
    assert_eq!((config.num_layers, config.num_heads), (16, 16));
    assert_eq!((config.num_kv_heads, config.head_dim), (16, 128));
    assert_eq!((config.norm_eps, config.rope_theta), (1e-5, 1e4));
    assert_eq!((config.moe.num_experts, config.moe.top_k), (64, 8));
    assert_eq!(config.moe.intermediate_size, 1024);
    assert!(!config.moe.renormalize && !config.tie_word_embeddings);
    assert_eq!(config.moe.shared_intermediate_size, 0);
    assert_eq!(config.moe_layers().collect::<Vec<_>>().len(), 16);
    assert_eq!(config.eos_token_id, Some(50279));
    assert_eq!((config.pad_token_id, config.bos_token_id), (Some(1), None));
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::WholeProjection,
        bias: ProjectionBias::None,
        clip_qkv: None,
        sliding_window: None,
    };
    assert_eq!(config.attention, attention);
    assert_eq!(config.raw, raw);
}

#[test]
fn reads_both_spellings() {
    let mut new = fixture("parity/olmoe/config.json");
    for key in ["rope_theta", "rope_scaling", "torch_dtype"] {
        new.as_object_mut().unwrap().remove(key);
    }
    new["rope_parameters"] = json!({"rope_theta": 500.0, "rope_type": "default"});
    let new = ModelConfig::from_json(&new, Path::new("c")).unwrap();
    assert_eq!((new.rope_theta, new.hidden_size), (500.0, 48));
    let mut old = fixture("configs/olmoe-1b-7b-0924.json");
    old["rope_theta"] = json!(500.0);
    let old = ModelConfig::from_json(&old, Path::new("c")).unwrap();
    assert_eq!(old.rope_theta, 500.0);
}

#[test]
fn reads_the_published_deepseek_v2_lite() {
    let raw = fixture("configs/deepseek-v2-lite.json");
    let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
    assert_eq!(config.moe_layers().collect::<Vec<_>>()[..2], [1, 2]);
    assert!(!config.is_moe_layer(0) && config.is_moe_layer(26) && !config.is_moe_layer(27));
    assert_eq!(config.moe.shared_intermediate_size, 2816);
    assert_eq!(config.dense_intermediate_size, 10944);
    assert_eq!((config.head_dim, config.moe.groups), (192, None));
    let RopeScaling::Yarn(yarn) = &config.rope_scaling else {
        panic!("{:?}", config.rope_scaling);
    };
    assert_eq!(
        (yarn.factor, yarn.original, yarn.attention_factor),
        (40.0, 4096, 1.0)
    );
    let mscale = 0.1 * 0.707 * 40f64.ln() + 1.0;
    let scale = mscale * mscale / 192f64.sqrt();
    assert!((config.attention_scale() - scale).abs() < 1e-12);
}

/// What nobody reads might matter: it is named, wherever it stands.
#[test]
fn unknown_keys_are_refused() {
    for (file, key, value) in [
        (
            "configs/olmoe-1b-7b-0924.json",
            "logit_softcapping",
            json!(30.0),
        ),
        ("configs/olmoe-1b-7b-0924.json", "n_group", json!(4)),
        ("configs/deepseek-v2-lite.json", "router_bias", json!(true)),
        ("parity/phimoe/config.json", "norm_topk", json!(false)),
    ] {
        assert_refused(changed(file, key, value), &[key, "not known"]);
        // A key without a value says nothing.
        changed(file, key, Value::Null).unwrap();
    }
    let inner = json!({"rope_type": "yarn", "factor": 2.0, "rotary_percent": 0.25});
    assert_refused(olmoe_with("rope_scaling", inner), &["rotary_percent"]);
    // What concerns training or generation alone passes.
    for key in ["initializer_range", "use_cache", "repetition_penalty"] {
        olmoe_with(key, json!(1.5)).unwrap();
    }
}

#[test]
fn fp8_is_read_and_other_quantisation_refused() {
    let fp8 = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                     "weight_block_size": [128, 64]});
    let config = olmoe_with("quantization_config", fp8).unwrap();
    assert_eq!(config.fp8_block, Some([128, 64]));
    for wrong in [
        json!({"quant_method": "gptq", "bits": 4}),
        json!({"quant_method": "fp8"}),
        json!({"quant_method": "fp8", "weight_block_size": [0, 128]}),
        json!({"weight_block_size": [128, 128]}),
        json!("fp8"),
    ] {
        let refused = olmoe_with("quantization_config", wrong);
        assert_refused(refused, &["quantization_config"]);
    }
}

#[test]
fn the_facts_of_the_families() {
    let facts = |name: &str| {
        let raw = fixture(&format!("parity/{name}/config.json"));
        let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
        let Attention::GroupedQuery {
            qk_norm,
            bias,
            sliding_window,
            ..
        } = config.attention
        else {
            panic!("{name} has latent attention");
        };
        let shared = (config.moe.shared_intermediate_size, config.moe.shared_gate);
        let renormalize = config.moe.renormalize;
        (qk_norm, bias, sliding_window, renormalize, shared)
    };
    let (plain, qkv) = (ProjectionBias::None, ProjectionBias::QueryKeyValue);
    let mixtral = (QkNorm::None, plain, Some(6), true, (0, false));
    assert_eq!(facts("mixtral"), mixtral);
    // A window that is written down but not used.
    let qwen2 = (QkNorm::None, qkv, None, false, (40, true));
    assert_eq!(facts("qwen2_moe"), qwen2);
    let qwen3 = (QkNorm::PerHead, plain, None, true, (0, false));
    assert_eq!(facts("qwen3_moe"), qwen3);
    let mut coder = fixture("parity/qwen3_moe/config.json");
    coder["qkv_bias"] = json!(false);
    coder["use_qk_norm"] = json!(true);
    coder["shared_expert_intermediate_size"] = json!(0);
    ModelConfig::from_json(&coder, Path::new("c")).unwrap();
    for (key, value) in [
        ("qkv_bias", json!(true)),
        ("use_qk_norm", json!(false)),
        ("shared_expert_intermediate_size", json!(8)),
        ("decoder_sparse_step", json!(2)),
        ("mlp_only_layers", json!([1])),
        ("use_sliding_window", json!(true)),
        ("head_dim", json!(15)),
        ("hidden_act", json!("gelu")),
    ] {
        let refused = changed("parity/qwen3_moe/config.json", key, value);
        assert_refused(refused, &[key]);
    }
}

#[test]
fn end_tokens_may_be_one_many_or_none() {
    for (value, expected) in [
        (json!(7), Some(7)),
        (json!([9, 7]), Some(9)),
        (json!([]), None),
        (Value::Null, None),
    ] {
        let config = olmoe_with("eos_token_id", value).unwrap();
        assert_eq!(config.eos_token_id, expected);
    }
    assert_refused(olmoe_with("eos_token_id", json!("</s>")), &["eos_token_id"]);
    assert_refused(olmoe_with("pad_token_id", json!(50304)), &["pad_token_id"]);
}

#[test]
fn refuses_what_it_does_not_know() {
    let words = ["model_type", "llama", "olmoe", "deepseek_v2"];
    assert_refused(olmoe_with("model_type", json!("llama")), &words);
    assert_refused(olmoe_with("hidden_act", json!("gelu")), &["hidden_act"]);
    let long = json!({"type": "longrope", "short_factor": [], "long_factor": []});
    assert_refused(
        olmoe_with("rope_scaling", long),
        &["rope_scaling", "longrope"],
    );
    let linear = json!({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0});
    assert_refused(olmoe_with("rope_parameters", linear), &["rope_parameters"]);
    let partial = json!({"rope_type": "default", "partial_rotary_factor": 0.5});
    assert_refused(olmoe_with("rope_parameters", partial), &["partial_rotary"]);
}

#[test]
fn refuses_missing_and_contradictory_keys() {
    for key in ["hidden_size", "num_experts", "vocab_size", "model_type"] {
        assert_refused(olmoe_with(key, Value::Null), &[key]);
    }
    for key in ["hidden_size", "num_hidden_layers", "num_experts_per_tok"] {
        assert_refused(olmoe_with(key, json!(0)), &[key]);
        assert_refused(olmoe_with(key, json!("2048")), &[key]);
    }
    let too_many = olmoe_with("num_experts_per_tok", json!(65));
    assert_refused(too_many, &["num_experts_per_tok", "num_experts", "64"]);
    let heads = olmoe_with("num_attention_heads", json!(48));
    assert_refused(heads, &["num_attention_heads", "hidden_size"]);
    let kv = olmoe_with("num_key_value_heads", json!(5));
    assert_refused(kv, &["num_key_value_heads"]);
    assert_refused(olmoe_with("head_dim", json!(64)), &["head_dim", "128"]);
    assert_refused(olmoe_with("rms_norm_eps", json!(0.0)), &["rms_norm_eps"]);
    assert_refused(olmoe_with("clip_qkv", json!(-1.0)), &["clip_qkv"]);
    let twice = json!({"rope_theta": 5e5, "rope_type": "default"});
    assert_refused(olmoe_with("rope_parameters", twice), &["rope_theta"]);
    assert_refused(olmoe_with("num_local_experts", json!(8)), &["num_experts"]);
    let deepseek = "configs/deepseek-v2-lite.json";
    let layers = changed(deepseek, "first_k_dense_replace", json!(27));
    assert_refused(layers, &["first_k_dense_replace"]);
    let phi = "parity/phimoe/config.json";
    let mut scaling = fixture(phi)["rope_scaling"].clone();
    scaling["long_factor"] = json!([1.0]);
    assert_refused(changed(phi, "rope_scaling", scaling), &["rope_scaling"]);
    assert_refused(
        changed(phi, "num_experts_per_tok", json!(3)),
        &["sparsemixer", "num_experts_per_tok"],
    );
    let v3 = "parity/deepseek_v3/config.json";
    assert_refused(
        changed(v3, "topk_group", json!(9)),
        &["topk_group", "n_group"],
    );
    assert_refused(changed(v3, "num_key_value_heads", json!(2)), &["latent"]);
    assert_refused(
        changed(v3, "rope_interleave", json!(false)),
        &["rope_interleave"],
    );
    // The original context may stand beside the scaling; two that differ are an error.
    let mut outer = fixture(phi);
    for key in ["rope_scaling", "rope_parameters"] {
        let inner = outer[key].as_object_mut().unwrap();
        inner.remove("original_max_position_embeddings");
    }
    let read = |raw: &Value| ModelConfig::from_json(raw, Path::new("here/config.json"));
    let RopeScaling::Long(long) = read(&outer).unwrap().rope_scaling else {
        panic!("no LongRoPE");
    };
    assert_eq!(long.original, 64);
    let differs = changed(phi, "original_max_position_embeddings", json!(32));
    assert_refused(differs, &["original_max_position_embeddings"]);
    let v2 = "parity/deepseek_v2/config.json";
    assert_refused(
        changed(v2, "norm_topk_prob", json!(true)),
        &["norm_topk_prob"],
    );
    let frequency = changed(deepseek, "moe_layer_freq", json!(2));
    assert_refused(frequency, &["moe_layer_freq"]);
    let scoring = changed(deepseek, "scoring_func", json!("sigmoid"));
    assert_refused(scoring, &["scoring_func"]);
}

#[test]
fn absurd_sizes_are_an_error_and_no_overflow() {
    let huge = json!(u64::MAX / 2);
    assert_refused(olmoe_with("hidden_size", huge), &["hidden_size"]);
    let big = json!(1u64 << 31);
    let mut config = fixture("configs/olmoe-1b-7b-0924.json");
    for key in ["hidden_size", "num_experts", "intermediate_size"] {
        config[key] = big.clone();
    }
    let read = ModelConfig::from_json(&config, Path::new("here/config.json"));
    assert_refused(read, &["parameters"]);
}

#[test]
fn a_file_that_is_missing_or_no_json_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let missing = ModelConfig::from_file(&path).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }));
    for text in ["{", "[]", "3"] {
        std::fs::write(&path, text).unwrap();
        let message = ModelConfig::from_file(&path).unwrap_err().to_string();
        assert!(message.contains("config.json"), "{message}");
    }
}

/// Lists of layers, experts and angles are made of a configuration alone: none may be endless, and no
/// angle a NaN.
#[test]
fn sizes_that_no_model_has_are_refused() {
    let experts = olmoe_with("num_experts", json!(1 << 20));
    assert_refused(experts, &["experts together"]);
    let layers = olmoe_with("num_hidden_layers", json!(4097));
    assert_refused(layers, &["4097 layers of 64", "num_hidden_layers"]);
    olmoe_with("num_hidden_layers", json!(4096)).unwrap();
    // Dense layers count too.
    let mut dense = fixture("configs/deepseek-v2-lite.json");
    dense["num_hidden_layers"] = json!(1_000_000);
    dense["first_k_dense_replace"] = json!(999_999);
    let dense = ModelConfig::from_json(&dense, Path::new("here/config.json"));
    assert_refused(dense, &["experts together"]);
    let head = changed("parity/qwen3_moe/config.json", "head_dim", json!(1 << 17));
    assert_refused(head, &["131072"]);
    for (key, value) in [
        ("rope_theta", json!(1e-300)),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e300}),
        ),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e-320}),
        ),
    ] {
        assert_refused(olmoe_with(key, value), &["rope_theta", "not finite"]);
    }
    let mut long = fixture("parity/phimoe/config.json");
    long["rope_parameters"] = Value::Null;
    long["original_max_position_embeddings"] = Value::Null;
    let scaling = long["rope_scaling"].as_object_mut().unwrap();
    scaling.insert("original_max_position_embeddings".into(), json!(1));
    scaling.retain(|key, _| !key.ends_with("_mscale"));
    let long = ModelConfig::from_json(&long, Path::new("here/config.json"));
    assert_refused(long, &["rope_scaling", "not finite"]);
}

/// A key of the wrong type says something, if nobody knows what.
#[test]
fn no_value_is_passed_over() {
    for (key, value) in [
        ("mlp_only_layers", json!(1)),
        ("layer_types", json!("full")),
    ] {
        assert_refused(changed("parity/qwen3_moe/config.json", key, value), &[key]);
    }
    for value in [json!(-1e-5), json!("1e-5")] {
        let mut config = fixture("parity/mixtral/config.json");
        config["rms_norm_eps"] = Value::Null;
        config["layer_norm_eps"] = value;
        let read = ModelConfig::from_json(&config, Path::new("here/config.json"));
        assert_refused(read, &["layer_norm_eps"]);
    }
}
