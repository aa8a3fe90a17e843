use super::*;
use crate::contrast::{Answer, AnswerPair, LoadPair};
use crate::results::tests::sample;
use crate::settings::Settings;
use crate::verdict::{Thresholds, judge};
use lightmoe_compress::methods::{MethodName, PlanOptions};
use lightmoe_compress::plan::{CurvePoint, ModelSummary, Parameters, Ratio, SlotForm, SlotPlan};
use serde_json::json;

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

/// Every layer's load, one answer that is the same and one that is not.
fn contrast() -> Contrast {
    let load = |layer: usize| {
        let tokens = |shift: usize| (0..32).map(move |e| ((e * 7 + layer + shift) % 19) as u64);
        LoadPair {
            layer,
            original: tokens(0).collect(),
            result: tokens(3).collect(),
        }
    };
    let answer = |text: &str| Answer {
        text: text.to_owned(),
        whole: true,
    };
    let pair = |result: &str| AnswerPair {
        prompt: "How many stones?".to_owned(),
        target: "12".to_owned(),
        original: answer("it is 12"),
        result: answer(result),
    };
    Contrast {
        schema_version: 1,
        task: "math".to_owned(),
        examples: 40,
        tokens: 1234,
        load: (0..6).map(load).collect(),
        answers: vec![pair("it is 12"), pair("it is 13")],
    }
}

/// A model that strays, the later the layer the less.
fn divergence() -> DivergenceFile {
    let estimate = |value: f64| json!({"value": value, "stderr": 0.1 * value});
    let distance = |kl: f64| json!({"kl": estimate(kl), "top1_agreement": estimate(1.0 - kl), "nll_increase": estimate(kl)});
    let layers: Vec<_> = (0..6)
        .map(|layer| {
            let mut of_layer = distance(0.06 / f64::from(layer + 1));
            of_layer["layer"] = json!(layer);
            of_layer
        })
        .collect();
    let model = json!({"name": "m", "fingerprint": "f"});
    let text = json!({
        "name": "math", "fingerprint": "f", "rows": 40, "tokens": 160,
        "whole": distance(0.125), "layers": layers,
        "kl_quantiles": {"median": 0.01, "p99": 2.5, "max": 3.25},
        "perplexity": {"original": 2.0, "compressed": 2.2, "ratio": 1.1, "ratio_stderr": 0.01},
    });
    let file = json!({
        "schema_version": 1, "lightmoe_version": "0.1.0", "original": model, "compressed": model,
        "texts": [text],
    });
    serde_json::from_value(file).unwrap()
}

/// The recipe of the sample.
fn recipe(settings: &str) -> Recipe {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/olmoe-nano");
    let config = Path::new(folder).join("config.json");
    let config = lightmoe_models::ModelConfig::from_file(&config).unwrap();
    Recipe::resolve(Settings::parse(settings).unwrap(), &config).unwrap()
}

fn sibling(name: &str, bytes: u64, score: f64) -> Sibling {
    let mut results = sample();
    results.bytes.after = bytes;
    let tasks = results.stages.get_mut(&Stage::Recovered).unwrap();
    let scores = tasks.get_mut("math").unwrap();
    scores.get_mut("exact_match").unwrap().value = score;
    Sibling {
        name: name.to_owned(),
        results,
    }
}

/// All that a page can show.
fn evidence() -> Evidence {
    let mut other = sibling("other", 1, 1.0);
    other.results.task = "code".to_owned();
    Evidence {
        run: PathBuf::from("runs/mine"),
        results: sample(),
        inputs: None,
        plan: plan(),
        recipe: recipe("seed = 7"),
        coverage: coverage(),
        curve: curve(),
        contrast: Some(contrast()),
        divergence: Some(divergence()),
        siblings: vec![
            sibling("better", 6_000_000, 0.56),
            sibling("worse", 8_000_000, 0.5),
            other,
        ],
    }
}

fn judged(mut evidence: Evidence, thresholds: &str) -> Evidence {
    let thresholds: Thresholds = toml::from_str(thresholds).unwrap();
    evidence.results.verdict = judge(&evidence.results.measured(), &thresholds).unwrap();
    evidence
}

fn page(evidence: &Evidence) -> String {
    render(evidence).unwrap()
}

#[test]
fn the_page_stands_alone() {
    let page = page(&judged(evidence(), "min_score = 0.97"));
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
        "Go</span>",
        "<h2>Scores",
        "<h2>Among other runs",
        "<h2>Load of the experts",
        "<h2>Divergence",
        "<title>Layer 1: 0.0300</title>",
        "<td>0.1250 ± 0.0125</td>",
        "<h2>Coverage",
        "<h2>Thresholds",
        "<h2>Recovery",
        "<h2>Answers",
        "lightmoe compress --recipe runs&#x2f;mine&#x2f;recipe.toml --out runs&#x2f;mine-again",
        "0.554 ± 0.022",
    ] {
        assert!(page.contains(part), "{part}");
    }
    if let Some(path) = std::env::var_os("LIGHTMOE_REPORT_SAMPLE") {
        std::fs::write(path, &page).unwrap();
    }
}

#[test]
fn every_expert_appears_in_every_grid() {
    let page = page(&evidence());
    for layer in 0..6 {
        for expert in 0..32 {
            let name = format!("<title>Layer {layer}, expert {expert}: ");
            assert_eq!(page.matches(&name).count(), 4, "{name}");
        }
    }
}

