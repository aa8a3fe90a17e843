//! Compressed Experts (arXiv 2503.00634): fewer experts run for a token. Of those the router chooses,
//! the best few are its main experts; the others only scale what these compute with, by vectors that
//! recovery learns from all ones. It saves active parameters, and stores a few more than the original.
//!
//! The paper's text has one vector an expert, its code three, one for the input of each projection; this
//! follows the code. Gates of main experts stay as they are. The paper fine-tunes all weights with the
//! vectors; here adapters on the experts train with them, on the budget of all methods.

use lightmoe_models::config::ModelConfig;

use super::{MethodName, PlanOptions, finish};
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan};
use crate::{Error, Result};

/// How many of the chosen experts run.
///
/// # Errors
/// [`Error::Invalid`] if that is none, or all.
pub(super) fn main_experts(config: &ModelConfig, options: &PlanOptions) -> Result<usize> {
    let top_k = config.moe.top_k;
    let main = options.main_experts.unwrap_or(top_k / 2);
    match (1..top_k).contains(&main) {
        true => Ok(main),
        false => Err(Error::Invalid(format!(
            "{main} main experts of the {top_k} that a token chooses; give `main_experts` from 1 to \
             {}, or use another method where a token chooses one",
            top_k.saturating_sub(1)
        ))),
    }
}

/// Plans that `options.main_experts` of the chosen experts run, half of them by default.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    options: &PlanOptions,
) -> Result<Plan> {
    let main = main_experts(config, options)?;
    let layers = observations.layers.iter();
    let layers = layers.map(|observed| LayerPlan {
        main: Some(main),
        ..LayerPlan::dense(observed, &observed.importance())
    });
    let settings = PlanOptions {
        groups: 0,
        ..*options
    }
    .settings();
    Ok(finish(
        config,
        MethodName::Compressed,
        settings,
        layers.collect(),
    ))
}
