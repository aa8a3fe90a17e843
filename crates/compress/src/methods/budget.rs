//! The byte-budget planner: every expert of every layer takes the form that costs the model least for
//! its bytes, by what errors were [observed to cost](crate::damage). Beyond the paper of LightMoE.
//!
//! The menu of an expert: its own matrices; factors of one rank, fitted to that cost, for all three; the
//! mean of its outputs; and where the experts of its layer have much in common, their mean as a base that
//! all may share, with factors of what an expert differs by, or none. Nothing but the observations is
//! asked, so another budget takes a moment.

use lightmoe_models::config::ModelConfig;
use lightmoe_models::{BankLayout, DType, Manifest};

use super::svd::{by_rule, form};
use super::{AdapterInit, BaseInit, MethodName, PlanModel, PlanOptions, Target, finish, order};
use crate::observations::{Damage, Observations};
use crate::plan::{CurvePoint, LayerPlan, Plan, PlanDamage, PlanSettings, SlotForm};
use crate::ranks::{
    Chosen, Costs, Level, Limit, Offer, Point, RankRule, Shared, curve_with_bases, spend_with_bases,
};
use crate::{Error, Result};

/// Ranks are multiples of a sixty-fourth of the smaller side of an expert, but of no more than the first of
/// these, and of the second where it is between them: kernels of GPUs copy as many numbers at once, so what a
/// plan counts is what they compute.
const STEPS: [usize; 2] = [16, 8];
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
    let damages = damages(config, observations)?;
    let menus: Vec<LayerMenus> = damages
        .iter()
        .map(|damage| LayerMenus::of(config, damage, options.groups > 0))
        .collect();
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
    let offers: Vec<Offer> = menus.iter().map(LayerMenus::offer).collect();
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
    let chosen = match ruled {
        None => chosen(&menus, spend_with_bases(&offers, limit)?),
        Some(levels) => {
            let layers = damages.iter().zip(levels.chunks(experts));
            layers
                .map(|(damage, levels)| leveled(damage, levels, costs))
                .collect()
        }
    };
    let mut layers = Vec::new();
    for (i, chosen) in chosen.iter().enumerate() {
        let mut layer = LayerPlan::dense(&observations.layers[i], &importance[i]);
        for (slot, choice) in layer.slots.iter_mut().zip(chosen) {
            slot.form = choice.form;
            slot.bytes = Some(choice.point.cost * size);
            slot.damage = Some(choice.point.loss);
        }
        share(&mut layer, &damages[i].mass);
        layers.push(layer);
    }
    let all = || chosen.iter().flatten();
    let ranks = all().filter_map(|choice| match choice.form {
        SlotForm::Adapted { rank, .. } => Some(rank),
        _ => None,
    });
    let bases: usize = layers.iter().map(|layer| layer.groups).sum();
    let settings = PlanSettings {
        rank: ranks.max().unwrap_or(0),
        groups: bases.min(1),
        adapters: AdapterInit::Fitted,
        base: match bases {
            0 => options.base,
            _ => BaseInit::Common,
        },
        // All of what is left trains: nothing else would learn a new task.
        trained_rank: options.trained_rank.filter(|&rank| rank > 0),
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Budget, settings, layers);
    if let Target::Ratio(ratio) = target {
        plan.ratio.target = Some(ratio);
    }
    let bytes = |cost: u64| rest + cost * size;
    let curve = curve_with_bases(&offers, CURVE).into_iter();
    let of_bases = bases as u64 * config.expert_parameters();
    plan.damage = Some(PlanDamage {
        bytes: bytes(of_bases + all().map(|choice| choice.point.cost).sum::<u64>()),
        predicted: all().map(|choice| choice.point.loss).sum(),
        curve: curve
            .map(|point| CurvePoint {
                bytes: bytes(point.cost),
                damage: point.loss,
            })
            .collect(),
    });
    Ok(plan)
}

/// What the places that were chosen stand for, layer by layer.
fn chosen(menus: &[LayerMenus], spent: Chosen) -> Vec<Vec<Choice>> {
    let mut places = spent.places.into_iter();
    let of_layer = |(menus, base): (&LayerMenus, bool)| {
        let slots = menus.with(base).iter().zip(&mut places);
        slots.map(|(menu, place)| menu[place]).collect()
    };
    menus.iter().zip(spent.bases).map(of_layer).collect()
}

