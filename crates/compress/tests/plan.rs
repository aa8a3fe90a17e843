//! The plan side of the method: thresholds, groups, ratios, refusals and the file.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{golden, observations, olmoe, options, published, small};
use lightmoe_compress::methods::{BaseInit, MethodName, PlanOptions, Target, plan};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{Plan, SlotForm, SlotPlan};
use lightmoe_compress::size::LayerSize;
use lightmoe_compress::{Error, Result, estimate};
use lightmoe_models::config::ModelConfig;

fn lightmoe(config: &ModelConfig, seen: &Observations, target: Target) -> Result<Plan> {
    let options = PlanOptions::default();
    plan(config, seen, target, MethodName::Lightmoe, &options)
}

#[track_caller]
fn assert_refused<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else {
        panic!("accepted, expected a refusal with {words:?}");
    };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn the_search_hits_the_ratio() {
    for config in [olmoe(), published("deepseek-v2-lite.json")] {
        for seed in 0..3 {
            let seen = observations(&config, seed);
            for target in [0.1, 0.3, 0.4, 0.5, 0.7] {
                let plan = lightmoe(&config, &seen, Target::Ratio(target)).unwrap();
                let counts = plan.parameters;
                let real = 1.0 - counts.after as f64 / counts.before as f64;
                assert!((real - target).abs() < 0.003, "{real} for {target}");
                assert_eq!(plan.ratio.achieved, real);
                assert_eq!(plan.ratio.target, Some(target));
            }
        }
    }
}

/// Table 8 and Table 9 of the paper together: at the totals of the one, a search replaces the
/// average counts of the other.
#[test]
fn the_published_totals_replace_the_published_counts() {
    let config = olmoe();
    for (total, replaced) in [(4.82e9, 24.4), (4.14e9, 31.4), (3.47e9, 38.1)] {
        let ratio = 1.0 - total / config.parameters().total() as f64;
        // Dealt groups never dissolve, so that the count is the plain one.
        let mut seen = observations(&config, 5);
        for layer in &mut seen.layers {
            layer.similarity = None;
        }
        let plan = lightmoe(&config, &seen, Target::Ratio(ratio)).unwrap();
        let mean = plan.mean_replaced();
        assert!((mean - replaced).abs() < 0.1, "{mean} for {replaced}");
        assert_eq!(plan.parameters.trained, 452_984_832);
    }
}

#[test]
fn the_threshold_found_gives_the_same_plan_again() {
    let config = olmoe();
    let seen = observations(&config, 1);
    let searched = lightmoe(&config, &seen, Target::Ratio(0.4)).unwrap();
    let p_hat = searched.p_hat.unwrap();
    let mut again = lightmoe(&config, &seen, Target::Threshold(p_hat)).unwrap();
    assert_eq!(again.ratio.target, None);
    again.ratio.target = Some(0.4);
    assert_eq!(again, searched);
}

#[test]
fn layers_with_larger_router_norms_get_lower_thresholds() {
    let config = olmoe();
    let mut seen = observations(&config, 2);
    let plan = lightmoe(&config, &seen, Target::Threshold(0.2)).unwrap();
    let thresholds: Vec<f64> = plan.layers.iter().map(|l| l.threshold.unwrap()).collect();
    assert!(thresholds.windows(2).all(|pair| pair[0] > pair[1]));
    assert!(thresholds.iter().all(|p| (0.16..=0.24).contains(p)));
    // Norms 100, 130, ..., 550: mean 325.
    let first = 0.2 * (-0.3_f64 * (100.0 / 325.0 - 1.0)).exp().min(1.2);
    assert!((thresholds[0] - first).abs() < 1e-12);
    seen.layers[3].router_norm = None;
    let plan = lightmoe(&config, &seen, Target::Threshold(0.2)).unwrap();
    assert!(plan.layers.iter().all(|l| l.threshold == Some(0.2)));
    assert_eq!(plan.layers[2].router_norm, Some(160.0));
}

