//! What a run can be made again with: what it was made of, where, and the commands.

use std::path::Path;

use super::table::{Section, bytes_text};
use crate::keep::Keep;
use crate::recipe::Recipe;
use crate::results::Results;
use crate::run::Inputs;

/// What the run depended on and where it ended, in words.
pub(super) fn environment(results: &Results, inputs: Option<&Inputs>) -> Section {
    let mut section = Section::new(["what", "value"]);
    let mut add =
        |what: &str, value: &str| section.rows.push(vec![what.to_owned(), value.to_owned()]);
    add("lightmoe", &results.lightmoe_version);
    if let Some(here) = &results.environment {
        add("commit", here.git_hash.as_deref().unwrap_or("unknown"));
        add("system", &here.system);
        add("processor", &here.processor);
        add("cores", &here.cores.to_string());
        let memory = match here.memory_bytes {
            0 => "unknown".to_owned(),
            bytes => bytes_text(bytes),
        };
        add("memory", &memory);
    }
    add("model", &results.model);
    if let Some(inputs) = inputs {
        add("content of the model", &inputs.model);
        add("content of the data", &inputs.data);
    }
    add("seed", &results.seed.to_string());
    add("fingerprint of the run", &results.fingerprint);
    section
}

/// The commands that make the run in the folder `run` again: all at once, and stage by stage.
pub(super) fn commands(run: &Path, results: &Results, recipe: &Recipe) -> Vec<Vec<String>> {
    let at = |name: &str| quoted(&run.join(name).to_string_lossy());
    let beside = |suffix: &str| {
        let mut folder = run.file_name().unwrap_or_default().to_owned();
        folder.push(suffix);
        run.with_file_name(folder)
    };
    let stage = |name: &str| quoted(&beside("-stages").join(name).to_string_lossy());
    let recipe_file = at("recipe.toml");
    let mut all = Vec::new();
    let commit = results
        .environment
        .as_ref()
        .and_then(|e| e.git_hash.as_ref());
    // What was not committed cannot be had again.
    if let Some(commit) = commit.filter(|commit| !commit.ends_with("-dirty")) {
        all.push(vec![
            format!("git checkout {commit}"),
            "cargo build --release".to_owned(),
        ]);
    }
    let out = quoted(&beside("-again").to_string_lossy());
    all.push(vec![format!(
        "lightmoe compress --recipe {recipe_file} --out {out}"
    )]);
    // Which of two models is kept is no stage that can be called by itself.
    if recipe.keep == Keep::Recovered || recipe.steps == 0 {
        let built = stage(if recipe.steps == 0 { "model" } else { "built" });
        let (seen, plan) = (stage("observations.safetensors"), stage("plan.json"));
        let (model, seed) = (quoted(&recipe.model), recipe.seed);
        let mut stages = vec![
            format!("lightmoe observe --recipe {recipe_file} --out {seen}"),
            format!("lightmoe plan --recipe {recipe_file} --observations {seen} --out {plan}"),
            format!(
                "lightmoe build --model {model} --plan {plan} --observations {seen} --seed {seed} \
                 --out {built}"
            ),
        ];
        let result = stage("model");
        if recipe.steps > 0 {
            stages.push(format!(
                "lightmoe recover --recipe {recipe_file} --built {built} --plan {plan} --out {result}"
            ));
        }
        stages.push(format!(
            "lightmoe evaluate --recipe {recipe_file} --model {result}"
        ));
        all.push(stages);
    }
    all
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    // Only a zero byte cannot be quoted, and no path has one.
    shlex::try_quote(word).map_or_else(|_| word.to_owned(), |quoted| quoted.into_owned())
}
