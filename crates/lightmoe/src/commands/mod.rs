//! One function a subcommand; they return what is to be printed.

mod chat;
mod divergence;
mod evaluate;
mod model;
mod report;
mod update;

pub use chat::run_chat;
pub use divergence::run_divergence;
pub use evaluate::run_evaluate;
pub use model::{run_generate, run_inspect, run_logits, run_synthesize};
pub use report::run_report;
pub use update::run_unpack;

use crate::calibration::Calibration;
use crate::cli::{
    BuildArgs, CompressArgs, ExportArgs, ObserveArgs, Pack, Packing, PlanArgs, PretrainArgs,
    RecipeArgs, RecoverArgs,
};
use crate::compress::{CHECKPOINT_EVERY, compress, default_out, inputs};
use crate::device;
use crate::pipeline::{
    Observing, RecoverInputs, build_stage, observe_samples, observe_stage, plan_stage,
    recover_stage,
};
use crate::preflight::{Forecast, Refused, forecast, preflight};
use crate::pretrain::{PretrainRecipe, pretrain};
use crate::recipe::Recipe;
use crate::report::table;
use crate::settings::Settings;
use crate::source::{BUILT_IN, TaskData, model_fingerprint, model_folder, open_model};
use crate::tokens::TokenBatch;
use anyhow::{Context, Result, anyhow};
use lightmoe_compress::methods::{Kind, MethodName};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{BuildInputs, Statistics};
use lightmoe_export::{Card, ExportKind, ExportOptions, export};
use lightmoe_models::hub::Want;
use lightmoe_models::{BankLayout, Checkpoint, DType, ExpertPacking, ModelConfig, ModelTokenizer};
use lightmoe_train::Folders;
use std::io::IsTerminal;
use std::path::Path;

/// What the user set; models run where it says from here on.
fn settings(args: RecipeArgs) -> Result<Settings> {
    let file = args
        .recipe
        .map(|path| Settings::load(&path))
        .transpose()
        .map_err(Refused::of)?;
    let settings = args.settings.or(file.unwrap_or_default());
    let or_auto = |name: &Option<String>| name.clone().unwrap_or_else(|| "auto".to_owned());
    device::choose(&or_auto(&settings.device), &or_auto(&settings.dtype))?;
    Ok(settings)
}

/// How standard output takes colours.
fn paint() -> table::Paint {
    match std::io::stdout().is_terminal() {
        true => table::coloured,
        false => table::plain,
    }
}

/// The model, recipe, tokenizer and data that most stages begin with.
struct Opened {
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: ModelTokenizer,
    data: TaskData,
}

impl Opened {
    fn new(args: RecipeArgs) -> Result<Self> {
        let settings = settings(args)?;
        let checkpoint = open_model(settings.model.as_deref().unwrap_or(BUILT_IN))?;
        let recipe = Recipe::resolve(settings, checkpoint.config()).map_err(Refused::of)?;
        let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
        let data = TaskData::load(&recipe, &tokenizer)?;
        Ok(Self {
            recipe,
            checkpoint,
            tokenizer,
            data,
        })
    }

    fn encoded(&self) -> Result<Vec<lightmoe_data::Encoded>> {
        let length = self.recipe.max_length;
        self.data.train.encoded(&self.tokenizer, length)
    }

    fn calibration(&self) -> Result<Calibration> {
        let encoded = self.encoded()?;
        Calibration::of(&self.recipe, &encoded, &self.tokenizer, &self.checkpoint)
    }

    fn fingerprint(&self) -> Result<String> {
        crate::fingerprint(&(&self.recipe, inputs(&self.recipe, self.checkpoint.dir())?))
    }
}

/// `compress`
///
/// # Errors
/// What the pipeline brings.
pub fn run_compress(args: CompressArgs) -> Result<String> {
    let shown = |forecast: Forecast| {
        Ok(match args.json {
            true => serde_json::to_string_pretty(&forecast)?,
            false => forecast.to_string(),
        })
    };
    if let Some(path) = &args.config {
        let config = ModelConfig::from_file(path)?;
        if BankLayout::of(&config, path)? != BankLayout::dense(&config) {
            let message = format!(
                "`{}` is of a compressed model; give the original's",
                path.display()
            );
            return Err(Refused(message).into());
        }
        let recipe = Recipe::resolve(settings(args.recipe)?, &config).map_err(Refused::of)?;
        let size = config.file_dtype().size_in_bytes() as u64;
        return shown(forecast(&recipe, &config, size, recipe.calibration_tokens)?);
    }
    let opened = Opened::new(args.recipe)?;
    if args.dry_run {
        let (recipe, checkpoint) = (&opened.recipe, &opened.checkpoint);
        return shown(preflight(recipe, checkpoint, &opened.calibration()?)?);
    }
    let out = args
        .out
        .unwrap_or_else(|| default_out(&opened.recipe, args.resume));
    let results = compress(&opened.recipe, &out, args.resume)?;
    if args.json {
        return results.to_json();
    }
    let table = table::terminal(&results, paint());
    Ok(format!(
        "{table}\n\nmodel   {}\nreport  {}",
        out.join("model").display(),
        out.join("report.html").display()
    ))
}