#[test]
fn a_layer_with_too_few_selected_stays_untouched() {
    let config = small(2, 8);
    let mut seen = observations(&config, 3);
    seen.layers[0].gate_mass = vec![1.0, 1.0, 1.0, 1.0, 90.0, 90.0, 90.0, 90.0];
    seen.layers[1].gate_mass = vec![1.0; 8];
    let make = |groups| {
        let options = PlanOptions {
            max_delta: 0.0,
            ..options(2, groups)
        };
        let target = Target::Threshold(0.3);
        plan(&config, &seen, target, MethodName::Lightmoe, &options)
    };
    // Layer 0: 94/364 = .258 and 184/364 = .505, so six experts are selected. Layer 1: 3/8 = .375,
    // so three, as many as there are bases.
    let plan = make(3).unwrap();
    let [first, second] = &plan.layers[..] else {
        panic!("{} layers", plan.layers.len());
    };
    assert!(first.groups > 0 && (4..=6).contains(&first.replaced()));
    assert_eq!((second.groups, second.replaced()), (0, 0));
    assert!(second.slots.iter().all(|s| s.form == SlotForm::Dense));
    assert_eq!(second.threshold, Some(0.3));
    assert_eq!(second.slots[5].score, 0.125);
    let saved = plan.parameters.before - plan.parameters.after;
    assert_eq!(
        saved,
        LayerSize::of(&config, first, &options(2, 2).settings()).saved()
    );
    assert_refused(make(6), &["0.3", "no expert"]);
}

#[test]
fn the_baselines_differ_only_in_their_bases() {
    let config = olmoe();
    let seen = observations(&config, 4);
    let target = Target::Threshold(0.2);
    let make = |method, groups| plan(&config, &seen, target, method, &options(16, groups)).unwrap();
    let alone = make(MethodName::Replace, 0);
    let one = make(MethodName::Replace, 1);
    let replaced = |plan: &Plan, layer: usize| -> Vec<usize> {
        let slots = plan.layers[layer].slots.iter();
        slots
            .filter(|s| s.form.is_replaced())
            .map(|s| s.expert)
            .collect()
    };
    for layer in 0..16 {
        assert_eq!(replaced(&alone, layer), replaced(&one, layer));
        assert_eq!(alone.layers[layer].groups, 0);
        assert_eq!(one.layers[layer].groups, 1);
        assert!(alone.layers[layer].slots.iter().all(|s| matches!(
            s.form,
            SlotForm::Dense
                | SlotForm::Adapted {
                    group: None,
                    rank: 16,
                    bias: false,
                    dominant: false
                }
        )));
        assert_eq!(
            one.layers[layer].members(0).count(),
            one.layers[layer].replaced()
        );
    }
    assert_eq!(
        one.parameters.after - alone.parameters.after,
        16 * config.expert_parameters()
    );
    assert_eq!(alone.parameters.trained, 150_994_944);
}

#[test]
fn lora_keeps_everything() {
    let config = olmoe();
    let seen = observations(&config, 0);
    let target = Target::Ratio(0.5);
    let plan = plan(&config, &seen, target, MethodName::Lora, &options(48, 3)).unwrap();
    assert_eq!(plan.parameters.trained, 452_984_832);
    assert_eq!(plan.parameters.after, plan.parameters.before);
    assert_eq!((plan.ratio.achieved, plan.ratio.target), (0.0, None));
    assert_eq!((plan.settings.kept_rank, plan.settings.groups), (48, 0));
    assert_eq!((plan.p_hat, plan.mean_replaced()), (None, 0.0));
}

