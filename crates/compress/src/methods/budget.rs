//! The byte-budget planner: every expert of every layer takes the form that costs the model least for
//! its bytes, by what errors were [observed to cost](crate::damage). Beyond the paper of LightMoE.
//!
//! The menu of an expert: its own matrices; factors of one rank, fitted to that cost, for all three, where
//! biases are allowed with one or without; the mean of its outputs; and where the experts of its layer have
//! much in common, their mean as a base that all may share, with factors of what an expert differs by, or
//! none. Nothing but the observations is asked, so another budget takes a moment.

use lightmoe_models::config::ModelConfig;

use super::bytes::Files;
use super::svd::{by_rule, form};
use super::{AdapterInit, BaseInit, MethodName, PlanModel, PlanOptions, Target, finish, order};
use crate::observations::{Damage, Observations};
use crate::observe::Sensitivity;
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
    let counts = model.config.parameters();
    let planner = Planner::new(model, observations, options)?;
    match target {
        Target::Ratio(ratio) => {
            let left = ((1.0 - ratio) * counts.total() as f64).round() as u64;
            let beside = counts.total() - counts.routed_experts;
            let limit = planner.limit(left.checked_sub(beside), || {
                let least = (planner.least() + beside) as f64 / counts.total() as f64;
                format!(
                    "`budget` saves at most {:.4} of this model's parameters, and the ratio is {ratio}; \
                     choose a lower ratio",
                    ((1.0 - least) * 1e4).floor() / 1e4
                )
            })?;
            let mut plan = planner.plan(limit)?;
            plan.ratio.target = Some(ratio);
            Ok(plan)
        }
        Target::Bytes(most) => planner.files.within(most, true, |bytes| {
            let left = bytes.checked_sub(planner.rest);
            let limit = planner.limit(left.map(|left| left / planner.size), || {
                let least = planner.bytes(planner.least());
                format!(
                    "the tensors of the smallest plan take {least} bytes, and {most} are to be left, headers \
                     of files included; give more bytes"
                )
            })?;
            planner.plan(limit)
        }),
        Target::Damage(_) if options.ranks != RankRule::Budget => Err(Error::Invalid(
            "the damage of ranks that follow a rule of their own cannot be limited; give a ratio or bytes, \
             or the rule `budget`"
                .to_owned(),
        )),
        Target::Damage(_) if observations.sensitivity != Some(Sensitivity::Fisher) => {
            Err(Error::Invalid(
                "the damage that is allowed is in nats, and the errors were not observed in nats; observe with \
                 `--damage fisher`, or give a ratio or bytes"
                    .to_owned(),
            ))
        }
        Target::Damage(most) => planner.plan(Limit::Loss(most)),
        Target::Threshold(_) => Err(Error::Invalid(
            "`budget` has no threshold; give a ratio, bytes, or the damage that is allowed"
                .to_owned(),
        )),
    }
}

/// What all plans of a model come from.
struct Planner<'a> {
    config: &'a ModelConfig,
    observations: &'a Observations,
    options: &'a PlanOptions,
    files: Files<'a>,
    /// Bytes of a parameter of the result, and of all tensors that are in no routed expert.
    size: u64,
    rest: u64,
    importance: Vec<Vec<f64>>,
    damages: Vec<&'a Damage>,
    menus: Vec<LayerMenus>,
    offers: Vec<Offer>,
}

impl<'a> Planner<'a> {
    fn new(
        model: PlanModel<'a>,
        observations: &'a Observations,
        options: &'a PlanOptions,
    ) -> Result<Self> {
        let config = model.config;
        let files = Files::of(model)?;
        let damages = damages(config, observations)?;
        if options.bias && damages.iter().any(|damage| damage.biased.is_none()) {
            return Err(Error::Invalid(
                "the plan may have biases, and these observations do not tell what they save; observe with \
                 `--bias true`"
                    .to_owned(),
            ));
        }
        let menus = damages.iter();
        let menus: Vec<LayerMenus> = menus
            .map(|damage| LayerMenus::of(config, damage, options))
            .collect();
        Ok(Self {
            config,
            observations,
            options,
            size: files.of_parameter(),
            rest: files.beside_experts()?,
            files,
            importance: observations.layers.iter().map(|l| l.importance()).collect(),
            offers: menus.iter().map(LayerMenus::offer).collect(),
            damages,
            menus,
        })
    }

    /// Parameters of the smallest forms of all experts, with bases or without.
    fn least(&self) -> u64 {
        let first = |menus: &[Vec<Point>]| menus.iter().map(|menu| menu[0].cost).sum::<u64>();
        let of_layer = |offer: &Offer| {
            let alone = first(&offer.alone);
            let shared = offer.shared.as_ref();
            shared.map_or(alone, |shared| {
                alone.min(shared.base + first(&shared.menus))
            })
        };
        self.offers.iter().map(of_layer).sum()
    }

    /// Bytes of the tensors where experts take so many parameters.
    fn bytes(&self, cost: u64) -> u64 {
        self.rest + cost * self.size
    }

    /// So many parameters for the experts, if any forms of them take no more.
    fn limit(&self, left: Option<u64>, refusal: impl Fn() -> String) -> Result<Limit> {
        let left = left.filter(|&left| left >= self.least());
        left.map(Limit::Cost)
            .ok_or_else(|| Error::Invalid(refusal()))
    }

