//! The commands that look at a model or run it: `inspect`, `logits`, `generate`, `synthesize`.

use crate::support::{Outcome, base, command, files, json, names, repository};
use candle_core::{Device, Tensor};
use serde_json::{Value, from_str, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const OLMOE: &str = "fixtures/configs/olmoe-1b-7b-0924.json";

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// `logits` on the ids of a parity fixture gives what `transformers` computed.
#[test]
fn logits_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let parity = repository("fixtures/parity/deepseek_v3");
    let reference = parity.join("reference.safetensors");
    let out = |name: &str, limit: &str| -> HashMap<String, Tensor> {
        let path = folder.path().join(name);
        let mut call = command("logits");
        call.args(["--max-memory", limit])
            .arg("--model")
            .arg(&parity);
        call.arg("--tokens")
            .arg(&reference)
            .arg("--out")
            .arg(&path)
            .ok();
        tensors(&path)
    };
    let (ours, expected) = (out("a", "8GiB"), tensors(&reference));
    let close = |name: &str, theirs: &str| {
        let (ours, theirs) = (values(&ours[name]), values(&expected[theirs]));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let scale = theirs.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() <= 1e-4 * scale, "{name}: {a} is not {b}");
        }
    };
    close("logits", "logits");
    close("hidden.0", "hidden_0");
    close("hidden.2", "hidden_2");
    close("hidden.3", "final_norm");
    close("router.1.logits", "router_logits_1");
    close("router.2.weights", "topk_weight_2");
    let ids = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<i64>().unwrap();
    assert_eq!(ids(&ours["router.2.ids"]), ids(&expected["topk_index_2"]));
    assert_eq!(ids(&ours["input_ids"]), ids(&expected["input_ids"]));
    assert_eq!(ours["logits"].dims(), [2, 16, 128]);
    assert_eq!(ours["router.1.ids"].dims(), [2, 16, 4]);
    assert!(
        !ours.contains_key("router.0.logits"),
        "a dense layer has no router"
    );
    // A model that does not fit is read layer by layer, to the same bits.
    let streamed = out("b", "1KB");
    for (name, tensor) in ours.iter().filter(|(n, _)| !n.ends_with("ids")) {
        assert_eq!(values(tensor), values(&streamed[name]), "{name}");
    }
}

#[test]
fn a_compressed_model_generates_layer_by_layer() {
    let generate = |limit: &[&str]| {
        let mut call = command("generate");
        call.arg("--model").arg(base().join("model")).args(limit);
        call.args(["--prompt", "3 + 4 =", "--max-new-tokens", "8"])
            .ok()
    };
    assert_eq!(generate(&["--max-memory", "1MB"]), generate(&[]));
    let message = command("generate")
        .args(["--prompt", "a", "--max-memory", "lots"])
        .fails(2);
    assert!(message.contains("3GiB"), "{message}");
}

/// A synthesized model is a whole one: it inspects, observes, plans and builds without a task.
#[test]
fn a_synthesized_model_goes_the_whole_way_on_token_ids() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let config = repository("fixtures/olmoe-nano/config.json");
    let make = |seed: &str, out: &PathBuf| {
        let mut call = command("synthesize");
        call.arg("--config").arg(&config).args(["--seed", seed]);
        call.arg("--out").arg(out).ok()
    };
    make("3", &path("a"));
    make("3", &path("again"));
    make("4", &path("b"));
    assert!(
        files(&path("a")) == files(&path("again")),
        "a seed gives one model"
    );
    assert!(files(&path("a")) != files(&path("b")));
    let inspect = |model: &Path| -> Value {
        from_str(
            &command("inspect")
                .arg("--json")
                .arg("--model")
                .arg(model)
                .ok(),
        )
        .unwrap()
    };
    let (made, real) = (
        inspect(&path("a")),
        inspect(&repository("fixtures/olmoe-nano")),
    );
    assert_eq!(made["tensors"], real["tensors"]);
    assert_eq!(
        (&made["bytes"], &made["dtype"]),
        (&real["bytes"], &json!("bf16"))
    );
    // Ids from `logits`, which writes those that it used.
    let ids = path("ids.safetensors");
    command("logits")
        .arg("--model")
        .arg(path("a"))
        .arg("--out")
        .arg(&ids)
        .ok();
    let (seen, plan, built) = (path("seen.safetensors"), path("plan.json"), path("built"));
    let mut observe = command("observe");
    observe
        .arg("--model")
        .arg(path("a"))
        .arg("--tokens")
        .arg(&ids);
    observe.arg("--out").arg(&seen).ok();
    let mut call = command("plan");
    call.arg("--config")
        .arg(&config)
        .arg("--observations")
        .arg(&seen);
    call.args(["--ratio", "0.4"]).arg("--out").arg(&plan).ok();
    let mut call = command("build");
    call.arg("--model").arg(path("a")).arg("--plan").arg(&plan);
    call.arg("--out").arg(&built).ok();
    let planned = json(&plan)["parameters"]["after"].clone();
    assert_eq!(inspect(&built)["parameters"], planned);
    assert_eq!(inspect(&built)["ratios"], json!([]));
    assert!(!names(folder.path()).iter().any(|n| n.starts_with('.')));
}

