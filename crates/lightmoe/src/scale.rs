//! `lightmoe bench scale`: a model of full size through observe, plan and build, with what each
//! costs in seconds and memory, beside what the same machine can do: one large dense product of
//! candle, and a plain copy.

pub mod methods;
mod page;
mod work;

use crate::cli::ScaleArgs;
use crate::machine::{max_memory, peak, reset_peak, set_max_memory};
use crate::pipeline::{build_stage, load_model, plan_stage};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::settings::Settings;
use crate::tokens::TokenBatch;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{BuildInputs, ObserveOptions, Observed, Statistics, observe};
use lightmoe_models::{Checkpoint, GenerateOptions, ModelConfig, folder, generate, synthesize};
use rustix::fs::{Advice, fadvise};
use std::fs::{self, File};
use std::path::Path;
use std::time::Instant;

/// Memory that the stages may use, unless the user says otherwise.
const MEMORY: u64 = 3 << 30;
/// Tokens of a sample.
const LENGTH: usize = 512;
/// Tokens that the compressed model generates.
const NEW_TOKENS: usize = 2;
/// Side of the dense product.
const SIDE: usize = 4096;
/// How long the dense product is timed before observe, and again after it: about a layer's time,
/// because a processor that has rested is faster for a moment.
const DENSE_SECONDS: f64 = 6.0;

/// What one step cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    /// Highest resident memory, in bytes.
    peak: u64,
}

/// All that was measured.
struct Measured {
    config: ModelConfig,
    tokens: usize,
    memory: u64,
    /// Bytes of the original and of the compressed model.
    bytes: [u64; 2],
    parameters: [u64; 2],
    dense_flops: f64,
    synthesize: Option<Cost>,
    copy: Cost,
    observe: Cost,
    read_seconds: f64,
    compute_seconds: f64,
    plan: Cost,
    build: Cost,
    /// Per token, reading every layer.
    generate: Cost,
}

/// Runs the bench and writes the page.
///
/// # Errors
/// What any step brings; models that were made stay and are used by the next run.
pub fn run(args: ScaleArgs) -> Result<String> {
    set_max_memory(MEMORY);
    let config = ModelConfig::from_file(&args.config)?;
    let folder = &args.out;
    fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let (model, built) = (folder.join("model"), folder.join("built"));
    let facts = |c: &ModelConfig| ModelConfig {
        raw: serde_json::Value::Null,
        fp8_block: None,
        ..c.clone()
    };
    let same = Checkpoint::open(&model).is_ok_and(|c| facts(c.config()) == facts(&config));
    let made = (!same).then(|| {
        timed(|| {
            let bar = Progress::new("synthesize", config.num_layers);
            let each = &mut |done, all| bar.of(done, all);
            let whole = synthesize(&config, DType::BF16, 0, &model, each)?;
            ensure!(whole, "interrupted");
            Ok(())
        })
    });
    let synthesize = made.transpose()?.map(|(cost, ())| cost);
    let original = Checkpoint::open(&model)?;

    // Of an interrupted run: what is measured is measured whole.
    let (state, unfinished) = (folder.join("observe"), folder.join(".built.partial"));
    for left in [&state, &unfinished, &built] {
        if left.exists() {
            fs::remove_dir_all(left)?;
        }
    }
    let before = dense_products()?;
    let batch = TokenBatch::spread(args.tokens.div_ceil(LENGTH), LENGTH, config.vocab_size);
    let options = ObserveOptions {
        fingerprint: "scale",
        state: &state,
        statistics: Statistics::default(),
        answers: &[],
        successor: None,
        max_memory: max_memory(),
    };
    forget(&model)?;
    let (observe_cost, observed): (Cost, Observed) = timed(|| {
        let bar = Progress::new("observe", config.num_layers);
        let samples = batch.samples();
        Ok(observe(&original, &samples, &options, &mut |d, all| {
            bar.of(d, all)
        })?)
    })?;
    let after = dense_products()?;
    let products = (before.0 + after.0) as f64;
    let dense_flops = products * 2.0 * (SIDE as f64).powi(3) / (before.1 + after.1);
    let recipe = Recipe::resolve(Settings::default(), &config)?;
    let path = folder.join("plan.json");
    let (plan_cost, plan): (Cost, Plan) = timed(|| {
        plan_stage(
            &config,
            Some(&original),
            &observed.observations,
            &recipe,
            &path,
        )
    })?;

    let copy = folder.join("copy");
    forget(&model)?;
    let (copy_cost, ()) = timed(|| copy_model(&model, &copy))?;
    fs::remove_dir_all(&copy)?;
    forget(&model)?;
    let inputs = BuildInputs {
        checkpoint: &original,
        plan: &plan,
        observations: Some(&observed.observations),
        seed: 0,
    };
    let (build_cost, ()) = timed(|| build_stage(&inputs, &built))?;

    forget(&built)?;
    let compressed = Checkpoint::open(&built)?;
    let (bytes, parameters) = (
        [original.bytes(), compressed.bytes()],
        [original.parameters(), compressed.parameters()],
    );
    let (generate_cost, ()) = timed(|| generate_some(&compressed))?;
    let measured = Measured {
        tokens: batch.ids.len(),
        memory: max_memory(),
        bytes,
        parameters,
        dense_flops,
        synthesize,
        copy: copy_cost,
        observe: observe_cost,
        read_seconds: observed.read.as_secs_f64(),
        compute_seconds: observed.compute.as_secs_f64(),
        plan: plan_cost,
        build: build_cost,
        generate: Cost {
            seconds: generate_cost.seconds / NEW_TOKENS as f64,
            ..generate_cost
        },
        config,
    };
    fs::remove_dir_all(&state)?;
    let page = page::render(&measured)?;
    folder::write_file(&args.table, page.as_bytes())?;
    Ok(page)
}

