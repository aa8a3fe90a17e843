//! The counting, against eq. 5 and the published totals.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{observations, olmoe, options, published, small};
use lightmoe_compress::methods::{MethodName, PlanOptions, Target, plan};
use lightmoe_compress::plan::{LayerPlan, SlotForm, SlotPlan};
use lightmoe_compress::size::{
    active_parameters, adapter_parameters, equal_trainable_rank, parameters,
};

/// A layer of `experts` whose first `replaced` share `groups` bases.
fn layer(number: usize, experts: usize, replaced: usize, groups: usize) -> LayerPlan {
    let slots = (0..experts).map(|expert| SlotPlan {
        expert,
        form: if expert < replaced {
            SlotForm::adapted(Some(expert % groups), 16, expert < groups)
        } else {
            SlotForm::Dense
        },
        score: 1.0 / experts as f64,
        weight: None,
        bytes: None,
        damage: None,
    });
    LayerPlan {
        layer: number,
        threshold: None,
        router_norm: None,
        groups,
        main: None,
        factored: None,
        slots: slots.collect(),
    }
}

/// Eq. 5 for one layer of OLMoE-1B-7B (`N` 64, `n x m` 1024 x 2048, `R` 16), of which `replaced`
/// (`N'`) experts use `bases` (`M`) bases: `1 - ((N - N' + M) n m + N' R (n + m)) / (N n m)`.
fn expert_ratio(replaced: f64, bases: usize) -> f64 {
    let (experts, matrix) = (64.0, 1024.0 * 2048.0);
    let adapter = 16.0 * (1024.0 + 2048.0);
    let left = (experts - replaced + bases as f64) * matrix + replaced * adapter;
    1.0 - left / (experts * matrix)
}

/// Table 9's average counts give Table 8's totals.
#[test]
fn the_published_counts_give_the_published_totals() {
    let config = olmoe();
    for (mean, billions) in [(24.4, "4.82"), (31.4, "4.14"), (38.1, "3.47")] {
        let replaced = (16.0_f64 * mean).round() as usize;
        let layers: Vec<LayerPlan> = (0..16)
            .map(|l| layer(l, 64, (replaced + l) / 16, 3))
            .collect();
        let total: usize = layers.iter().map(LayerPlan::replaced).sum();
        assert_eq!(total, replaced);
        let counts = parameters(&config, &layers, &options(16, 3).settings());
        assert_eq!(counts.before, 6_919_161_856);
        assert_eq!(format!("{:.2}", counts.after as f64 / 1e9), billions);
        assert_eq!(counts.trained, 452_984_832);
    }
}

#[test]
fn the_count_is_equation_five() {
    let config = olmoe();
    let routed = config.parameters().routed_experts as f64;
    for replaced in [4, 24, 64] {
        let layers: Vec<LayerPlan> = (0..16).map(|l| layer(l, 64, replaced, 3)).collect();
        let counts = parameters(&config, &layers, &options(16, 3).settings());
        let ratio = expert_ratio(replaced as f64, 3);
        let saved = (counts.before - counts.after) as f64 / routed;
        assert!((saved - ratio).abs() < 1e-12);
    }
    // The paper's 30% of all parameters is .325 of the experts'.
    let ratio = expert_ratio(24.4, 3);
    assert!((ratio - 0.325).abs() < 0.001);
}

#[test]
fn a_real_plan_counts_as_equation_five() {
    let config = olmoe();
    let seen = observations(&config, 7);
    let options = PlanOptions::default();
    let target = Target::Ratio(0.4);
    let plan = plan(&config, &seen, target, MethodName::Lightmoe, &options).unwrap();
    let per_layer: f64 = plan
        .layers
        .iter()
        .map(|layer| expert_ratio(layer.replaced() as f64, layer.groups))
        .sum();
    let saved = per_layer / 16.0 * config.parameters().routed_experts as f64;
    let counted = (plan.parameters.before - plan.parameters.after) as f64;
    assert!((saved - counted).abs() < 1.0);
}

#[test]
fn equal_budgets() {
    let config = olmoe();
    assert_eq!(adapter_parameters(&config, 16), 147_456);
    assert_eq!(equal_trainable_rank(&config, 16, 3, 0), 48);
    assert_eq!(equal_trainable_rank(&config, 16, 3, 3), 16);
    assert_eq!(equal_trainable_rank(&config, 48, 0, 3), 16);
    assert_eq!(equal_trainable_rank(&config, 16, 0, 3), 0);
    // One base fewer is worth 10.67 ranks: 26.67, never above the budget.
    assert_eq!(equal_trainable_rank(&config, 16, 3, 2), 26);
    let deepseek = published("deepseek-v2-lite.json");
    assert_eq!(equal_trainable_rank(&deepseek, 16, 3, 0), 55);
    let config = small(2, 8);
    let seen = observations(&config, 0);
    let rank = equal_trainable_rank(&config, 2, 2, 0);
    let trained = |method, options| {
        let target = Target::Threshold(0.7);
        let plan = plan(&config, &seen, target, method, &options).unwrap();
        plan.parameters.trained
    };
    let ours = trained(MethodName::Lightmoe, options(2, 2));
    let rival = trained(MethodName::Lora, options(rank, 0));
    let step = trained(MethodName::Lora, options(rank + 1, 0)) - rival;
    assert!(rival <= ours && ours < rival + step, "{rival} {ours}");
}

/// Two of eight experts are chosen, the first alone by half of all choices.
#[test]
fn active_parameters_follow_the_choices() {
    let config = small(1, 8);
    let mut seen = observations(&config, 0);
    seen.layers[0].selections = vec![70, 10, 10, 10, 10, 10, 10, 10];
    let active = |forms: [SlotForm; 8], seen: &_| {
        let mut layer = layer(0, 8, 0, 1);
        for (slot, form) in layer.slots.iter_mut().zip(forms) {
            slot.form = form;
        }
        active_parameters(&config, &[layer], seen) as i64 - config.active_parameters() as i64
    };
    let (expert, hidden) = (config.expert_parameters() as i64, config.hidden_size as i64);
    let dense = [SlotForm::Dense; 8];
    let first = |form| {
        let mut forms = dense;
        forms[0] = form;
        forms
    };
    assert_eq!(active(dense, &seen), 0);
    let adapted = |group| SlotForm::adapted(group, 2, false);
    let adapter = adapter_parameters(&config, 2) as i64;
    // Both choices of a token, half of them the first expert's.
    assert_eq!(active(first(adapted(Some(0))), &seen), adapter);
    assert_eq!(active(first(adapted(None)), &seen), adapter - expert);
    assert_eq!(active(first(SlotForm::Constant), &seen), hidden - expert);
    // Who had chosen a removed expert chooses another.
    assert_eq!(active(first(SlotForm::Removed { into: None }), &seen), 0);
    let mut alone = [SlotForm::Removed { into: None }; 8];
    alone[3] = SlotForm::Dense;
    assert_eq!(active(alone, &seen), -expert);
    // Scores without selections weigh all slots alike.
    seen.layers[0].selections = vec![0; 8];
    let eighth = active(first(SlotForm::Constant), &seen);
    assert_eq!(eighth, (hidden - expert) / 4);
}
