//! The byte-budget planner: every expert of every layer takes the form that costs the model least for
//! its bytes, by what errors were [observed to cost](crate::damage). Beyond the paper of LightMoE.
//!
//! The menu of an expert: its own matrices; factors of one rank, fitted to that cost, for all three; the
//! mean of its outputs. Nothing but the observations is asked, so another budget takes a moment.

use lightmoe_models::config::ModelConfig;
use lightmoe_models::{BankLayout, DType, Manifest};

use super::svd::{by_rule, form};
use super::{AdapterInit, MethodName, PlanModel, PlanOptions, Target, finish};
use crate::observations::{Damage, Observations};
use crate::plan::{CurvePoint, LayerPlan, Plan, PlanDamage, PlanSettings, SlotForm};
use crate::ranks::{Costs, Limit, Point, RankRule, curve, spend};
use crate::{Error, Result};

/// Ranks are multiples of a sixty-fourth of the smaller side of an expert, but of no more than this, so
/// that kernels find whole tiles.
const WIDEST_STEP: usize = 16;
/// Points of the curve that a plan states.
const CURVE: usize = 48;

/// A form and what it takes.
#[derive(Debug, Clone, Copy)]
struct Choice {
    form: SlotForm,
    point: Point,
}

/// Plans for the wanted size, or the damage that is allowed.
pub(super) fn plan(
    model: PlanModel<'_>,
    observations: &Observations,
    target: Target,
    options: &PlanOptions,
) -> Result<Plan> {
    let config = model.config;
    let importance: Vec<Vec<f64>> = observations.layers.iter().map(|l| l.importance()).collect();
    let menus = menus(config, observations)?;
    let experts = config.moe.num_experts;
    let (size, rest) = bytes_of(&model)?;
    let limit = match target {
        Target::Ratio(ratio) => {
            let left = (1.0 - ratio) * config.parameters().total() as f64;
            let beside = config.parameters().total() - config.parameters().routed_experts;
            Limit::Cost((left.round() as u64).saturating_sub(beside))
        }
        Target::Bytes(bytes) => Limit::Cost(bytes.saturating_sub(rest) / size),
        Target::Damage(most) => Limit::Loss(most),
        Target::Threshold(_) => {
            return Err(Error::Invalid(
                "`budget` has no threshold; give a ratio, bytes, or the damage that is allowed"
                    .to_owned(),
            ));
        }
    };
    let points: Vec<Vec<Point>> = menus
        .iter()
        .map(|menu| menu.iter().map(|choice| choice.point).collect())
        .collect();
    let costs = Costs::of_expert(config);
    let ruled = match limit {
        Limit::Cost(budget) => by_rule(options.ranks, &importance, costs, budget)?,
        Limit::Loss(_) if options.ranks == RankRule::Budget => None,
        Limit::Loss(_) => {
            return Err(Error::Invalid(
                "the damage of ranks that follow a rule of their own cannot be limited; give a ratio \
                 or bytes, or the rule `budget`"
                    .to_owned(),
            ));
        }
    };
    let chosen: Vec<Choice> = match ruled {
        None => {
            let places = spend(&points, limit)?;
            menus.iter().zip(places).map(|(menu, i)| menu[i]).collect()
        }
        Some(levels) => {
            let damages = damages(config, observations)?;
            let of = |(i, level): (usize, Option<usize>)| Choice {
                form: form(level),
                point: Point {
                    cost: costs.of(level),
                    loss: level.map_or(0.0, |r| damages[i / experts].of_ranks(i % experts)[r]),
                },
            };
            levels.into_iter().enumerate().map(of).collect()
        }
    };
    let planned = observations.layers.iter().zip(&importance);
    let layers = planned
        .zip(chosen.chunks(experts))
        .map(|((observed, scores), chosen)| {
            let mut layer = LayerPlan::dense(observed, scores);
            for (slot, choice) in layer.slots.iter_mut().zip(chosen) {
                slot.form = choice.form;
                slot.bytes = Some(choice.point.cost * size);
                slot.damage = Some(choice.point.loss);
            }
            layer
        });
    let ranks = chosen.iter().filter_map(|choice| match choice.form {
        SlotForm::Adapted { rank, .. } => Some(rank),
        _ => None,
    });
    let settings = PlanSettings {
        rank: ranks.max().unwrap_or(0),
        groups: 0,
        adapters: AdapterInit::Fitted,
        // All of what is left trains: nothing else would learn a new task.
        trained_rank: options.trained_rank.filter(|&rank| rank > 0),
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Budget, settings, layers.collect());
    if let Target::Ratio(ratio) = target {
        plan.ratio.target = Some(ratio);
    }
    let bytes = |cost: u64| rest + cost * size;
    let curve = curve(&points, CURVE).into_iter().map(|point| CurvePoint {
        bytes: bytes(point.cost),
        damage: point.loss,
    });
    plan.damage = Some(PlanDamage {
        bytes: bytes(chosen.iter().map(|choice| choice.point.cost).sum()),
        predicted: chosen.iter().map(|choice| choice.point.loss).sum(),
        curve: curve.collect(),
    });
    Ok(plan)
}

