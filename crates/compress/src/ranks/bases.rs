//! Spending where a layer may be given a base that its experts share: it has a price of its own, and
//! makes what they can become beside it cheaper for the same loss.
//!
//! Which layers have one is decided by the price of a parameter: at a price `λ`, a layer does best with
//! the lower of `Σ min(loss + λ·cost)` without a base, and that sum with one and `λ` times the base. The
//! sets of layers that some prices ask for, evenly apart in their logarithm, are tried. As they do not follow from
//! the budget, a larger one still never loses more.

use super::{Limit, Point, curve, hull, spend};
use crate::{Error, Result};

/// How many prices are asked, evenly apart in their logarithm.
const PRICES: u32 = 32;

/// What the slots of a layer may become; the costs of each menu ascend.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Without a base.
    pub alone: Vec<Vec<Point>>,
    /// With one; `None` where there is none to be had.
    pub shared: Option<Shared>,
}

/// A base and what the slots may become beside it.
#[derive(Debug, Clone)]
pub struct Shared {
    /// What the base costs.
    pub base: u64,
    /// As many menus as without it.
    pub menus: Vec<Vec<Point>>,
}

/// What was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// Whether each layer has its base.
    pub bases: Vec<bool>,
    /// The place in the menu of each slot, those of the first layer first.
    pub places: Vec<usize>,
}

/// The loss of a layer and the price of all it takes, where a parameter costs `price`.
fn priced(menus: &[Vec<Point>], price: f64) -> f64 {
    let least = |menu: &Vec<Point>| {
        let all = menu.iter().map(|p| p.loss + price * p.cost as f64);
        all.fold(f64::INFINITY, f64::min)
    };
    menus.iter().map(least).sum()
}

/// Which layers have a base at some prices, each set once; first the one without any.
fn openings(offers: &[Offer]) -> Vec<Vec<bool>> {
    let mut sets = vec![vec![false; offers.len()]];
    let shared = offers.iter().filter_map(|offer| offer.shared.as_ref());
    let slopes = shared
        .flat_map(|shared| &shared.menus)
        .flat_map(|menu| hull(menu));
    let slopes = slopes.map(|(_, slope)| slope).filter(|slope| *slope > 0.0);
    let (low, high) = slopes.fold((f64::INFINITY, 0.0f64), |(low, high), slope| {
        (low.min(slope), high.max(slope))
    });
    if low > high {
        return sets;
    }
    for step in 0..PRICES {
        let price = low * (high / low).powf(f64::from(step) / f64::from(PRICES - 1));
        let pays = |offer: &Offer| {
            offer.shared.as_ref().is_some_and(|shared| {
                let with = priced(&shared.menus, price) + price * shared.base as f64;
                with < priced(&offer.alone, price)
            })
        };
        let set: Vec<bool> = offers.iter().map(pays).collect();
        if !sets.contains(&set) {
            sets.push(set);
        }
    }
    sets
}

/// The menus of all slots with these bases, and what the bases cost.
fn menus(offers: &[Offer], bases: &[bool]) -> (Vec<Vec<Point>>, u64) {
    let mut cost = 0;
    let mut all = Vec::new();
    for (offer, &open) in offers.iter().zip(bases) {
        match offer.shared.as_ref().filter(|_| open) {
            Some(shared) => {
                cost += shared.base;
                all.extend_from_slice(&shared.menus);
            }
            None => all.extend_from_slice(&offer.alone),
        }
    }
    (all, cost)
}

/// As [`spend`], with bases where they pay.
///
/// # Errors
/// [`Error::Invalid`] if not even the first places without bases, or with those that some price asks for,
/// can be had.
pub fn spend_with_bases(offers: &[Offer], limit: Limit) -> Result<Chosen> {
    let mut best: Option<(Point, Chosen)> = None;
    let mut refused: Option<Error> = None;
    for bases in openings(offers) {
        let (menus, cost) = menus(offers, &bases);
        let within = match limit {
            Limit::Cost(most) if cost > most => continue,
            Limit::Cost(most) => Limit::Cost(most - cost),
            loss => loss,
        };
        let places = match spend(&menus, within) {
            Ok(places) => places,
            Err(error) => {
                refused.get_or_insert(error);
                continue;
            }
        };
        let picked = menus.iter().zip(&places).map(|(menu, &place)| menu[place]);
        let mut all: Point = picked.sum();
        all.cost += cost;
        let better = best.as_ref().is_none_or(|(least, _)| match limit {
            Limit::Cost(_) => all.loss < least.loss,
            Limit::Loss(_) => all.cost < least.cost,
        });
        if better {
            best = Some((all, Chosen { bases, places }));
        }
    }
    match (best, refused) {
        (Some((_, chosen)), _) => Ok(chosen),
        (None, Some(error)) => Err(error),
        (None, None) => Err(Error::Invalid("nothing to spend on; plan again".to_owned())),
    }
}

/// As [`curve`], with bases where they pay: what no smaller amount does better, up to all slots whole.
pub fn curve_with_bases(offers: &[Offer], count: usize) -> Vec<Point> {
    let mut all = Vec::new();
    let mut whole = Point { cost: 0, loss: 0.0 };
    for bases in openings(offers) {
        let (menus, cost) = menus(offers, &bases);
        let own = curve(&menus, count).into_iter().map(|point| Point {
            cost: point.cost + cost,
            ..point
        });
        all.extend(own);
        // Of the set without bases, which is the first.
        if whole.cost == 0 {
            whole = all[all.len() - 1];
        }
    }
    all.retain(|point| point.cost < whole.cost);
    all.sort_by(|a, b| a.cost.cmp(&b.cost).then(a.loss.total_cmp(&b.loss)));
    let mut lower: Vec<Point> = Vec::new();
    for point in all {
        if lower.last().is_none_or(|last| point.loss < last.loss) {
            lower.push(point);
        }
    }
    lower.push(whole);
    // Thinned evenly, both ends kept.
    let (last, kept) = (lower.len() - 1, count.min(lower.len()));
    let place = |i: usize| i * last / (kept - 1).max(1);
    (0..kept).map(|i| lower[place(i)]).collect()
}
