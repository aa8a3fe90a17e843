//! How a budget of parameters is spent on ranks: the same for all, by importance, or where it saves
//! most loss.

mod bases;

use crate::size::adapter_parameters;
use crate::{Error, Result};
use lightmoe_models::ModelConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use bases::{Chosen, Offer, Shared, curve_with_bases, spend_with_bases};

/// What is added to an expert's importance, of which the largest in a layer is 1, so that the least
/// important keep some rank (MoE-I² smooths alike).
const SMOOTHING: f64 = 0.15;

/// The weights by which the experts of a layer share a budget, from their `importance`: the most
/// important of every layer has the same.
pub fn smoothed(importance: &[f64]) -> Vec<f64> {
    let largest = importance.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let weight = |i: &f64| i / largest + SMOOTHING;
    importance.iter().map(weight).collect()
}

/// How factorised experts share a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RankRule {
    /// The same rank everywhere.
    Uniform,
    /// In proportion to the importance of an expert in its layer (MoE-I², arXiv 2411.01016, stage two).
    Importance,
    /// Where a parameter saves most loss, over all experts of all layers.
    Budget,
}

/// What becomes of an expert: factors of this rank, or `None` where its own matrices are no larger.
pub type Level = Option<usize>;

/// What levels cost, in parameters.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    /// Of one rank.
    pub unit: u64,
    /// Of the expert's own matrices.
    pub dense: u64,
}

impl Costs {
    /// Of the routed experts of a model.
    pub fn of_expert(config: &ModelConfig) -> Self {
        Self {
            unit: adapter_parameters(config, 1),
            dense: config.expert_parameters(),
        }
    }

    /// The highest rank that is smaller than the expert.
    fn most(self) -> usize {
        (self.dense.saturating_sub(1) / self.unit) as usize
    }

    fn level(self, rank: usize) -> Level {
        (rank <= self.most()).then_some(rank)
    }

    /// Of a level.
    pub fn of(self, level: Level) -> u64 {
        level.map_or(self.dense, |rank| rank as u64 * self.unit)
    }

    fn check(self, slots: usize, budget: u64) -> Result<()> {
        match budget < slots as u64 * self.unit {
            true => Err(Error::Invalid(format!(
                "{budget} parameters are left for {slots} experts, and rank 1 takes {} each; choose \
                 a lower ratio",
                self.unit
            ))),
            false => Ok(()),
        }
    }
}

/// The same rank for all; what is left over raises it by one for the first of `order`, which names
/// every slot once.
///
/// # Errors
/// [`Error::Invalid`] if not even rank 1 can be had.
pub fn uniform(order: &[usize], costs: Costs, budget: u64) -> Result<Vec<Level>> {
    costs.check(order.len(), budget)?;
    if budget / costs.dense >= order.len() as u64 {
        return Ok(vec![None; order.len()]);
    }
    let units = (budget / costs.unit) as usize;
    let (rank, more) = (units / order.len(), units % order.len());
    let mut levels = vec![costs.level(rank); order.len()];
    for &slot in &order[..more] {
        levels[slot] = costs.level(rank + 1);
    }
    Ok(levels)
}

/// Ranks in proportion to `weights` (one a slot, from 0), at least 1 each.
///
/// # Errors
/// [`Error::Invalid`] if not even rank 1 can be had.
pub fn proportional(weights: &[f64], costs: Costs, budget: u64) -> Result<Vec<Level>> {
    costs.check(weights.len(), budget)?;
    let levels = |scale: f64| -> Vec<Level> {
        let rank = |w: &f64| costs.level(((scale * w) as usize).max(1));
        weights.iter().map(rank).collect()
    };
    let spent = |levels: &[Level]| levels.iter().map(|&l| costs.of(l)).sum::<u64>();
    // The largest scale that the budget allows.
    let (mut low, mut high) = (0.0, 1.0);
    while spent(&levels(high)) <= budget && high < 1e12 {
        high *= 2.0;
    }
    for _ in 0..64 {
        let middle = 0.5 * (low + high);
        match spent(&levels(middle)) <= budget {
            true => low = middle,
            false => high = middle,
        }
    }
    Ok(levels(low))
}