#[test]
fn impossible_requests_fail_at_once() {
    let config = olmoe();
    let seen = observations(&config, 0);
    let ask = |target, method, options| plan(&config, &seen, target, method, &options);
    let third = Target::Ratio(0.3);
    let lightmoe = MethodName::Lightmoe;
    assert_refused(ask(third, lightmoe, options(1025, 3)), &["rank", "1024"]);
    assert_refused(ask(third, lightmoe, options(700, 3)), &["rank", "as large"]);
    assert_refused(ask(third, lightmoe, options(16, 65)), &["groups", "64"]);
    assert_refused(ask(third, lightmoe, options(16, 0)), &["replace"]);
    let replace = MethodName::Replace;
    assert_refused(ask(third, replace, options(16, 2)), &["lightmoe"]);
    assert_refused(ask(third, replace, options(0, 0)), &["rank 0"]);
    assert_refused(ask(third, MethodName::Lora, options(0, 0)), &["rank 0"]);
    for ratio in [1.0, -0.1, f64::NAN, 30.0] {
        let refused = ask(Target::Ratio(ratio), lightmoe, options(16, 3));
        assert_refused(refused, &["ratio", "between 0 and 1"]);
    }
    let far = ask(Target::Ratio(0.95), lightmoe, options(16, 3));
    assert_refused(far, &["0.95", "cannot be reached", " to 0.86"]);
    let nothing = ask(Target::Threshold(1e-9), lightmoe, options(16, 3));
    assert_refused(nothing, &["no expert"]);
    let negative = PlanOptions {
        alpha: -1.0,
        ..PlanOptions::default()
    };
    assert_refused(ask(third, lightmoe, negative), &["alpha"]);
    let other = observations(&small(2, 8), 0);
    let refused = plan(&config, &other, third, lightmoe, &options(16, 3));
    assert_refused(refused, &["layers", "observe"]);
}

#[test]
fn an_estimate_needs_no_observations() {
    let config = olmoe();
    let paper = PlanOptions::default();
    for (ratio, replaced) in [(0.3034, 24.4), (0.4017, 31.4), (0.4985, 38.1)] {
        let forecast = estimate(&config, ratio, MethodName::Lightmoe, &paper).unwrap();
        let error = forecast.experts_replaced_per_layer - replaced;
        assert!(error.abs() < 0.1, "{forecast:?}");
        assert_eq!(forecast.parameters_trained, 452_984_832);
        assert_eq!(forecast.bytes_before, 2 * 6_919_161_856);
        let after = forecast.parameters_after as f64 / forecast.parameters_before as f64;
        assert!((1.0 - after - ratio).abs() < 1e-9);
        assert_eq!(forecast.bytes_after, 2 * forecast.parameters_after);
    }
    assert_refused(
        estimate(&config, 0.9, MethodName::Lightmoe, &paper),
        &["0.9", "0.86"],
    );
    assert_refused(
        estimate(&config, 1.5, MethodName::Lightmoe, &paper),
        &["ratio"],
    );
    assert_refused(
        estimate(&config, 0.3, MethodName::Lightmoe, &options(2000, 3)),
        &["rank"],
    );
}

#[test]
fn method_names_round_trip() {
    for method in MethodName::ALL {
        assert_eq!(method.to_string().parse::<MethodName>().unwrap(), method);
        let json = serde_json::to_string(&method).unwrap();
        assert_eq!(json, format!("\"{method}\""));
    }
    assert_refused("prune".parse::<MethodName>(), &["prune", "`lightmoe`"]);
    let base = serde_json::to_string(&BaseInit::GateWeighted).unwrap();
    assert_eq!(base, "\"gate-weighted\"");
}

fn small_plan() -> (ModelConfig, Plan) {
    let config = small(2, 8);
    let mut seen = observations(&config, 0);
    for (layer, shift) in seen.layers.iter_mut().zip([0, 3]) {
        layer.gate_mass = (0..8).map(|e| f64::from((e * 5 + shift) % 8 + 1)).collect();
    }
    // Layer 0 by similarity, layer 1 dealt out.
    let like = |a: usize, b: usize| (a as f64 - b as f64).cos();
    let pairs = (0..64).map(|i| like(i / 8, i % 8));
    seen.layers[0].similarity = Some(pairs.collect());
    seen.layers[1].similarity = None;
    let target = Target::Threshold(0.6);
    // Both thresholds are clipped, so that no exponential of the platform enters the file.
    let options = PlanOptions {
        max_delta: 0.03,
        ..options(2, 2)
    };
    let plan = plan(&config, &seen, target, MethodName::Lightmoe, &options).unwrap();
    (config, plan)
}

