//! What can be known before anything is spent: whether a recipe can work, and what it will leave.

use crate::calibration::Calibration;
use crate::recipe::Recipe;
use lightmoe_compress::methods::{Kind, MethodName, Target};
use lightmoe_compress::size::{adapter_parameters, scale_parameters};
use lightmoe_compress::{Estimate, estimate};
use lightmoe_models::{BankLayout, Checkpoint, ModelConfig};
use serde::Serialize;

/// A request that cannot be met whatever happens; the program exits with code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

impl Refused {
    /// Makes a refusal of any error, its causes in one line.
    pub fn of(error: impl Into<anyhow::Error>) -> Self {
        Self(format!("{:#}", error.into()))
    }
}

/// What `--dry-run` says.
#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    /// The method.
    pub method: MethodName,
    /// Layers with experts.
    pub moe_layers: usize,
    /// Experts of a layer.
    pub experts_per_layer: usize,
    /// Experts to replace in a layer, on average; unknown for a threshold before observing.
    pub experts_replaced_per_layer: Option<f64>,
    /// Parameters of the original.
    pub parameters_before: u64,
    /// Parameters of the result.
    pub parameters_after: Option<u64>,
    /// Parameters that recovery trains.
    pub parameters_trained: Option<u64>,
    /// Bytes of the original's weights.
    pub bytes_before: u64,
    /// Bytes of the result's weights.
    pub bytes_after: Option<u64>,
    /// Tokens to observe.
    pub calibration_tokens: usize,
}

/// Checks that a recipe can work for a model and what it is observed on.
///
/// # Errors
/// [`Refused`], in one line: a rank or ratio that cannot be had.
pub fn preflight(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    found: &Calibration,
) -> Result<Forecast, Refused> {
    check_original(checkpoint)?;
    let size = checkpoint.dtype().size_in_bytes() as u64;
    Ok(Forecast {
        bytes_before: checkpoint.bytes(),
        ..forecast(recipe, checkpoint.config(), size, found.tokens())?
    })
}

/// What a recipe would leave of a model, from its configuration alone.
///
/// # Errors
/// [`Refused`], in one line: a rank or ratio that cannot be had.
pub fn forecast(
    recipe: &Recipe,
    config: &ModelConfig,
    bytes_per_parameter: u64,
    calibration_tokens: usize,
) -> Result<Forecast, Refused> {
    let estimate = estimate_of(recipe, config).map_err(Refused::of)?;
    let (replaced, parameters_after, trained) = match recipe.method.kind() {
        Kind::Keep => {
            let experts = (config.moe.num_experts * config.num_moe_layers()) as u64;
            let adapters = experts * adapter_parameters(config, recipe.rank);
            let scales = match recipe.method {
                MethodName::Compressed => experts * scale_parameters(config),
                _ => 0,
            };
            let total = config.parameters().total() + scales;
            (Some(0.0), Some(total), Some(adapters + scales))
        }
        _ => (
            estimate.map(|e| e.experts_replaced_per_layer),
            estimate.map(|e| e.parameters_after),
            estimate.map(|e| e.parameters_trained),
        ),
    };
    Ok(Forecast {
        method: recipe.method,
        moe_layers: config.num_moe_layers(),
        experts_per_layer: config.moe.num_experts,
        experts_replaced_per_layer: replaced,
        parameters_before: config.parameters().total(),
        parameters_after,
        parameters_trained: trained,
        bytes_before: config.parameters().total() * bytes_per_parameter,
        bytes_after: parameters_after.map(|p| p * bytes_per_parameter),
        calibration_tokens,
    })
}

/// Checks that a model is whole: one that is compressed already has no experts to replace or to
/// anneal from.
///
/// # Errors
/// [`Refused`], naming the folder.
pub fn check_original(checkpoint: &Checkpoint) -> Result<(), Refused> {
    match *checkpoint.layout() == BankLayout::dense(checkpoint.config()) {
        true => Ok(()),
        false => Err(Refused(format!(
            "`{}` is compressed already; give the original model, or its dense export",
            checkpoint.dir().display()
        ))),
    }
}

/// `None` where nothing can be said before observing.
fn estimate_of(
    recipe: &Recipe,
    config: &ModelConfig,
) -> lightmoe_compress::Result<Option<Estimate>> {
    let options = recipe.plan_options();
    options.check_method(recipe.method, config)?;
    options.check(config)?;
    match (recipe.method, recipe.target()) {
        (method, _) if method.kind() == Kind::Keep => Ok(None),
        // What concerns the options alone is known even so.
        (_, Target::Threshold(_)) => options.check_replacing(config).map(|()| None),
        (_, Target::Damage(_)) => Ok(None),
        (method, target) => {
            let ratio = target.ratio(config).unwrap_or_default();
            estimate(config, ratio, method, &options).map(Some)
        }
    }
}

impl std::fmt::Display for Forecast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unknown = || "known after observing".to_owned();
        let count = |v: Option<u64>| v.map_or_else(unknown, |v| v.to_string());
        let mib = |v: u64| format!("{:.1} MiB", v as f64 / f64::from(1 << 20));
        writeln!(f, "method               {}", self.method)?;
        writeln!(f, "layers with experts  {}", self.moe_layers)?;
        let replaced = self
            .experts_replaced_per_layer
            .map_or_else(unknown, |r| format!("{r:.1}"));
        writeln!(
            f,
            "experts replaced     {replaced} of {} a layer",
            self.experts_per_layer
        )?;
        let after = count(self.parameters_after);
        writeln!(
            f,
            "parameters           {} → {after}",
            self.parameters_before
        )?;
        writeln!(f, "parameters trained   {}", count(self.parameters_trained))?;
        let after = self.bytes_after.map_or_else(unknown, mib);
        writeln!(
            f,
            "bytes                {} → {after}",
            mib(self.bytes_before)
        )?;
        write!(f, "tokens to observe    {}", self.calibration_tokens)
    }
}
