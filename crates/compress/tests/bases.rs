//! The planner where experts have something in common: a base that they share.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::predictions::{built, divergence, log_probabilities, samples, with};
use common::{observed, options, small};
use lightmoe_compress::Sensitivity;
use lightmoe_compress::methods::{BaseInit, MethodName, PlanOptions, Target, plan};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{Plan, SlotForm, SlotPlan};
use lightmoe_compress::ranks::{
    Chosen, Limit, Offer, Point, Shared, curve_with_bases, spend_with_bases,
};
use lightmoe_models::{Checkpoint, Decoder};
use proptest::prelude::*;
use tempfile::TempDir;

/// Sixteen experts a layer that grew from one.
fn upcycled(own: f64, folder: &TempDir) -> Checkpoint {
    common::upcycled(&small(2, 16), own, folder)
}

fn seen(checkpoint: &Checkpoint, folder: &TempDir) -> Observations {
    observed(checkpoint, &samples(1), with(Sensitivity::Fisher), folder)
}

fn budgeted(checkpoint: &Checkpoint, seen: &Observations, ratio: f64, groups: usize) -> Plan {
    planned(checkpoint, seen, Target::Ratio(ratio), groups)
}

fn planned(checkpoint: &Checkpoint, seen: &Observations, target: Target, groups: usize) -> Plan {
    common::budgeted(checkpoint.config(), seen, target, &options(1, groups))
}

/// Experts that grew from one share a base: at the same size less is lost, as expected and as measured, and
/// the bytes are those of the file.
#[test]
fn experts_that_grew_from_one_share_a_base() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = upcycled(0.3, &folder);
    let seen = seen(&checkpoint, &folder);
    let samples = samples(1);
    let original = log_probabilities(&Decoder::load(&checkpoint).unwrap(), &samples);
    let lost = |plan: &Plan| {
        let built = built(&checkpoint, plan, &seen, &folder);
        let expected = plan.damage.as_ref().unwrap();
        assert_eq!(expected.bytes, built.bytes());
        let now = log_probabilities(&Decoder::load(&built).unwrap(), &samples);
        (expected.predicted, divergence(&original, &now))
    };
    let ours = budgeted(&checkpoint, &seen, 0.6, 1);
    let without = budgeted(&checkpoint, &seen, 0.6, 0);
    assert!(ours.layers.iter().all(|layer| layer.groups == 1));
    assert_eq!(ours.settings.base, BaseInit::Common);
    assert!(without.layers.iter().all(|layer| layer.groups == 0));
    let (before, now) = (lost(&without), lost(&ours));
    assert!(2.0 * now.0 < before.0, "{now:?}, without {before:?}");
    assert!(2.0 * now.1 < before.1, "{now:?}, without {before:?}");
    let ratio = now.1 / now.0;
    assert!((0.5..2.0).contains(&ratio), "{now:?}");
    // The bytes of the slots and of the bases are all that the experts take.
    let config = checkpoint.config();
    let counts = config.parameters();
    let slots = ours.layers.iter().flat_map(|layer| &layer.slots);
    let of_slots: u64 = slots.map(|slot| slot.bytes.unwrap()).sum();
    let rest = counts.total() - counts.routed_experts + 2 * config.expert_parameters();
    let file = std::fs::read(folder.path().join("built/model.safetensors")).unwrap();
    let head = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
    assert_eq!(head + of_slots + 2 * rest, file.len() as u64);
    let text = serde_json::to_vec(&ours).unwrap();
    assert_eq!(Plan::decode(&text).unwrap(), ours);
}

/// Where they are the same expert, that is all that is left of them, and nothing is lost.
#[test]
fn equal_experts_become_their_base() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = upcycled(0.0, &folder);
    let seen = seen(&checkpoint, &folder);
    let ours = planned(&checkpoint, &seen, Target::Damage(1e-6), 1);
    let is_base = |slot: &SlotPlan| {
        matches!(
            slot.form,
            SlotForm::Adapted {
                group: Some(0),
                rank: 0,
                ..
            }
        )
    };
    let slots = || ours.layers.iter().flat_map(|layer| &layer.slots);
    assert!(slots().all(is_base));
    let samples = samples(1);
    let original = log_probabilities(&Decoder::load(&checkpoint).unwrap(), &samples);
    let built = built(&checkpoint, &ours, &seen, &folder);
    let now = log_probabilities(&Decoder::load(&built).unwrap(), &samples);
    assert!(divergence(&original, &now).abs() < 1e-3);
}