/// Crossed where nothing came, struck through where little did; the table has both.
#[test]
fn experts_that_saw_little_are_flagged() {
    let coverage = coverage();
    let tokens = || coverage.iter().flat_map(|c| &c.tokens_per_expert);
    let silent = tokens().filter(|&&t| t == 0).count();
    let few = tokens().filter(|&&t| t < coverage::FEW).count();
    assert!(silent > 0 && few > silent);
    let mut evidence = evidence();
    evidence.contrast = None;
    let page = page(&evidence);
    // One more of each in the legend.
    assert_eq!(page.matches("class=\"silent\"").count(), silent + 1);
    let strokes = page.matches("class=\"cross\"").count();
    assert_eq!(strokes, 2 * silent + (few - silent) + 2);
    assert!(page.contains(&format!("{few} of 192 experts saw fewer than 100")));
}

#[test]
fn the_verdict_is_the_thresholds_and_none_without_them() {
    let plain = page(&evidence());
    assert!(plain.contains("No thresholds, no verdict"));
    assert!(!plain.contains("class=\"word\""));
    let missed = page(&judged(evidence(), "min_score = 0.98\nmax_bytes = '8MB'"));
    for part in [
        "verdict No-go",
        "<td>missed, within the error</td><td>0.554 ± 0.062</td>\
         <td>at least 0.559 (98.0% of 0.570)</td>",
        "<td>met</td><td>6.76 MiB</td><td>at most 7.63 MiB</td><td>weights on disk</td>",
    ] {
        assert!(missed.contains(part), "{part}");
    }
}

/// The frontier, this run's mark, and the runs that cannot be compared.
#[test]
fn runs_are_held_against_each_other() {
    let page = page(&evidence());
    for part in [
        "1 more in the folder is on another model or task",
        "<th scope=\"row\">mine (this run)</th>",
        "<title>better: 5.72 MiB, exact_match 0.560 ± 0.022</title>",
    ] {
        assert!(page.contains(part), "{part}");
    }
    // `better` and the original are beaten by none; this run and `worse` by `better`.
    assert_eq!(page.matches("<td>yes</td></tr>").count(), 2);
    assert_eq!(page.matches("class=\"dot recovered\"").count(), 4);
}

/// In the folder of runs: finished ones, sorted, without the run itself and what cannot be read.
#[test]
fn finished_runs_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["b", "a", "mine", "damaged", "unfinished"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    for name in ["b", "a", "mine"] {
        sample().save(&at(name).join("results.json")).unwrap();
    }
    std::fs::write(at("damaged").join("results.json"), "{").unwrap();
    std::fs::write(at("file"), "").unwrap();
    let found = runs::siblings(folder.path(), &at("mine"));
    let names: Vec<_> = found.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(runs::siblings(&at("gone"), &at("mine")).is_empty());
    assert_eq!(beside(Path::new("mine")), Path::new("."));
    assert_eq!(beside(Path::new("runs/mine")), Path::new("runs"));
}

#[test]
fn names_are_escaped() {
    let mut evidence = evidence();
    let results = &mut evidence.results;
    results.model = "<script>alert(1)</script>".to_owned();
    for tasks in results.stages.values_mut() {
        let scores = tasks.get_mut("math").unwrap();
        let score = scores["exact_match"];
        scores.insert("<b>\"&".to_owned(), score);
    }
    evidence.recipe.model = "</pre><script>".to_owned();
    evidence.run = PathBuf::from("runs/<script>");
    let pair = &mut evidence.contrast.as_mut().unwrap().answers[1];
    pair.prompt = "<script>".to_owned();
    pair.result.text = "it is <script>".to_owned();
    let page = page(&evidence);
    assert!(!page.contains("<script") && !page.contains("<b>\""));
    assert!(page.contains("&lt;script&gt;alert(1)"));
    assert!(page.contains("<mark>&lt;script&gt;</mark>"), "{page}");
}

#[test]
fn what_was_not_done_is_left_out() {
    let mut evidence = evidence();
    evidence.results.stages.clear();
    evidence.results.ratio.target = None;
    (evidence.coverage, evidence.curve) = (Vec::new(), Vec::new());
    (evidence.contrast, evidence.divergence) = (None, None);
    let plan = &mut evidence.plan;
    plan.p_hat = None;
    for layer in &mut plan.layers {
        (layer.threshold, layer.router_norm) = (None, None);
        for slot in &mut layer.slots {
            slot.form = SlotForm::Dense;
        }
        layer.groups = 0;
    }
    let page = page(&evidence);
    for part in [
        "<h2>Coverage",
        "<h2>Thresholds",
        "<h2>Among",
        "<h2>Load",
        "<h2>Divergence",
        "<h2>Answers",
        "<h2>Damage",
        "<h2>Recovery",
        "% asked for",
        "dominant of",
    ] {
        assert!(!page.contains(part), "{part}");
    }
}

/// Ranks stand in the squares, and the size that was chosen on the curve of all.
#[test]
fn a_plan_by_damage_is_drawn() {
    let mut evidence = evidence();
    let plan = &mut evidence.plan;
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
    let page = render(&evidence).unwrap();
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
    let free = evidence.plan.damage.as_mut().unwrap();
    free.predicted = 0.0;
    free.curve = vec![point(200, 0.0), point(1000, 0.0)];
    let page = render(&evidence).unwrap();
    assert!(!page.contains("<h2>Damage"));
}

#[test]
fn a_curve_that_breaks_off_is_drawn_as_far_as_it_goes() {
    let mut evidence = evidence();
    for point in &mut evidence.curve[200..] {
        point.loss = f64::NAN;
    }
    let page = page(&evidence);
    assert!(page.contains("polyline class=\"loss\""));
    assert!(!page.contains("NaN,") && !page.contains(",NaN"));
}