    fn plan(&self, limit: Limit) -> Result<Plan> {
        let (config, options) = (self.config, self.options);
        let costs = Costs::of_expert(config);
        let ruled = match limit {
            Limit::Cost(budget) => by_rule(options.ranks, &self.importance, costs, budget)?,
            Limit::Loss(_) => None,
        };
        let chosen = match ruled {
            None => chosen(&self.menus, spend_with_bases(&self.offers, limit)?),
            Some(levels) => {
                let layers = self.damages.iter();
                let layers = layers.zip(levels.chunks(config.moe.num_experts));
                layers
                    .map(|(damage, levels)| leveled(damage, levels, costs))
                    .collect()
            }
        };
        let mut layers = Vec::new();
        for (i, chosen) in chosen.iter().enumerate() {
            let mut layer = LayerPlan::dense(&self.observations.layers[i], &self.importance[i]);
            for (slot, choice) in layer.slots.iter_mut().zip(chosen) {
                slot.form = choice.form;
                slot.bytes = Some(choice.point.cost * self.size);
                slot.damage = Some(choice.point.loss);
            }
            share(&mut layer, &self.damages[i].mass);
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
        let cost = bases as u64 * config.expert_parameters()
            + all().map(|choice| choice.point.cost).sum::<u64>();
        let bytes = self.files.bytes(&plan)?;
        // Headers are about as long for other sizes.
        let headers = bytes - self.bytes(cost);
        let curve = curve_with_bases(&self.offers, CURVE).into_iter();
        plan.damage = Some(PlanDamage {
            sensitivity: self.observations.sensitivity.unwrap_or(Sensitivity::Fisher),
            bytes,
            predicted: all().map(|choice| choice.point.loss).sum(),
            curve: curve
                .map(|point| CurvePoint {
                    bytes: self.bytes(point.cost) + headers,
                    damage: point.loss,
                })
                .collect(),
        });
        Ok(plan)
    }
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

/// What was observed of every layer.
fn damages<'a>(config: &ModelConfig, observations: &'a Observations) -> Result<Vec<&'a Damage>> {
    let layers = observations.layers.iter();
    layers.map(|layer| layer.damage(config)).collect()
}

/// What ranks of an expert cost, without a bias and, where there may be one, with it.
struct Losses([Option<Vec<f64>>; 2]);

impl Losses {
    fn of(&self, rank: usize, bias: bool) -> Option<f64> {
        let losses = self.0[usize::from(bias)].as_ref()?;
        losses.get(rank).copied()
    }
}

/// What the experts of a layer may become, each from the smallest form on.
struct LayerMenus {
    alone: Vec<Vec<Choice>>,
    /// Beside a base, and what that costs.
    shared: Option<(u64, Vec<Vec<Choice>>)>,
}

impl LayerMenus {
    /// By what errors cost; with a base where `options` allow one and the experts have enough in common.
    fn of(config: &ModelConfig, damage: &Damage, options: &PlanOptions) -> Self {
        let costs = Costs::of_expert(config);
        let vector = config.hidden_size as u64;
        let smaller = config.hidden_size.min(config.moe.intermediate_size);
        let step = rank_step(smaller);
        let adapted = |group, rank, bias| SlotForm::Adapted {
            group,
            rank,
            bias,
            dominant: false,
        };
        let alone = |expert: usize| -> Vec<Choice> {
            let biased = damage.of_biased(expert).filter(|_| options.bias);
            let losses = Losses([Some(damage.of_ranks(expert)), biased]);
            let choice = |form: SlotForm, cost: u64, loss: f64| Choice {
                form,
                point: Point { cost, loss },
            };
            let constant = choice(SlotForm::Constant, vector, damage.drop[expert]);
            let ranked = |(rank, bias): (usize, bool)| {
                let cost = costs.of(Some(rank)) + if bias { vector } else { 0 };
                let loss = losses.of(rank, bias)?;
                (cost < costs.dense).then(|| choice(adapted(None, rank, bias), cost, loss))
            };
            let ranks =
                (1..=smaller / step).flat_map(|i| [false, true].map(|bias| (i * step, bias)));
            let ranks = ranks.filter_map(ranked);
            let dense = choice(SlotForm::Dense, costs.dense, 0.0);
            std::iter::once(constant)
                .chain(ranks)
                .chain([dense])
                .collect()
        };
        let alone: Vec<Vec<Choice>> = (0..damage.drop.len()).map(alone).collect();
        // The base by itself, and where factors beside it do better than factors alone, or it and a bias than a
        // constant, these.
        let beside = |(expert, alone): (usize, &Vec<Choice>)| -> Option<Vec<Choice>> {
            let biased = damage.of_biased_differences(expert);
            let losses = Losses([
                Some(damage.of_differences(expert)?),
                biased.filter(|_| options.bias),
            ]);
            let of_base = |rank: usize, bias: bool, cost: u64| -> Option<Choice> {
                let loss = losses.of(rank, bias)?;
                let form = adapted(Some(0), rank, bias);
                let point = Point { cost, loss };
                Some(Choice { form, point })
            };
            let better = |&choice: &Choice| {
                let cost = choice.point.cost;
                let with = match choice.form {
                    SlotForm::Adapted { rank, bias, .. } => of_base(rank, bias, cost),
                    SlotForm::Constant => of_base(0, true, cost),
                    _ => None,
                };
                let with = with.filter(|with| with.point.loss < choice.point.loss);
                with.unwrap_or(choice)
            };
            let base = of_base(0, false, 0)?;
            Some(
                std::iter::once(base)
                    .chain(alone.iter().map(better))
                    .collect(),
            )
        };
        let shared: Option<Vec<Vec<Choice>>> = match options.groups > 0 {
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
