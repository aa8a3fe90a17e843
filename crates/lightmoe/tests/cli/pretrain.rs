//! Pre-training, with a model of a few thousand parameters.

use crate::support::{Outcome, command, files, names};
use serde_json::Value;
use std::fs;

const RECIPE: &str = "out = 'model'\nseed = 3\n[model]\nhidden_size = 16\n\
    num_hidden_layers = 2\nnum_attention_heads = 2\nintermediate_size = 8\nnum_experts = 4\n\
    num_experts_per_tok = 2\nmax_position_embeddings = 64\n[training]\nsteps = 6\nrows = 2\n\
    length = 32\nbalance = 0.01\nweight_decay = 0.1\nclip_norm = 1.0\nbeta1 = 0.9\n\
    beta2 = 0.95\n[training.learning_rate]\npeak = 3e-3\nwarmup = 0.1\nflat_until = 0.5\n\
    decay = 'linear'\nfinal_share = 0.02\n";

#[test]
fn a_model_is_trained_from_nothing_and_always_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("recipe.toml"), RECIPE).unwrap();
    let train = |out: &str| {
        let mut call = command("pretrain");
        call.args(["--recipe", "recipe.toml", "--out", out]);
        call.current_dir(folder.path()).ok()
    };
    assert!(train("a").contains("last training loss"));
    train("b");
    let model = folder.path().join("a");
    assert!(files(&model) == files(&folder.path().join("b")));
    let text = command("inspect")
        .arg("--json")
        .arg("--model")
        .arg(&model)
        .ok();
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(summary["shape"]["num_experts"], 4);
    assert_eq!(summary["dtype"], "bf16");
    let config: Value =
        serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    // 0.01 for the mean over the two chosen experts is half of that for their sum.
    assert_eq!(config["router_aux_loss_coef"], 0.005);
    let mut speak = command("generate");
    speak.args(["--prompt", "Tom has", "--max-new-tokens", "4"]);
    speak.arg("--model").arg(&model).ok();

    let wrong = RECIPE.replace("rows = 2", "rowes = 2");
    fs::write(folder.path().join("recipe.toml"), wrong).unwrap();
    let mut call = command("pretrain");
    call.args(["--recipe", "recipe.toml", "--out", "c"]);
    let message = call.current_dir(folder.path()).fails(2);
    assert!(
        message.contains("recipe.toml") && message.contains("rowes"),
        "{message}"
    );
    assert!(!names(folder.path()).contains(&"c".to_owned()));
}
