//! `lightmoe bench methods`: what each method takes to plan and build at a model's true shape, beside
//! one pass over its weights.
//!
//! Layers have the same shape, and methods work layer by layer, so a few layers tell of all.

use super::page::gib;
use super::work::{Rates, Work};
use super::{Cost, copy_model, forget, timed};
use crate::cli::MethodsArgs;
use crate::machine::{max_memory, processor, set_max_memory, today};
use crate::pipeline::{build_stage, plan_stage};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::table::{Section, markdown_table};
use crate::settings::Settings;
use crate::tokens::TokenBatch;
use anyhow::{Context, Result, ensure};
use lightmoe_compress::methods::{MethodName, successor};
use lightmoe_compress::mixture;
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{BuildInputs, ObserveOptions, Statistics, observe};
use lightmoe_models::{Checkpoint, DType, ModelConfig, folder, synthesize};
use rustix::time::{ClockId, clock_gettime};
use std::fs;
use std::path::Path;

/// Tokens of a sample.
const LENGTH: usize = 512;

/// What a method took.
struct Row {
    method: MethodName,
    /// To observe what it wants to know.
    observe: Cost,
    plan: Cost,
    build: Cost,
    /// Seconds of processors for each second of plan and build.
    busy: f64,
    /// Its own arithmetic in plan and build.
    work: Work,
    /// What the machine made of the same, before and behind the build; none where there is none.
    rates: Vec<Rates>,
    /// Bytes of the original, of what was observed, and of the result: what plan and build read and write.
    traffic: u64,
}

impl Row {
    /// The most resident memory of each step, in GiB.
    fn peaks(&self) -> String {
        [self.observe, self.plan, self.build]
            .map(|step| gib(step.peak))
            .join(", ")
    }

    /// Seconds of its own arithmetic alone.
    fn alone(&self) -> f64 {
        let seconds = self.rates.iter().map(|rates| rates.seconds(&self.work));
        seconds.sum::<f64>() / self.rates.len().max(1) as f64
    }
}

/// All that was measured.
struct Methods {
    config: ModelConfig,
    /// Layers of the model that the configuration describes.
    layers: usize,
    args: MethodsArgs,
    bytes: u64,
    /// Bytes that the steps may hold.
    memory: u64,
    copy: Cost,
    rows: Vec<Row>,
}

impl Methods {
    /// The lowest and the highest that was measured, with so many digits.
    fn range(&self, digits: usize, of: fn(&Rates) -> f64) -> String {
        let all = || self.rows.iter().flat_map(|row| &row.rates).map(of);
        let (low, high) = (
            all().fold(f64::INFINITY, f64::min),
            all().fold(0.0, f64::max),
        );
        match low <= high {
            true => format!("{low:.digits$} to {high:.digits$}"),
            false => "unmeasured".to_owned(),
        }
    }