/// `observe`
///
/// # Errors
/// What the stage brings.
pub fn run_observe(args: ObserveArgs) -> Result<String> {
    let more = Statistics {
        moments: args.moments,
        all_outputs: args.all_outputs,
        samples: args.samples,
        damage: args.damage,
        // A recipe says it by itself.
        bias: false,
    };
    if let Some(path) = &args.tokens {
        let settings = settings(args.recipe)?;
        let checkpoint = open_model(settings.model.as_deref().unwrap_or(BUILT_IN))?;
        let batch = TokenBatch::load(path, checkpoint.config().vocab_size)?;
        let fingerprint = crate::fingerprint(&(&batch, model_fingerprint(checkpoint.dir())?))?;
        let samples = batch.samples();
        let bias = settings.bias.unwrap_or(false);
        let what = Observing {
            statistics: Statistics { bias, ..more },
            ..Observing::default()
        };
        observe_samples(&checkpoint, &samples, &what, &fingerprint, &args.out)?;
    } else {
        let opened = Opened::new(args.recipe)?;
        let (found, fingerprint) = (opened.calibration()?, opened.fingerprint()?);
        let (checkpoint, recipe) = (&opened.checkpoint, &opened.recipe);
        observe_stage(checkpoint, &found, recipe, more, &fingerprint, &args.out)?;
    }
    Ok(format!("observations  {}", args.out.display()))
}

/// `plan`
///
/// # Errors
/// What the stage brings.
pub fn run_plan(args: PlanArgs) -> Result<String> {
    let settings = settings(args.recipe)?;
    let config = match &args.config {
        Some(path) => ModelConfig::from_file(path)?,
        None => {
            let model = settings.model.as_deref().unwrap_or(BUILT_IN);
            ModelConfig::from_file(&model_folder(model, Want::ConfigOnly)?.join("config.json"))?
        }
    };
    let method = settings.method.as_deref().map(str::parse::<MethodName>);
    let keeps = matches!(method, Some(Ok(method)) if method.kind() == Kind::Keep);
    if settings.amounts() == 0 && !keeps {
        let message =
            "how much to save? give `--ratio`, `--bytes`, `--threshold` or `--max-damage`";
        return Err(Refused(message.into()).into());
    }
    let recipe = Recipe::resolve(settings, &config).map_err(Refused::of)?;
    let observations = match (&args.observations, &args.scores) {
        (Some(path), _) => Observations::load(path)?,
        (None, Some(path)) => Observations::from_scores(path, &config)?,
        (None, None) => return Err(anyhow!("give `--observations` or `--scores`")),
    };
    let weights = match args.config {
        None if recipe.plans_by_weights() => Some(open_model(&recipe.model)?),
        _ => None,
    };
    let plan = plan_stage(&config, weights.as_ref(), &observations, &recipe, &args.out)
        .map_err(Refused::of)?;
    let totals = serde_json::json!({
        "method": plan.method,
        "p_hat": plan.p_hat,
        "ratio": plan.ratio,
        "parameters": plan.parameters,
        "experts_replaced_per_layer": plan.mean_replaced(),
        "damage": plan.damage.as_ref().map(|damage| serde_json::json!({
            "sensitivity": damage.sensitivity,
            "bytes": damage.bytes,
            "predicted": damage.predicted,
        })),
    });
    let expected = plan.damage.as_ref().map(|damage| {
        format!(
            "\n{} bytes, expected to cost {:.2e} {}",
            damage.bytes,
            damage.predicted,
            damage.sensitivity.unit()
        )
    });
    Ok(match args.json {
        true => serde_json::to_string_pretty(&totals)?,
        false => format!(
            "plan  {}\n{:.1} of {} experts a layer replaced, {} → {} parameters ({:.1}% saved){}",
            args.out.display(),
            plan.mean_replaced(),
            plan.model.num_experts,
            plan.parameters.before,
            plan.parameters.after,
            100.0 * plan.ratio.achieved,
            expected.unwrap_or_default()
        ),
    })
}

