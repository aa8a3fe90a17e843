//! What a ratio will cost, before anything was observed.

use lightmoe_models::config::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::methods::{Kind, MethodName, PlanOptions, check_ratio, mcsmoe, mobe};
use crate::size::adapter_parameters;
use crate::{Error, Result};

/// A forecast in which every layer replaces the same number of experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Experts replaced in a layer; not whole, since layers will differ.
    pub experts_replaced_per_layer: f64,
    /// Experts of a layer.
    pub experts_per_layer: usize,
    /// Layers with experts.
    pub moe_layers: usize,
    /// Parameters of the original model.
    pub parameters_before: u64,
    /// Parameters of the exported model.
    pub parameters_after: u64,
    /// Parameters trained during recovery.
    pub parameters_trained: u64,
    /// Bytes that one parameter takes in the checkpoint, by its stored type.
    pub bytes_per_parameter: u64,
    /// Bytes of the original weights.
    pub bytes_before: u64,
    /// Bytes of the exported weights.
    pub bytes_after: u64,
}

/// Forecasts the outcome of saving the share `ratio` of all parameters by `method` with `options`; 0
/// groups means adapters without bases. What trains is, for methods that neither replace nor keep, as
/// much as adapters of the rank on all experts, but for rounding; `mcsmoe` trains all that is left, and so
/// does `budget` unless a rank is given.
///
/// # Errors
/// [`Error::Invalid`] if the options cannot work for the model, or saying what can be reached if the
/// ratio cannot.
pub fn estimate(
    config: &ModelConfig,
    ratio: f64,
    method: MethodName,
    options: &PlanOptions,
) -> Result<Estimate> {
    check_ratio(ratio)?;
    if method.kind() == Kind::Replace {
        options.check_replacing(config)?;
        return forecast(config, ratio, options);
    }
    if method == MethodName::Mobe {
        mobe::Shape::of(config, ratio)?;
    }
    let adapters = (config.moe.num_experts * config.num_moe_layers()) as u64;
    let trained = match method {
        MethodName::Mcsmoe => mcsmoe::Shape::of(config, ratio)?.trained(config),
        MethodName::Budget if options.trained_rank.unwrap_or(0) == 0 => {
            let counts = config.parameters();
            let saved = (ratio * counts.total() as f64).round() as u64;
            counts.routed_experts.saturating_sub(saved)
        }
        MethodName::Budget | MethodName::Svd | MethodName::D2moe | MethodName::Moei2 => {
            adapters * adapter_parameters(config, options.trained_rank.unwrap_or(options.rank))
        }
        _ => adapters * adapter_parameters(config, options.rank),
    };
    let whole = PlanOptions {
        rank: 0,
        groups: 0,
        ..*options
    };
    let dropped = forecast(config, ratio, &whole)?;
    let experts = config.moe.num_experts;
    let left = experts as f64 - dropped.experts_replaced_per_layer;
    // A constant or a merged expert may be chosen like any other; what is gone may not.
    let gone = method.kind() == Kind::Drop && method != MethodName::Mone;
    if (gone || method == MethodName::Ream) && left < config.moe.top_k as f64 {
        return Err(Error::Invalid(format!(
            "a ratio of {ratio} leaves {left:.1} experts a layer, and a token chooses {}; choose a \
             lower ratio",
            config.moe.top_k
        )));
    }
    Ok(Estimate {
        experts_replaced_per_layer: match method.kind() {
            Kind::Factorise => experts as f64,
            _ => dropped.experts_replaced_per_layer,
        },
        parameters_trained: trained,
        ..dropped
    })
}

fn forecast(config: &ModelConfig, ratio: f64, options: &PlanOptions) -> Result<Estimate> {
    let before = config.parameters().total();
    let experts = config.moe.num_experts;
    let moe_layers = config.num_moe_layers();
    let bases = (options.groups as u64 * config.expert_parameters()) as f64;
    let adapter = adapter_parameters(config, options.rank);
    let gain = (config.expert_parameters() - adapter) as f64;
    let saved_per_layer = ratio * before as f64 / moe_layers as f64;
    let replaced = (saved_per_layer + bases) / gain;
    if replaced > experts as f64 {
        let most = (experts as f64 * gain - bases) * moe_layers as f64 / before as f64;
        return Err(Error::Invalid(format!(
            "a ratio of {ratio} cannot be reached, only up to {:.4} of all parameters; choose a \
             lower ratio, or lower `rank` or `groups`",
            most.max(0.0)
        )));
    }
    let trained_per_layer = bases as u64 + experts as u64 * adapter;
    let after = ((1.0 - ratio) * before as f64).round() as u64;
    let bytes_per_parameter = config.file_dtype().size_in_bytes() as u64;
    Ok(Estimate {
        experts_replaced_per_layer: replaced,
        experts_per_layer: experts,
        moe_layers,
        parameters_before: before,
        parameters_after: after,
        parameters_trained: trained_per_layer * moe_layers as u64,
        bytes_per_parameter,
        bytes_before: before * bytes_per_parameter,
        bytes_after: after * bytes_per_parameter,
    })
}