    fn page(&self) -> String {
        let (whole, layers) = (self.layers, self.config.num_layers);
        let args = &self.args;
        let times = match layers == whole {
            true => "the seconds are of the whole model".to_owned(),
            false => format!(
                "the whole model takes {:.0} times as long, the embeddings aside",
                whole as f64 / layers as f64
            ),
        };
        let lead = format!(
            "# The methods at full size\n\nWritten by `cargo xtask bench methods` on {}, {}. {layers} of \
             the {whole} layers of `{}` at their true shape with random bf16 weights ({} GiB), {} \
             tokens observed, as many parameters of experts saved as make {}% of the whole model. Before \
             each step the model leaves the page cache. Methods work layer by layer; {times}. Steps may take \
             {} GiB of memory.\n\nA pass is a copy of the model, {:.1} s. \
             *Own arithmetic* is what the method computes beyond that, at the rate at which this machine \
             does the same alone, on all cores, measured before and behind each build: products, triangular \
             solutions and fits at that of products of the method's shapes ({} GFLOP/s in f32, {} in f64), \
             eigendecompositions at {} s each, those of the hidden size at {} s (in parentheses), \
             assignments of neurons at {} s. Products are counted as whole ones, though of symmetric and \
             triangular matrices build computes a half, and decompositions too, though of few leading vectors \
             build only searches for these. *Bound* is a pass and the own arithmetic, *ratio* is plan \
             and build over it. *Peaks* are the most resident memory of the three steps, without the page cache; *read \
             and written* is the original, what was observed of it for the method, and the result. The search of MoE-I² is not counted. Observing is done once for all \
             methods that want the same statistics. Of the {} steps that the fit of MoBE has, it was given \
             {}, and both times are of these; each is as long as another.\n\n",
            today(),
            processor(),
            self.config.family,
            gib(self.bytes),
            args.tokens,
            100.0 * args.ratio,
            gib(self.memory),
            self.copy.seconds,
            self.range(0, |rates| rates.products[0] / 1e9),
            self.range(0, |rates| rates.products[1] / 1e9),
            self.range(2, |rates| rates.decomposition),
            self.range(2, |rates| rates.wide),
            self.range(3, |rates| rates.assignment),
            mixture::STEPS,
            args.fit_steps,
        );
        let head = [
            "method",
            "observe, s",
            "plan, s",
            "build, s",
            "products, TFLOP",
            "decompositions",
            "assignments",
            "bound, s",
            "ratio",
            "cores busy",
            "peaks, GiB",
            "read and written, GiB",
        ];
        let mut section = Section::new(head);
        for row in &self.rows {
            let bound = self.copy.seconds + row.alone();
            let made = row.plan.seconds + row.build.seconds;
            section.rows.push(vec![
                row.method.to_string(),
                format!("{:.1}", row.observe.seconds),
                format!("{:.1}", row.plan.seconds),
                format!("{:.1}", row.build.seconds),
                format!("{:.2}", row.work.products.iter().sum::<f64>() / 1e12),
                match row.work.wide {
                    0.0 => format!("{:.0}", row.work.decompositions),
                    wide => format!("{:.0} ({wide:.0})", row.work.decompositions),
                },
                format!("{:.0}", row.work.assignments),
                format!("{bound:.1}"),
                format!("{:.2}", made / bound),
                format!("{:.1}", row.busy),
                row.peaks(),
                gib(row.traffic),
            ]);
        }
        lead + &markdown_table(&section)
    }
}

/// Runs the bench and writes the page.
///
/// # Errors
/// What any step brings.
pub fn run(args: MethodsArgs) -> Result<String> {
    let full = ModelConfig::from_file(&args.config)?;
    let mut raw = full.raw.clone();
    raw["num_hidden_layers"] = args.layers.into();
    let config = ModelConfig::from_json(&raw, &args.config)?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make `{}`", args.out.display()))?;
    let model = args.out.join("model");
    let bar = Progress::new("synthesize", config.num_layers);
    let each = &mut |done, all| bar.of(done, all);
    ensure!(
        synthesize(&config, DType::BF16, 0, &model, each)?,
        "interrupted"
    );
    drop(bar);
    let original = Checkpoint::open(&model)?;
    let copy = args.out.join("copy");
    forget(&model)?;
    let (copy_cost, ()) = timed(|| copy_model(&model, &copy))?;
    fs::remove_dir_all(&copy)?;
    let methods: Result<Vec<MethodName>> = match &args.methods {
        Some(names) => {
            let names = names.split(',');
            names.map(|name| Ok(name.trim().parse()?)).collect()
        }
        None => Ok(MethodName::ALL.to_vec()),
    };
    // As large a share of the experts as saves the ratio of the whole model.
    let share = |c: &ModelConfig| {
        let counts = c.parameters();
        counts.routed_experts as f64 / counts.total() as f64
    };
    let ratio = args.ratio * share(&config) / share(&full);
    // What is free changes from step to step, and all are to have the same.
    set_max_memory(max_memory());
    let mut seen: Vec<(Statistics, Cost, Observations)> = Vec::new();
    let mut rows = Vec::new();
    for method in methods.context("in `--methods`")? {
        rows.push(row(method, ratio, &original, &args, &mut seen)?);
    }
    let table = args.table.clone();
    let measured = Methods {
        layers: full.num_layers,
        bytes: original.bytes(),
        memory: max_memory(),
        copy: copy_cost,
        args,
        rows,
        config,
    };
    let text = measured.page();
    folder::write_file(&table, text.as_bytes())?;
    Ok(text)
}