/// Ranks that follow a rule of their own, with what they cost.
fn leveled(damage: &Damage, levels: &[Level], costs: Costs) -> Vec<Choice> {
    let of = |(expert, &level): (usize, &Level)| Choice {
        form: form(level),
        point: Point {
            cost: costs.of(level),
            loss: level.map_or(0.0, |rank| damage.of_ranks(expert)[rank]),
        },
    };
    levels.iter().enumerate().map(of).collect()
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

/// What the experts of a layer may become, each from the smallest form on.
struct LayerMenus {
    alone: Vec<Vec<Choice>>,
    /// Beside a base, and what that costs.
    shared: Option<(u64, Vec<Vec<Choice>>)>,
}

impl LayerMenus {
    /// By what errors cost; with a base where `bases` allows one and the experts have enough in common.
    fn of(config: &ModelConfig, damage: &Damage, bases: bool) -> Self {
        let costs = Costs::of_expert(config);
        let smaller = config.hidden_size.min(config.moe.intermediate_size);
        let step = rank_step(smaller);
        let alone = |expert: usize| -> Vec<Choice> {
            let losses = damage.of_ranks(expert);
            let constant = Choice {
                form: SlotForm::Constant,
                point: Point {
                    cost: config.hidden_size as u64,
                    loss: damage.drop[expert],
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
            [constant].into_iter().chain(ranks).collect()
        };
        let alone: Vec<Vec<Choice>> = (0..damage.drop.len()).map(alone).collect();
        // The base by itself, and where factors beside it do better than factors alone, these.
        let beside = |(expert, alone): (usize, &Vec<Choice>)| -> Option<Vec<Choice>> {
            let losses = damage.of_differences(expert)?;
            let of_base = |rank: usize, cost: u64| Choice {
                form: SlotForm::Adapted {
                    group: Some(0),
                    rank,
                    dominant: false,
                },
                point: Point {
                    cost,
                    loss: losses[rank],
                },
            };
            let better = |&choice: &Choice| match choice.form {
                SlotForm::Adapted { rank, .. } if losses[rank] < choice.point.loss => {
                    of_base(rank, choice.point.cost)
                }
                _ => choice,
            };
            let base = std::iter::once(of_base(0, 0));
            Some(base.chain(alone.iter().map(better)).collect())
        };
        let shared: Option<Vec<Vec<Choice>>> = match bases {
            true => alone.iter().enumerate().map(beside).collect(),
            false => None,
        };
        Self {
            alone,
            shared: shared.map(|menus| (costs.dense, menus)),
        }
    }

    /// The menus with or without a base.
    fn with(&self, base: bool) -> &[Vec<Choice>] {
        match &self.shared {
            Some((_, menus)) if base => menus,
            _ => &self.alone,
        }
    }

    fn offer(&self) -> Offer {
        let points = |menus: &[Vec<Choice>]| {
            let menu = |menu: &Vec<Choice>| menu.iter().map(|choice| choice.point).collect();
            menus.iter().map(menu).collect()
        };
        Offer {
            alone: points(&self.alone),
            shared: self.shared.as_ref().map(|(base, menus)| Shared {
                base: *base,
                menus: points(menus),
            }),
        }
    }
}

/// What ranks are multiples of in experts whose smaller side is `smaller`.
fn rank_step(smaller: usize) -> usize {
    let part = (smaller / 64).max(1);
    let whole = STEPS.into_iter().find(|&step| step <= part);
    whole.unwrap_or(part)
}

/// Gives the layer the base that some of its slots use: the mean of all its experts by what errors of them
/// count for. The one that counts most is its dominant.
fn share(layer: &mut LayerPlan, mass: &[f64]) {
    let uses = |slot: usize| layer.slots[slot].form.group().is_some();
    let Some(most) = order(mass).into_iter().find(|&slot| uses(slot)) else {
        return;
    };
    layer.groups = 1;
    for (slot, &mass) in layer.slots.iter_mut().zip(mass) {
        slot.weight = Some(mass);
        if let SlotForm::Adapted { dominant, .. } = &mut slot.form {
            *dominant = slot.expert == most;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::rank_step;

    #[test]
    fn ranks_are_multiples_of_what_kernels_copy() {
        // OLMoE, Qwen3-30B-A3B, DeepSeek-V2-Lite, Mixtral; the built-in model and smaller ones.
        let sides = [1024, 768, 1408, 4096, 64, 32, 130];
        assert_eq!(sides.map(rank_step), [16, 8, 16, 16, 1, 1, 2]);
    }
}