#[test]
fn the_plan_file_is_the_documented_one() {
    let (config, plan) = small_plan();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    plan.save(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let expected = std::fs::read_to_string(golden("plan.json")).unwrap_or_default();
    if text != expected {
        let actual = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan.json");
        std::fs::write(&actual, &text).unwrap();
        let (actual, golden) = (actual.display(), golden("plan.json"));
        panic!(
            "the plan differs; if that is meant: cp {actual} {}",
            golden.display()
        );
    }
    let loaded = Plan::load(&path).unwrap();
    assert_eq!(loaded, plan);
    loaded.check_model(&config).unwrap();
    assert_refused(loaded.check_model(&small(3, 8)), &["plan again"]);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "a temporary file was left");
}

#[test]
fn the_slot_form_reads_as_documented() {
    let (_, plan) = small_plan();
    let mut json = serde_json::to_value(&plan).unwrap();
    let slot = serde_json::json!(
        {"expert": 5, "form": "adapted", "score": 0.01, "group": 1, "rank": 16, "dominant": false}
    );
    json["layers"][0]["slots"][5] = slot;
    let edited: Plan = serde_json::from_value(json).unwrap();
    let form = SlotForm::adapted(Some(1), 16, false);
    assert_eq!(edited.layers[0].slots[5].form, form);
}

#[test]
fn an_edited_plan_is_recounted() {
    let (config, mut plan) = small_plan();
    let before = plan.clone();
    plan.recount(&config);
    assert_eq!(plan, before);
    let follower = |slot: &&mut SlotPlan| {
        let form = slot.form;
        matches!(form, SlotForm::Adapted { dominant, .. } if !dominant)
    };
    let mut slots = plan.layers[0].slots.iter_mut();
    let slot = slots.rfind(follower).unwrap();
    slot.form = SlotForm::Dense;
    plan.recount(&config);
    let gained = plan.parameters.after - before.parameters.after;
    assert_eq!(gained, 3 * 32 * 16 - 3 * 2 * (32 + 16));
    assert_eq!(plan.parameters.trained, before.parameters.trained);
    assert!(plan.ratio.achieved < before.ratio.achieved);
}

#[test]
fn a_broken_plan_names_the_layer_and_the_slot() {
    let (_, plan) = small_plan();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    let json = serde_json::to_value(&plan).unwrap();
    let slots = json["layers"][1]["slots"].as_array().unwrap();
    let dominant = slots.iter().position(|s| s["dominant"] == true).unwrap();
    let broken = |words: &[&str], change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        let refused = Plan::load(&path);
        assert!(matches!(refused, Err(Error::Plan { .. })));
        assert_refused(refused, words);
    };
    let slot = format!("slot {dominant}");
    let slot = slot.as_str();
    broken(&["plan.json", "schema version 9"], &|j| {
        j["schema_version"] = 9.into();
    });
    broken(&["layer 1", slot, "rank 17", "16"], &|j| {
        j["layers"][1]["slots"][dominant]["rank"] = 17.into();
    });
    // Or counting its parameters would overflow.
    broken(&["settings", "kept_rank", "16"], &|j| {
        j["settings"]["kept_rank"] = u64::MAX.into();
    });
    broken(&["layer 1", slot, "group 2"], &|j| {
        j["layers"][1]["slots"][dominant]["group"] = 2.into();
    });
    broken(&["layer 1", "dominant"], &|j| {
        j["layers"][1]["slots"][dominant]["dominant"] = false.into();
    });
    broken(&["layer 1", "slot 3", "expert 2"], &|j| {
        j["layers"][1]["slots"][3]["expert"] = 2.into();
    });
    broken(&["layer 1", "7 slots"], &|j| {
        j["layers"][1]["slots"].as_array_mut().unwrap().pop();
    });
    broken(&["layer 1", "groups"], &|j| {
        j["layers"][1]["groups"] = 1_000_000_000_000_u64.into();
    });
    broken(&["layer 1", "ascend"], &|j| {
        j["layers"][0]["layer"] = 1.into();
    });
    broken(&["not a plan", "`prune`"], &|j| {
        j["method"] = "prune".into();
    });
    broken(&["layer 1", slot, "score"], &|j| {
        j["layers"][1]["slots"][dominant]["score"] = (-1.0).into();
    });
}