/// One method, on observations that an earlier one may have made.
fn row(
    method: MethodName,
    ratio: f64,
    original: &Checkpoint,
    args: &MethodsArgs,
    seen: &mut Vec<(Statistics, Cost, Observations)>,
) -> Result<Row> {
    let config = original.config();
    let settings = Settings {
        method: Some(method.to_string()),
        ratio: Some(ratio),
        fit_steps: Some(args.fit_steps),
        ..Settings::default()
    };
    let recipe = Recipe::resolve(settings, config)?;
    let statistics = method.statistics();
    let found = seen.iter().position(|(of, ..)| *of == statistics);
    let (observe, observations) = match found.filter(|_| !method.is_sequential()) {
        Some(place) => (seen[place].1, seen[place].2.clone()),
        None => {
            let made = observed(method, original, args, &recipe)?;
            if !method.is_sequential() {
                seen.push((statistics, made.0, made.1.clone()));
            }
            made
        }
    };
    let built = args.out.join("built");
    if built.exists() {
        fs::remove_dir_all(&built)?;
    }
    let path = args.out.join("plan.json");
    let mut processors = processor_seconds();
    forget(original.dir())?;
    let (plan, planned): (Cost, Plan) =
        timed(|| plan_stage(config, Some(original), &observations, &recipe, &path))?;
    let mut busy = processor_seconds() - processors;
    let work = Work::of(config, &planned);
    let measure = || match work.is_none() {
        true => Ok(None),
        false => Rates::measure(config, &planned).map(Some),
    };
    let before = measure()?;
    forget(original.dir())?;
    let inputs = BuildInputs {
        checkpoint: original,
        plan: &planned,
        observations: Some(&observations),
        seed: 0,
    };
    processors = processor_seconds();
    let (build, ()) = timed(|| build_stage(&inputs, &built))?;
    busy += processor_seconds() - processors;
    let beside = observations.moments.as_deref().map(files_in).transpose()?;
    let traffic = original.bytes() + beside.unwrap_or(0) + files_in(&built)?;
    fs::remove_dir_all(&built)?;
    Ok(Row {
        method,
        observe,
        plan,
        build,
        busy: busy / (plan.seconds + build.seconds),
        rates: before.into_iter().chain(measure()?).collect(),
        work,
        traffic,
    })
}

/// Observes what `method` wants to know.
fn observed(
    method: MethodName,
    original: &Checkpoint,
    args: &MethodsArgs,
    recipe: &Recipe,
) -> Result<(Cost, Observations)> {
    let config = original.config();
    let batch = TokenBatch::spread(args.tokens.div_ceil(LENGTH), LENGTH, config.vocab_size);
    let (state, target) = (
        args.out.join("observe"),
        args.out.join(format!("{method}.safetensors")),
    );
    let successor = successor(method, config, recipe.target());
    let options = ObserveOptions {
        fingerprint: method.name(),
        state: &state,
        statistics: method.statistics(),
        answers: &[],
        successor: successor.as_deref(),
        max_memory: max_memory(),
    };
    forget(original.dir())?;
    timed(|| {
        let bar = Progress::new("observe", config.num_layers);
        let samples = batch.samples();
        let seen = observe(original, &samples, &options, &mut |d, all| bar.of(d, all))?;
        Ok(seen.save(&target)?)
    })
}

/// Bytes of the files in a folder.
fn files_in(folder: &Path) -> Result<u64> {
    let sizes = fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len()));
    sizes.sum()
}

/// Seconds that all threads of this process worked.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
