//! `lightmoe compress`: all stages in a row, in one run folder.

use crate::calibration::Calibration;
use crate::contrast::{contrast_rows, contrast_stage};
use crate::divergence::{DIVERGENCE, DivergenceFile, Named, Text, divergence_stage};
use crate::keep::{Keep, Kept, keep_better};
use crate::machine::Environment;
use crate::pipeline::{
    RecoverInputs, build_stage, evaluate_stage, observe_stage, plan_stage, recover_stage,
};
use crate::preflight::{Refused, preflight};
use crate::recipe::Recipe;
use crate::report;
use crate::results::{Bytes, Results, SCHEMA_VERSION, Stage};
use crate::run::{Inputs, Run};
use crate::source::{TaskData, model_fingerprint, open_model};
use crate::verdict::judge;
use anyhow::Result;
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{Parameters, Plan};
use lightmoe_compress::{BuildInputs, Statistics};
use lightmoe_eval::divergence::Swaps;
use lightmoe_models::{Checkpoint, ModelTokenizer};
use lightmoe_train::Folders;
use std::path::{Path, PathBuf};

/// Where it stands which model was kept.
const KEPT: &str = "logs/keep.json";
/// Tokens of a batch on which the predictions of both models are compared: a hidden state for every
/// layer is held.
const DIVERGENCE_BATCH: usize = 2048;
/// Steps between training checkpoints.
pub const CHECKPOINT_EVERY: usize = 50;

/// Runs the pipeline in `out` and returns its results, which are written there too.
///
/// # Errors
/// What any stage brings; what is finished stays, and `resume` goes on behind it.
pub fn compress(recipe: &Recipe, out: &Path, resume: bool) -> Result<Results> {
    let original = open_model(&recipe.model)?;
    let tokenizer = ModelTokenizer::load(original.dir(), original.config().eos_token_id)?;
    let data = TaskData::load(recipe, &tokenizer)?;
    let encoded = data.train.encoded(&tokenizer, recipe.max_length)?;
    let calibration = Calibration::of(recipe, &encoded, &tokenizer, &original)?;
    preflight(recipe, &original, &calibration)?;
    let inputs = inputs(recipe, original.dir())?;
    let fingerprint = crate::fingerprint(&(recipe, &inputs))?;
    let mut run = Run::open(out, recipe, inputs, resume)?;
    let evaluate = |run: &mut Run, stage: Stage, checkpoint: &Checkpoint| {
        run.scored(&format!("evaluate_{}", stage.name()), |run| {
            let samples = run.path(&format!(
                "logs/samples_{}_{}.jsonl",
                data.name,
                stage.name()
            ));
            let length = recipe.max_length;
            let mut scores = evaluate_stage(
                stage.name(),
                checkpoint,
                &data,
                &data.test,
                length,
                Some(&samples),
            )?;
            for task in recipe.also()? {
                let other = TaskData::built_in(task, 0, recipe.eval_examples, recipe.seed);
                let name = format!("{}, {task}", stage.name());
                scores.extend(evaluate_stage(
                    &name,
                    checkpoint,
                    &other,
                    &other.test,
                    length,
                    None,
                )?);
            }
            Ok(Some(scores))
        })
    };

    run.stage("observe", |run| {
        let target = run.path("observations.safetensors");
        let more = Statistics::default();
        observe_stage(&original, &calibration, recipe, more, &fingerprint, &target)
    })?;
    let observations = Observations::load(&run.path("observations.safetensors"))?;
    run.stage("plan", |run| {
        plan_stage(
            original.config(),
            Some(&original),
            &observations,
            recipe,
            &run.path("plan.json"),
        )
        .map(|_| ())
        .map_err(|e| match e.downcast_ref() {
            // What only the observations could tell: a ratio or threshold out of reach.
            Some(lightmoe_compress::Error::Invalid(_)) => Refused::of(e).into(),
            _ => e,
        })
    })?;
    let plan = Plan::load(&run.path("plan.json"))?;
    // Without a recovery, what is built is the result.
    let folder = if recipe.steps == 0 { "model" } else { "built" };
    run.stage("build", |run| {
        let inputs = BuildInputs {
            checkpoint: &original,
            plan: &plan,
            observations: Some(&observations),
            seed: recipe.seed,
        };
        build_stage(&inputs, &run.path(folder))
    })?;
    evaluate(&mut run, Stage::Original, &original)?;
    let built = Checkpoint::open(&run.path(folder))?;
    evaluate(&mut run, Stage::Built, &built)?;
    if recipe.steps > 0 {
        let target = match recipe.keep {
            Keep::Recovered => "model",
            Keep::Better => "recovered",
        };
        run.stage("recover", |run| {
            let inputs = RecoverInputs {
                original: &original,
                built: &built,
                plan: &plan,
                encoded,
                fingerprint: &fingerprint,
                checkpoint_every: CHECKPOINT_EVERY,
            };
            let folders = Folders {
                state: run.path("recovery"),
                logs: run.path("logs"),
            };
            recover_stage(inputs, recipe, &folders, &run.path(target))
        })?;
        if recipe.keep == Keep::Better {
            run.stage("keep", |run| {
                let paths = [folder, target, "model", KEPT].map(|name| run.path(name));
                keep_better(
                    paths.each_ref().map(PathBuf::as_path),
                    &data,
                    recipe.max_length,
                )
            })?;
        }
    }
    let result = Checkpoint::open(&run.path("model"))?;
    if recipe.steps > 0 {
        evaluate(&mut run, Stage::Recovered, &result)?;
    }
    if recipe.contrast_tokens > 0 {
        run.stage("contrast", |run| {
            let target = run.path(report::CONTRAST);
            contrast_stage(&original, &result, &data, recipe, &target)
        })?;
        run.stage("divergence", |run| {
            let named = |name, checkpoint| Named { name, checkpoint };
            let text = Text {
                name: data.name.clone(),
                rows: contrast_rows(&data, &tokenizer, recipe)?,
            };
            divergence_stage(
                named(&recipe.model, &original),
                // By its place in the folder, so that the same run leaves the same bytes elsewhere.
                named("model", &result),
                &[text],
                Swaps::EachLayer,
                DIVERGENCE_BATCH,
                Some(&run.path(DIVERGENCE)),
            )
            .map(drop)
        })?;
    }
    let kept = Kept::load(&run.path(KEPT))?;
    let mut results = results(
        recipe,
        &run,
        &plan,
        &data.name,
        (&original, &result),
        fingerprint,
    );
    results.kept = kept;
    results.divergence = DivergenceFile::of_run(out)?.and_then(|file| file.first());
    results.verdict = judge(&results.measured(), &recipe.verdict)?;
    results.save(&run.path("results.json"))?;
    report::write(out, &report::beside(out), &out.join("report.html"))?;
    remove_training_state(&run.path("recovery"))?;
    Ok(results)
}