/// Spends the budget where it saves most: `losses[slot][rank]` falls with the rank, and the expert's
/// own matrices lose nothing. At least rank 1 each. All steps of [`hull`] are taken in the order of what
/// they save, and each that does not fit is taken as far as it does.
///
/// # Errors
/// [`Error::Invalid`] if not even rank 1 can be had.
pub fn least_loss(losses: &[Vec<f64>], costs: Costs, budget: u64) -> Result<Vec<Level>> {
    costs.check(losses.len(), budget)?;
    let level = |losses: &[f64], place: usize| {
        let most = costs.most().min(losses.len() - 1);
        (place < most).then_some(place + 1)
    };
    let points = losses.iter().map(|losses| {
        let most = costs.most().min(losses.len() - 1);
        let point = |place: usize| Point {
            cost: costs.of(level(losses, place)),
            loss: level(losses, place).map_or(0.0, |rank| losses[rank]),
        };
        (0..=most).map(point).collect()
    });
    let points: Vec<Vec<Point>> = points.collect();
    let mut levels = vec![costs.level(1); losses.len()];
    let mut left = budget - levels.iter().map(|&l| costs.of(l)).sum::<u64>();
    let mut ended = vec![false; losses.len()];
    for step in steps(&points) {
        if ended[step.slot] {
            continue;
        }
        let wanted = level(&losses[step.slot], step.place);
        let room = costs.of(levels[step.slot]) + left;
        let reached = match costs.of(wanted) <= room {
            true => wanted,
            false => {
                ended[step.slot] = true;
                Some((room / costs.unit) as usize)
            }
        };
        left = room - costs.of(reached);
        levels[step.slot] = reached;
    }
    Ok(levels)
}

/// What a choice takes and what it loses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// In parameters.
    pub cost: u64,
    /// In any unit that adds up.
    pub loss: f64,
}

impl std::iter::Sum for Point {
    fn sum<I: Iterator<Item = Self>>(points: I) -> Self {
        points.fold(Self { cost: 0, loss: 0.0 }, |sum, point| Self {
            cost: sum.cost + point.cost,
            loss: sum.loss + point.loss,
        })
    }
}

/// From one choice of a slot to a larger one.
#[derive(Debug, Clone, Copy)]
struct Step {
    slot: usize,
    /// The choice that it leads to.
    place: usize,
    /// What it saves for each parameter.
    slope: f64,
}

/// The places on the lower hull of the losses of `points` over their costs, which ascend, with the slope
/// that leads to each: from the first point to the last, each saving less a parameter than the one before.
fn hull(points: &[Point]) -> Vec<(usize, f64)> {
    let mut hull = Vec::new();
    let mut at = 0;
    while at + 1 < points.len() {
        let slope = |next: usize| {
            let cost = points[next].cost - points[at].cost;
            (points[at].loss - points[next].loss) / cost as f64
        };
        // Of equal steps the longest, so that they come as one.
        let next = (at + 1..points.len())
            .max_by(|&a, &b| slope(a).total_cmp(&slope(b)))
            .unwrap_or(at + 1);
        hull.push((next, slope(next)));
        at = next;
    }
    hull
}

/// The steps of all slots, those that save most first.
fn steps(points: &[Vec<Point>]) -> Vec<Step> {
    let of = |(slot, points): (usize, &Vec<Point>)| {
        let hull = hull(points).into_iter();
        hull.map(move |(place, slope)| Step { slot, place, slope })
    };
    let mut steps: Vec<Step> = points.iter().enumerate().flat_map(of).collect();
    // Stable: the steps of a slot stay in order, since each saves no more than the one before.
    steps.sort_by(|a, b| b.slope.total_cmp(&a.slope));
    steps
}

/// Where spending ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// When this is spent, in parameters.
    Cost(u64),
    /// When no more than this is lost.
    Loss(f64),
}

/// Chooses a place among the `points` of every slot, whose costs ascend: the steps of all slots in the
/// order of what they save, up to the limit. What a limit on the cost leaves over before the first step
/// that does not fit goes to one change, of any slot, the one that saves most, and there it ends. So a
/// larger budget never loses more, which it could if smaller steps went on being taken.
///
/// # Errors
/// [`Error::Invalid`] if not even the first places can be had.
pub fn spend(points: &[Vec<Point>], limit: Limit) -> Result<Vec<usize>> {
    let mut places = vec![0; points.len()];
    let first = points.iter().map(|points| points[0]);
    let mut spent: u64 = first.clone().map(|point| point.cost).sum();
    let mut lost: f64 = first.map(|point| point.loss).sum();
    let most = match limit {
        Limit::Cost(most) => most,
        Limit::Loss(_) => u64::MAX,
    };
    if most < spent {
        return Err(Error::Invalid(format!(
            "the least that {} experts can become takes {spent} parameters, and {most} are left for \
             them; choose a lower ratio, or more bytes",
            points.len()
        )));
    }
    for step in steps(points) {
        let points = &points[step.slot];
        let (old, new) = (points[places[step.slot]], points[step.place]);
        let enough = matches!(limit, Limit::Loss(most) if lost <= most);
        if enough || spent - old.cost + new.cost > most {
            break;
        }
        spent = spent - old.cost + new.cost;
        lost += new.loss - old.loss;
        places[step.slot] = step.place;
    }
    if limit == Limit::Cost(most) {
        let left = most - spent;
        let gains = points.iter().enumerate().flat_map(|(slot, points)| {
            let at = points[places[slot]];
            let later = (places[slot] + 1..points.len()).map(move |place| (place, points[place]));
            let fits = later.filter(move |(_, point)| point.cost - at.cost <= left);
            fits.map(move |(place, point)| (at.loss - point.loss, slot, place))
        });
        let best = gains.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        if let Some((_, slot, place)) = best.filter(|best| best.0 > 0.0) {
            places[slot] = place;
        }
    }
    Ok(places)
}