/// The published models, from their configurations alone.
#[test]
fn a_config_is_enough_to_inspect_and_to_forecast() {
    let config = repository(OLMOE);
    let mut call = command("inspect");
    let text = call.arg("--config").arg(&config).ok();
    for words in [
        "model.layers.*.mlp.experts.*.gate_proj.weight",
        "[1024, 2048]",
        "6919161856",
        "13838323712",
        "0.5",
    ] {
        assert!(text.contains(words), "{text} lacks {words}");
    }
    let mut call = command("compress");
    call.args(["--dry-run", "--json", "--task", "math"]);
    let text = call.arg("--config").arg(&config).ok();
    let forecast: Value = from_str(&text).unwrap();
    assert_eq!(forecast["parameters_before"], 6_919_161_856u64);
    assert_eq!(forecast["bytes_before"], 13_838_323_712u64);
    assert_eq!(forecast["parameters_after"], 3_459_580_928u64);
    let message = command("compress").arg("--config").arg(&config).fails(2);
    assert!(message.contains("--dry-run"), "{message}");
}

/// A disk that fills up in the middle of a build: an error that names the file, and nothing left.
#[test]
fn a_full_disk_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let program = env!("CARGO_BIN_EXE_lightmoe");
    // A limit on the size of files stands in for the end of the disk; in units of 512 or 1024 bytes.
    let script = format!(
        "trap '' XFSZ; ulimit -f 1000; exec '{program}' --quiet build --model olmoe-nano \
         --plan '{}' --out '{}'",
        base().join("plan.json").display(),
        out.display()
    );
    let message = std::process::Command::new("sh")
        .args(["-c", &script])
        .fails(1);
    assert!(message.contains("model.safetensors"), "{message}");
    assert!(
        names(folder.path()).is_empty(),
        "{:?}",
        names(folder.path())
    );
    assert!(fs::metadata(&out).is_err());
}

/// The highest resident memory of a program that runs to its end, in bytes.
fn peak_of(call: &mut std::process::Command) -> u64 {
    let mut child = call.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) * 1024);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    peak
}

/// Observe keeps to its limit, with grouped and with latent attention.
#[test]
fn observe_keeps_to_its_memory() {
    let grouped = json!({
        "model_type": "olmoe", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_experts": 16,
        "num_experts_per_tok": 4, "max_position_embeddings": 1024,
    });
    let latent = json!({
        "model_type": "deepseek_v2", "vocab_size": 512, "hidden_size": 512,
        "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 32, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "kv_lora_rank": 64, "q_lora_rank": null, "v_head_dim": 64,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "max_position_embeddings": 1024,
    });
    for config in [grouped, latent] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("config.json"), config.to_string()).unwrap();
        let mut call = command("synthesize");
        call.arg("--config")
            .arg(path("config.json"))
            .arg("--out")
            .arg(path("model"))
            .ok();
        let ids: Vec<u8> = (0..16 * 512i32)
            .flat_map(|i| (i * 7 % 512).to_le_bytes())
            .collect();
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::I32, vec![16, 512], &ids);
        let file = safetensors::serialize([("input_ids", view.unwrap())], None).unwrap();
        fs::write(path("ids.safetensors"), file).unwrap();
        let observe = |limit: &str, more: &[&str]| {
            let mut call = command("observe");
            call.args(["--max-memory", limit])
                .args(more)
                .arg("--model")
                .arg(path("model"));
            call.arg("--tokens").arg(path("ids.safetensors"));
            call.arg("--out").arg(path("seen.safetensors"));
            call
        };
        // Through the model, and through it and back.
        let back: &[&str] = &["--damage", "fisher"];
        for (mib, more) in [(300, &[][..]), (450, &[]), (650, back), (900, back)] {
            let peak = peak_of(&mut observe(&format!("{mib}MiB"), more));
            assert!(peak > 20 << 20, "{peak} bytes: not measured");
            assert!(
                peak <= mib << 20,
                "{peak} bytes with at most {mib} MiB: {config}"
            );
        }
        let message = observe("100MiB", &[]).fails(1);
        assert!(message.contains("--max-memory"), "{message}");
    }
}