/// Experts with nothing in common have no base to be tried, and a user may do without.
#[test]
fn a_base_must_tell_of_its_experts() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = upcycled(50.0, &folder);
    let seen = seen(&checkpoint, &folder);
    for layer in &seen.layers {
        assert!(layer.damage.as_ref().unwrap().difference.is_none());
    }
    assert_eq!(
        budgeted(&checkpoint, &seen, 0.5, 1).layers,
        budgeted(&checkpoint, &seen, 0.5, 0).layers
    );
    let refuse = |options: &PlanOptions| {
        let (config, ratio) = (checkpoint.config(), Target::Ratio(0.5));
        let refused = plan(config, &seen, ratio, MethodName::Budget, options);
        refused.unwrap_err().to_string()
    };
    let message = refuse(&options(1, 2));
    assert!(message.contains("one base a layer"), "{message}");
    let message = refuse(&PlanOptions {
        base: BaseInit::Common,
        ..options(1, 1)
    });
    assert!(message.contains("`common`"), "{message}");
}

/// Costs from 1 on and losses that fall to nothing.
fn menu(steps: &[(u64, f64)], first: u64) -> Vec<Point> {
    let mut points = vec![Point {
        cost: first,
        loss: 20.0,
    }];
    for (cost, loss) in steps {
        let last = points[points.len() - 1].cost;
        points.push(Point {
            cost: last + cost,
            loss: *loss,
        });
    }
    points[steps.len()].loss = 0.0;
    points
}

/// What a choice costs and loses.
fn total(offers: &[Offer], chosen: &Chosen) -> (u64, f64) {
    let mut places = chosen.places.iter();
    let (mut cost, mut loss) = (0, 0.0);
    for (offer, &base) in offers.iter().zip(&chosen.bases) {
        let menus = match &offer.shared {
            Some(shared) if base => {
                cost += shared.base;
                &shared.menus
            }
            _ => &offer.alone,
        };
        for (menu, &place) in menus.iter().zip(&mut places) {
            cost += menu[place].cost;
            loss += menu[place].loss;
        }
    }
    (cost, loss)
}

/// Steps of the menus of a layer, what a base costs, and how much less is lost beside one.
type LayerCase = (Vec<Vec<(u64, f64)>>, u64, Option<f64>);

proptest! {
    /// With bases too a larger budget never loses more, none is exceeded, and no plan is worse than the one
    /// without bases.
    #[test]
    fn damage_never_rises_with_the_budget(
        layers in prop::collection::vec(
            (
                prop::collection::vec(prop::collection::vec((1u64..9, 0.0f64..5.0), 1..5), 3),
                1u64..12,
                prop::option::of(0.0f64..1.0),
            ),
            1..4,
        ),
    ) {
        let offer = |(slots, base, factor): &LayerCase| {
            let alone: Vec<Vec<Point>> = slots.iter().map(|steps| menu(steps, 1)).collect();
            let better = |factor: f64, menu: &Vec<Point>| {
                let less = menu.iter().map(|p| Point { loss: factor * p.loss, ..*p });
                let base = Point { cost: 0, loss: 20.0 * factor };
                std::iter::once(base).chain(less).collect()
            };
            let shared = factor.map(|factor| Shared {
                base: *base,
                menus: alone.iter().map(|menu| better(factor, menu)).collect(),
            });
            Offer { alone, shared }
        };
        let offers: Vec<Offer> = layers.iter().map(offer).collect();
        let bare: Vec<Offer> = offers
            .iter()
            .map(|offer| Offer { alone: offer.alone.clone(), shared: None })
            .collect();
        let slots = 3 * offers.len() as u64;
        let most: u64 = offers
            .iter()
            .flat_map(|offer| &offer.alone)
            .map(|menu| menu[menu.len() - 1].cost)
            .sum();
        let mut before = f64::INFINITY;
        for budget in slots..=most {
            let limit = Limit::Cost(budget);
            let (cost, loss) = total(&offers, &spend_with_bases(&offers, limit).unwrap());
            prop_assert!(cost <= budget);
            prop_assert!(loss <= before + 1e-9, "{budget}: {loss} after {before}");
            let (_, without) = total(&bare, &spend_with_bases(&bare, limit).unwrap());
            prop_assert!(loss <= without + 1e-9);
            before = loss;
            let allowed = spend_with_bases(&offers, Limit::Loss(loss)).unwrap();
            prop_assert!(total(&offers, &allowed).1 <= loss + 1e-9);
        }
        prop_assert_eq!(before, 0.0);
        let curve = curve_with_bases(&offers, 9);
        prop_assert!(curve.len() <= 9 && curve.is_sorted_by(|a, b| a.cost < b.cost));
        prop_assert!(curve.is_sorted_by(|a, b| a.loss >= b.loss));
        prop_assert_eq!(curve[curve.len() - 1], Point { cost: most, loss: 0.0 });
    }
}