/// The folder of a run that names none: `runs/<task>-<method>-<amount>`, with a number behind it when
/// that one is taken. To resume is to take the last such folder.
pub fn default_out(recipe: &Recipe, resume: bool) -> PathBuf {
    let task = match (&recipe.task, &recipe.train) {
        (_, Some(train)) => train.file_stem().map(|s| s.to_string_lossy().into_owned()),
        (task, None) => task.map(|t| t.to_string()),
    };
    let (task, amount) = (task.unwrap_or_default(), recipe.amount());
    let name = format!("{task}-{}-{amount}", recipe.method);
    let number = |i: usize| match i {
        1 => Path::new("runs").join(&name),
        _ => Path::new("runs").join(format!("{name}-{i}")),
    };
    let taken = (1..).take_while(|&i| number(i).exists()).count();
    number(if resume { taken.max(1) } else { taken + 1 })
}

/// What a run depends on besides its recipe.
///
/// # Errors
/// If the model or the records cannot be read.
pub fn inputs(recipe: &Recipe, model: &Path) -> Result<Inputs> {
    let mut texts = Vec::new();
    for path in recipe.train.iter().chain(&recipe.eval_text) {
        texts.push(lightmoe_data::read_text(path)?);
    }
    for (source, _) in recipe.calibrate()?.iter().flat_map(|mix| &mix.0) {
        texts.extend(source.text()?);
    }
    let data = match &texts[..] {
        [] => "built-in".to_owned(),
        [text] => crate::fingerprint(text)?,
        texts => crate::fingerprint(&texts)?,
    };
    Ok(Inputs {
        model: model_fingerprint(model)?,
        data,
        lightmoe: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

fn results(
    recipe: &Recipe,
    run: &Run,
    plan: &Plan,
    task: &str,
    (original, recovered): (&Checkpoint, &Checkpoint),
    fingerprint: String,
) -> Results {
    let stages = run.stages();
    let scores = |stage: Stage| {
        let done = stages.get(&format!("evaluate_{}", stage.name()))?;
        Some((stage, done.scores.clone()?))
    };
    Results {
        schema_version: SCHEMA_VERSION,
        lightmoe_version: env!("CARGO_PKG_VERSION").to_owned(),
        model: recipe.model.clone(),
        task: task.to_owned(),
        method: recipe.method.to_string(),
        seed: recipe.seed,
        ratio: plan.ratio,
        parameters: Parameters {
            trained: if recipe.steps > 0 {
                plan.parameters.trained
            } else {
                0
            },
            ..plan.parameters
        },
        bytes: Bytes {
            before: original.bytes(),
            after: recovered.bytes(),
        },
        stages: Stage::ALL.into_iter().filter_map(scores).collect(),
        seconds: stages
            .iter()
            .map(|(name, done)| (name.clone(), done.seconds))
            .collect(),
        peak_rss_bytes: stages
            .values()
            .map(|d| d.peak_rss_bytes)
            .max()
            .unwrap_or_default(),
        peak_rss_by_stage: stages
            .iter()
            .map(|(n, d)| (n.clone(), d.peak_rss_bytes))
            .collect(),
        kept: None,
        divergence: None,
        verdict: None,
        environment: Some(Environment::here()),
        fingerprint,
    }
}

/// The optimiser's state has served; the model and the curve stay.
fn remove_training_state(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    Ok(())
}