/// What every amount loses, from the least that can be spent to the most: at most `count` points, evenly
/// apart in cost as far as there are steps.
pub fn curve(points: &[Vec<Point>], count: usize) -> Vec<Point> {
    let mut places = vec![0; points.len()];
    let sum = |places: &[usize]| -> Point {
        let chosen = points.iter().zip(places);
        chosen.map(|(points, &place)| points[place]).sum()
    };
    let mut curve = vec![sum(&places)];
    let (mut cost, mut last) = (curve[0].cost, curve[0].cost);
    let most: u64 = points.iter().filter_map(|p| p.last()).map(|p| p.cost).sum();
    let apart = (most - cost).div_ceil(count.max(2) as u64 - 1).max(1);
    for step in steps(points) {
        let points = &points[step.slot];
        cost = cost - points[places[step.slot]].cost + points[step.place].cost;
        places[step.slot] = step.place;
        if cost - last >= apart || cost == most {
            curve.push(sum(&places));
            last = cost;
        }
    }
    curve
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COSTS: Costs = Costs { unit: 3, dense: 20 };

    fn total(levels: &[Level]) -> u64 {
        levels.iter().map(|&l| COSTS.of(l)).sum()
    }

    #[test]
    fn what_is_left_over_goes_to_the_first() {
        let levels = uniform(&[2, 0, 1], COSTS, 23).unwrap();
        assert_eq!(levels, [Some(2), Some(2), Some(3)]);
        // Rank 7 would be larger than the expert.
        assert_eq!(uniform(&[0], COSTS, 21).unwrap(), [None]);
        let message = uniform(&[0, 1], COSTS, 5).unwrap_err().to_string();
        assert!(message.contains("lower ratio"), "{message}");
    }

    #[test]
    fn ranks_follow_the_weights() {
        let levels = proportional(&[1.0, 2.0, 0.0], COSTS, 3 * 7).unwrap();
        assert_eq!(levels, [Some(2), Some(4), Some(1)]);
    }

    /// All plans of three small slots, one by one.
    fn best(losses: &[Vec<f64>], budget: u64) -> f64 {
        let options: Vec<Level> = (1..=COSTS.most()).map(Some).chain([None]).collect();
        let loss = |slot: usize, l: Level| l.map_or(0.0, |rank| losses[slot][rank]);
        let mut best = f64::INFINITY;
        for &a in &options {
            for &b in &options {
                for &c in &options {
                    if total(&[a, b, c]) <= budget {
                        best = best.min(loss(0, a) + loss(1, b) + loss(2, c));
                    }
                }
            }
        }
        best
    }

    proptest! {
        /// Never above the budget, and no further from the best plan than one step of one slot.
        #[test]
        fn the_least_loss_is_nearly_the_least(
            falls in prop::collection::vec(prop::collection::vec(0.0f64..1.0, 8), 3),
            budget in 9u64..60,
        ) {
            let losses: Vec<Vec<f64>> = falls
                .into_iter()
                .map(|mut falls| {
                    falls.sort_by(|a, b| b.total_cmp(a));
                    let mut loss: f64 = falls.iter().sum();
                    let mut losses = vec![loss];
                    for fall in falls {
                        loss = (loss - fall).max(0.0);
                        losses.push(loss);
                    }
                    losses
                })
                .collect();
            let levels = least_loss(&losses, COSTS, budget).unwrap();
            prop_assert!(total(&levels) <= budget);
            let ours: f64 = levels
                .iter()
                .zip(&losses)
                .map(|(&level, losses)| level.map_or(0.0, |rank| losses[rank]))
                .sum();
            let largest = losses.iter().map(|l| l[1]).fold(0.0, f64::max);
            prop_assert!(ours <= best(&losses, budget) + largest);
            let even = uniform(&[0, 1, 2], COSTS, budget).unwrap();
            prop_assert!(total(&even) <= budget);
            let shares = proportional(&[0.3, 0.2, 0.5], COSTS, budget).unwrap();
            prop_assert!(total(&shares) <= budget);
        }
    }
}
