use super::*;
use crate::results::tests::sample;
use lightmoe_compress::methods::{MethodName, PlanOptions};
use lightmoe_compress::plan::{CurvePoint, ModelSummary, Parameters, Ratio, SlotForm, SlotPlan};

/// A plan of 6 layers with 32 experts: of each five experts, two are kept.
fn plan() -> Plan {
    let slot = |layer: usize, expert: usize| SlotPlan {
        expert,
        form: if (expert * 7 + layer * 3) % 5 < 2 {
            SlotForm::Dense
        } else {
            SlotForm::Adapted {
                group: Some((expert + layer) % 3),
                rank: 4,
                dominant: expert / 3 == 1,
            }
        },
        score: (1 + (expert * 13 + layer * 5) % 32) as f64 / 528.0,
        weight: None,
        bytes: None,
        damage: None,
    };
    let layer = |layer: usize| LayerPlan {
        layer,
        threshold: Some(0.3 + 0.02 * layer as f64),
        router_norm: Some(1.5 - 0.1 * layer as f64),
        main: None,
        factored: None,
        groups: 3,
        slots: (0..32).map(|expert| slot(layer, expert)).collect(),
    };
    Plan {
        schema_version: 1,
        method: MethodName::Lightmoe,
        model: ModelSummary {
            family: "olmoe".to_owned(),
            hidden_size: 128,
            intermediate_size: 64,
            num_experts: 32,
            top_k: 4,
            layers: 6,
        },
        settings: PlanOptions {
            rank: 4,
            ..PlanOptions::default()
        }
        .settings(),
        ratio: Ratio {
            target: Some(0.5),
            achieved: 0.502,
        },
        p_hat: Some(0.35),
        parameters: Parameters {
            before: 3_560_000,
            after: 1_772_880,
            trained: 240_000,
        },
        damage: None,
        layers: (0..6).map(layer).collect(),
    }
}

fn coverage() -> Vec<LayerCoverage> {
    let tokens = |layer: u64, expert: u64| match (expert * 31 + layer * 17) % 29 {
        0 => 0,
        n => n * n * 7,
    };
    let layer = |layer: u64| {
        let tokens: Vec<_> = (0..32).map(|expert| tokens(layer, expert)).collect();
        let sum: u64 = tokens.iter().sum();
        LayerCoverage {
            layer: layer as usize,
            share: tokens.iter().map(|&t| t as f64 / sum as f64).collect(),
            tokens_per_expert: tokens,
        }
    };
    (0..6).map(layer).collect()
}

fn curve() -> Vec<Point> {
    let point = |step: usize| {
        let x = step as f64;
        Point {
            step,
            loss: 0.6 + 2.4 * (-x / 60.0).exp() + 0.08 * (x * 1.7).sin() * (x * 0.31).cos(),
            balance: None,
            distance: None,
            lr: 1e-3,
            beta: (1.0 - x / 150.0).max(0.0),
            grad_norm: 1.0,
            tokens: 2048,
        }
    };
    (0..300).map(point).collect()
}

fn page(results: &Results, recipe: &str) -> String {
    render(results, &plan(), &coverage(), &curve(), recipe).unwrap()
}

#[test]
fn the_page_stands_alone() {
    let page = page(&sample(), "[model]\npath = \"tiny-olmoe\"\n");
    for outside in [
        "http://", "https://", "<script", "<link", "<img", "@import", "url(", "src=",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(
        !page.contains("NaN") && !page.contains("inf,"),
        "a number is not finite"
    );
    for part in [
        "Go:",
        "Results",
        "Coverage",
        "Thresholds",
        "Recovery",
        "0.554 ± 0.022",
    ] {
        assert!(page.contains(part), "{part}");
    }
    if let Some(path) = std::env::var_os("LIGHTMOE_REPORT_SAMPLE") {
        std::fs::write(path, &page).unwrap();
    }
}

#[test]
fn every_expert_appears_in_both_grids() {
    let page = page(&sample(), "");
    for layer in 0..6 {
        for expert in 0..32 {
            let name = format!("<title>Layer {layer}, expert {expert}: ");
            assert_eq!(page.matches(&name).count(), 2, "{name}");
        }
    }
    let silent: usize = coverage()
        .iter()
        .map(|c| c.tokens_per_expert.iter().filter(|&&t| t == 0).count())
        .sum();
    assert!(silent > 0);
    assert_eq!(page.matches("class=\"silent\"").count(), silent + 1);
}

#[test]
fn names_are_escaped() {
    let mut results = sample();
    results.model = "<script>alert(1)</script>".to_owned();
    for tasks in results.stages.values_mut() {
        let scores = tasks.get_mut("math").unwrap();
        let score = scores["exact_match"];
        scores.insert("<b>\"&".to_owned(), score);
    }
    let page = page(&results, "</pre><script>");
    assert!(!page.contains("<script") && !page.contains("<b>\""));
    assert!(page.contains("&lt;script&gt;alert(1)"));
}

#[test]
fn what_was_not_done_is_left_out() {
    let mut results = sample();
    results.stages.clear();
    results.ratio.target = None;
    let mut plan = plan();
    plan.p_hat = None;
    for layer in &mut plan.layers {
        (layer.threshold, layer.router_norm) = (None, None);
        for slot in &mut layer.slots {
            slot.form = SlotForm::Dense;
        }
        layer.groups = 0;
    }
    let page = render(&results, &plan, &[], &[], "").unwrap();
    for part in [
        "Coverage",
        "Thresholds",
        "<h2>Damage",
        "Recovery",
        "asked for",
        "dominant of",
    ] {
        assert!(!page.contains(part), "{part}");
    }
    assert!(page.contains("Undecided:"));
}

/// Ranks stand in the squares, and the size that was chosen on the curve of all.
#[test]
fn a_plan_by_damage_is_drawn() {
    let mut plan = plan();
    let point = |bytes, damage| CurvePoint { bytes, damage };
    plan.damage = Some(PlanDamage {
        bytes: 500,
        predicted: 0.001,
        curve: vec![point(200, 1.0), point(600, 1e-4), point(1000, 0.0)],
    });
    for slot in &mut plan.layers[2].slots {
        slot.form = SlotForm::Adapted {
            group: None,
            rank: 3,
            dominant: false,
        };
        slot.damage = Some(0.25e-3);
    }
    let page = render(&sample(), &plan, &[], &[], "").unwrap();
    for part in [
        "<h2>Damage",
        "50.0%: 1.00e-3 nats",
        "rank 3, score",
        "expected damage 2.50e-4 nats a token",
        ">1e-4</text>",
    ] {
        assert!(page.contains(part), "{part}");
    }
    // Nothing to draw where no size costs anything.
    let free = plan.damage.as_mut().unwrap();
    free.predicted = 0.0;
    free.curve = vec![point(200, 0.0), point(1000, 0.0)];
    let page = render(&sample(), &plan, &[], &[], "").unwrap();
    assert!(!page.contains("<h2>Damage"));
}

#[test]
fn a_curve_that_breaks_off_is_drawn_as_far_as_it_goes() {
    let mut curve = curve();
    for point in &mut curve[200..] {
        point.loss = f64::NAN;
    }
    let page = render(&sample(), &plan(), &[], &curve, "").unwrap();
    assert!(page.contains("polyline class=\"loss\""));
    assert!(!page.contains("NaN,") && !page.contains(",NaN"));
}