/// Bytes of a parameter of the result, and of all that is no routed expert: as `build` will write them where
/// the weights are at hand, else by the element type that the configuration names.
fn bytes_of(model: &PlanModel<'_>) -> Result<(u64, u64)> {
    let (config, counts) = (model.config, model.config.parameters());
    let of_type = |dtype: DType| dtype.size_in_bytes() as u64;
    let Some(weights) = model.weights else {
        let size = of_type(config.file_dtype());
        return Ok((size, (counts.total() - counts.routed_experts) * size));
    };
    let checkpoint = weights.checkpoint;
    let most = checkpoint.dtype();
    let mut manifest = Manifest::of(config, &BankLayout::dense(config))?;
    checkpoint.keep_types(&mut manifest)?;
    let numbers = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let own = manifest.tensors.iter().map(|(name, shape)| {
        let dtype = manifest.types.get(name).copied().unwrap_or(most);
        numbers(shape) * of_type(dtype)
    });
    let extras = checkpoint.extras()?;
    let carried = extras.iter().map(|e| numbers(&e.shape) * of_type(e.dtype));
    let whole = own.chain(carried).sum::<u64>();
    let size = of_type(most);
    Ok((size, whole.saturating_sub(counts.routed_experts * size)))
}

/// What was observed of every layer.
fn damages<'a>(config: &ModelConfig, observations: &'a Observations) -> Result<Vec<&'a Damage>> {
    let layers = observations.layers.iter();
    layers.map(|layer| layer.damage(config)).collect()
}

/// What each expert may become, from the smallest form on.
fn menus(config: &ModelConfig, observations: &Observations) -> Result<Vec<Vec<Choice>>> {
    let costs = Costs::of_expert(config);
    let smaller = config.hidden_size.min(config.moe.intermediate_size);
    let step = (smaller / 64).clamp(1, WIDEST_STEP);
    let mut menus = Vec::new();
    for damage in damages(config, observations)? {
        for (expert, &drop) in damage.drop.iter().enumerate() {
            let losses = damage.of_ranks(expert);
            let constant = Choice {
                form: SlotForm::Constant,
                point: Point {
                    cost: config.hidden_size as u64,
                    loss: drop,
                },
            };
            let levels = (1..=smaller / step).map(|i| Some(i * step)).chain([None]);
            let ranks = levels.filter_map(|level| {
                let cost = costs.of(level);
                let fits = cost < costs.dense || level.is_none();
                fits.then(|| Choice {
                    form: form(level),
                    point: Point {
                        cost,
                        loss: level.map_or(0.0, |rank| losses[rank]),
                    },
                })
            });
            menus.push([constant].into_iter().chain(ranks).collect());
        }
    }
    Ok(menus)
}