/// Runs a step with its own peak of memory.
fn timed<T>(step: impl FnOnce() -> Result<T>) -> Result<(Cost, T)> {
    reset_peak();
    let begin = Instant::now();
    let out = step()?;
    let cost = Cost {
        seconds: begin.elapsed().as_secs_f64(),
        peak: peak(),
    };
    Ok((cost, out))
}

/// Dense products of candle in f32, one after the other for [`DENSE_SECONDS`]: how many, and the
/// seconds they took.
fn dense_products() -> Result<(usize, f64)> {
    let matrix = || Tensor::rand(-1f32, 1f32, (SIDE, SIDE), &Device::Cpu);
    let (x, w) = (matrix()?, matrix()?);
    x.matmul(&w)?;
    let (begin, mut count) = (Instant::now(), 0);
    while begin.elapsed().as_secs_f64() < DENSE_SECONDS {
        x.matmul(&w)?;
        count += 1;
    }
    Ok((count, begin.elapsed().as_secs_f64()))
}

/// The files of a model, copied and made durable as a build is.
fn copy_model(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        fs::copy(&path, &target)?;
        File::open(&target)?.sync_all()?;
    }
    Ok(())
}

/// Takes a model's files out of the page cache, so that the next step reads the disk.
fn forget(model: &Path) -> Result<()> {
    for entry in fs::read_dir(model)? {
        let file = File::open(entry?.path())?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Loads the compressed model as the limit allows and continues some ids.
fn generate_some(compressed: &Checkpoint) -> Result<()> {
    let model = load_model(compressed)?;
    let prompt = TokenBatch::spread(1, 16, model.config().vocab_size).ids;
    let options = GenerateOptions::greedy(NEW_TOKENS, Vec::new());
    let new = generate(&*model, &[prompt], &options, &mut |_| true)?;
    ensure!(
        new[0].len() == NEW_TOKENS,
        "the compressed model generated {new:?}"
    );
    Ok(())
}
