//! Properties of every plan, whatever was observed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{observations, options, small};
use lightmoe_compress::methods::{MethodName, PlanOptions, Target, plan};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{LayerPlan, Plan, SlotForm};
use lightmoe_compress::select::{ascending, prefix};
use lightmoe_models::config::ModelConfig;
use proptest::prelude::*;

/// Observations with ties and unused experts.
fn coarse(config: &ModelConfig, seed: u64, similar: bool) -> Observations {
    let mut seen = observations(config, seed);
    for layer in &mut seen.layers {
        for mass in &mut layer.gate_mass {
            *mass = (*mass / 5.0).floor();
        }
        layer.gate_mass[0] = 3.0;
        if !similar {
            layer.similarity = None;
        }
    }
    seen
}

fn adapted(layer: &LayerPlan) -> Vec<usize> {
    let slots = layer.slots.iter().filter(|slot| slot.form.is_replaced());
    slots.map(|slot| slot.expert).collect()
}

fn check_groups(seen: &Observations, plan: &Plan, groups: usize) -> Result<(), TestCaseError> {
    for (observed, layer) in seen.layers.iter().zip(&plan.layers) {
        let scores = observed.importance();
        let selected = prefix(&scores, layer.threshold.unwrap());
        let replaced = adapted(layer);
        // Replaced experts are selected ones; those left over are dominants that nobody joined.
        prop_assert!(replaced.iter().all(|expert| selected.contains(expert)));
        let members: usize = (0..layer.groups).map(|g| layer.members(g).count()).sum();
        prop_assert_eq!(members, replaced.len());
        if replaced.is_empty() {
            prop_assert!(layer.groups == 0);
            continue;
        }
        prop_assert!(selected.len() > groups);
        let mut strongest = selected.clone();
        strongest.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        strongest.truncate(groups);
        for expert in &selected {
            let alone = !replaced.contains(expert);
            prop_assert!(!alone || strongest.contains(expert));
        }
        prop_assert_eq!(selected.len() - replaced.len(), groups - layer.groups);
        for group in 0..layer.groups {
            prop_assert!(layer.members(group).count() >= 2);
        }
        let Some(similarity) = &observed.similarity else {
            continue;
        };
        for slot in &layer.slots {
            let SlotForm::Adapted {
                group: Some(group),
                dominant,
                ..
            } = slot.form
            else {
                continue;
            };
            let leader = layer.slots.iter().find(|other| {
                matches!(other.form, SlotForm::Adapted { group: Some(g), dominant: true, .. } if g == group)
            });
            let leader = leader.unwrap().expert;
            prop_assert!(strongest.contains(&leader));
            if dominant {
                continue;
            }
            let like = |other: usize| similarity[slot.expert * scores.len() + other];
            prop_assert!(strongest.iter().all(|&other| like(other) <= like(leader)));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn a_selection_is_the_shortest_prefix_that_exceeds(
        masses in prop::collection::vec(0_u32..6, 1..40),
        threshold in 0.001_f64..1.2,
    ) {
        let total: u32 = masses.iter().sum();
        prop_assume!(total > 0);
        let scores: Vec<f64> = masses.iter().map(|&m| f64::from(m) / f64::from(total)).collect();
        let selected = prefix(&scores, threshold);
        prop_assert_eq!(&selected[..], &ascending(&scores)[..selected.len()]);
        let sum = |experts: &[usize]| experts.iter().fold(0.0, |s, &e| s + scores[e]);
        let whole = selected.len() == scores.len();
        prop_assert!(whole || sum(&selected) > threshold);
        prop_assert!(sum(&selected[..selected.len() - 1]) <= threshold);
    }

    #[test]
    fn a_selection_grows_with_the_threshold(
        masses in prop::collection::vec(0.0_f64..1.0, 2..40),
        low in 0.0_f64..1.0,
        more in 0.0_f64..0.5,
    ) {
        let total: f64 = masses.iter().sum();
        let scores: Vec<f64> = masses.iter().map(|m| m / total).collect();
        let (fewer, many) = (prefix(&scores, low), prefix(&scores, low + more));
        prop_assert_eq!(&many[..fewer.len()], &fewer[..]);
    }

    #[test]
    fn groups_partition_what_is_replaced(
        seed in 0_u64..1000,
        experts in 4_usize..20,
        groups in 1_usize..5,
        p_hat in 0.05_f64..0.95,
        similar in any::<bool>(),
    ) {
        let config = small(3, experts.max(groups));
        let seen = coarse(&config, seed, similar);
        let options = options(1, groups.min(experts));
        let target = Target::Threshold(p_hat);
        if let Ok(plan) = plan(&config, &seen, target, MethodName::Lightmoe, &options) {
            plan.validate().unwrap();
            plan.check_model(&config).unwrap();
            check_groups(&seen, &plan, options.groups)?;
        }
    }

    /// Whatever is within reach is hit as closely as any threshold on a fine grid hits it, and what
    /// is refused is more than the tolerated 0.3 points away from all of them.
    #[test]
    fn no_threshold_is_closer_than_the_one_found(
        seed in 0_u64..1000,
        target in 0.02_f64..0.6,
        similar in any::<bool>(),
    ) {
        let config = small(3, 12);
        let seen = coarse(&config, seed, similar);
        let options = PlanOptions { max_delta: 0.5, ..options(1, 2) };
        let make = |target| plan(&config, &seen, target, MethodName::Lightmoe, &options);
        let found = make(Target::Ratio(target));
        if let Err(error) = &found {
            let message = error.to_string();
            prop_assert!(message.contains("cannot be reached"), "{}", message);
        }
        let miss = |plan: &Plan| (plan.ratio.achieved - target).abs();
        for step in 1..400 {
            let Ok(other) = make(Target::Threshold(f64::from(step) / 400.0)) else {
                continue;
            };
            match &found {
                Ok(found) => prop_assert!(miss(found) <= miss(&other) + 1e-12),
                Err(_) => prop_assert!(miss(&other) > 0.003 - 1e-12),
            }
        }
    }
}