/// `build`
///
/// # Errors
/// What the stage brings.
pub fn run_build(args: BuildArgs) -> Result<String> {
    let original = open_model(&args.model)?;
    let observations = args.observations.as_deref().map(Observations::load);
    let observations = observations.transpose()?;
    let inputs = BuildInputs {
        checkpoint: &original,
        plan: &Plan::load(&args.plan)?,
        observations: observations.as_ref(),
        seed: args.seed,
    };
    build_stage(&inputs, &args.out)?;
    Ok(format!("model  {}", args.out.display()))
}

/// `recover`
///
/// # Errors
/// What the stage brings.
pub fn run_recover(args: RecoverArgs) -> Result<String> {
    let opened = Opened::new(args.recipe)?;
    if opened.recipe.steps == 0 {
        return Err(
            Refused("`steps` is 0, so nothing would be recovered; give at least 1".into()).into(),
        );
    }
    let mut name = args.out.file_name().unwrap_or_default().to_owned();
    name.push(".recovery");
    let beside = args.out.with_file_name(name);
    let plan = Plan::load(&args.plan)?;
    let inputs = RecoverInputs {
        original: &opened.checkpoint,
        built: &Checkpoint::open(&args.built)?,
        plan: &plan,
        encoded: opened.encoded()?,
        fingerprint: &crate::fingerprint(&(opened.fingerprint()?, &plan))?,
        checkpoint_every: CHECKPOINT_EVERY,
    };
    let folders = Folders {
        state: beside.clone(),
        logs: beside,
    };
    recover_stage(inputs, &opened.recipe, &folders, &args.out)?;
    Ok(format!("model  {}", args.out.display()))
}

/// An element type of files; `None` for the model's own.
fn dtype(name: &str) -> Result<Option<DType>> {
    match name {
        "auto" => Ok(None),
        "f32" => Ok(Some(DType::F32)),
        "bf16" => Ok(Some(DType::BF16)),
        "f16" => Ok(Some(DType::F16)),
        other => Err(Refused(format!("dtype `{other}`; use auto, f32, bf16 or f16")).into()),
    }
}

/// `export`
///
/// # Errors
/// What the export brings.
pub fn run_export(args: ExportArgs) -> Result<String> {
    if let Some(Pack::Compeft) = args.pack {
        return update::pack(args);
    }
    let kind: ExportKind = args.kind.parse().map_err(Refused::of)?;
    let dtype = dtype(&args.dtype)?;
    // A run folder holds the model beside its recipe and results; a model folder stands alone.
    let folder = Path::new(&args.model);
    let of_run = folder.join("model");
    let (source, run) = match of_run.is_dir() {
        true => (Checkpoint::open(&of_run)?, folder),
        false => (
            open_model(&args.model)?,
            folder.parent().unwrap_or(Path::new(".")),
        ),
    };
    let results = crate::results::Results::load(&run.join("results.json")).ok();
    let card = Card {
        base_model: results
            .as_ref()
            .map_or("unknown".into(), |r| r.model.clone()),
        method: results
            .as_ref()
            .map_or("unknown".into(), |r| r.method.clone()),
        recipe_toml: std::fs::read_to_string(run.join("recipe.toml")).unwrap_or_default(),
        table_markdown: results.as_ref().map(table::markdown).unwrap_or_default(),
    };
    let bar = crate::progress::Progress::new("export", source.config().num_layers);
    let report = export(
        &source,
        &args.out,
        &ExportOptions {
            kind,
            dtype,
            packing: match args.experts {
                Packing::Auto => None,
                Packing::Separate => Some(ExpertPacking::Separate),
                Packing::Fused => Some(ExpertPacking::Fused),
            },
        },
        &card,
        &mut |d, all| bar.of(d, all),
    )?;
    Ok(format!(
        "{} export  {}\n{} parameters, {} bytes",
        report.kind,
        args.out.display(),
        report.parameters,
        report.bytes
    ))
}

/// `pretrain`
///
/// # Errors
/// What the training brings.
pub fn run_pretrain(args: PretrainArgs) -> Result<String> {
    device::choose(&args.device, "f32")?;
    let mut recipe = PretrainRecipe::load(&args.recipe).map_err(Refused::of)?;
    recipe.out = args.out.unwrap_or(recipe.out);
    let loss = pretrain(&recipe).context("pre-training")?;
    Ok(format!(
        "model  {}\nlast training loss {loss:.4}",
        recipe.out.display()
    ))
}
