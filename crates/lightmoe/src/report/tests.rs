mod evidence;

use super::*;
use crate::results::tests::sample;
use crate::verdict::{Thresholds, judge};
use evidence::{coverage, evidence};
use lightmoe_compress::Sensitivity;
use lightmoe_compress::plan::{CurvePoint, SlotForm};

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

/// The same names are not enough: what they name may have changed, and the items be fewer.
#[test]
fn runs_on_other_things_are_no_rivals() {
    let inputs = |model: &str, data: &str| {
        Some(Inputs {
            model: model.to_owned(),
            data: data.to_owned(),
            lightmoe: "0.1.0".to_owned(),
        })
    };
    let rivals = |change: &dyn Fn(&mut Sibling)| {
        let mut evidence = evidence();
        evidence.inputs = inputs("model", "data");
        evidence.siblings.truncate(1);
        evidence.siblings[0].inputs = evidence.inputs.clone();
        change(&mut evidence.siblings[0]);
        page(&evidence)
            .matches("<th scope=\"row\">better</th>")
            .count()
    };
    assert_eq!(rivals(&|_| {}), 1);
    assert_eq!(rivals(&|other| other.inputs = None), 1);
    assert_eq!(rivals(&|other| other.inputs = inputs("other", "data")), 0);
    assert_eq!(rivals(&|other| other.inputs = inputs("model", "other")), 0);
    let fewer = |other: &mut Sibling| {
        let stages = other.results.stages.values_mut();
        let scores = stages.flat_map(|tasks| tasks.values_mut());
        scores
            .flat_map(|s| s.values_mut())
            .for_each(|score| score.n = 7);
    };
    assert_eq!(rivals(&fewer), 0);
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
        sensitivity: Sensitivity::Fisher,
        bytes: 500,
        predicted: 0.001,
        curve: vec![point(200, 1.0), point(600, 1e-4), point(1000, 0.0)],
    });
    for slot in &mut plan.layers[2].slots {
        slot.form = SlotForm::adapted(None, 3, false);
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
