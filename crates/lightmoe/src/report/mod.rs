//! The report: one HTML page with everything in it, to be read without a network, and the tables
//! for the terminal and for Markdown.

mod grids;
pub(crate) mod svg;
pub mod table;

use std::collections::BTreeMap;

use anyhow::Result;
use lightmoe_compress::plan::{LayerPlan, Plan, PlanDamage};
use lightmoe_train::Point;
use minijinja::Environment;
use serde::Serialize;

use crate::results::{Results, Score, Stage, Verdict, digits, lower_is_better};
use grids::{LayerRow, Swatch};
use svg::Whisker;
use table::{Section, bytes_text, change, thousands};

/// The template.
const TEMPLATE: &str = include_str!("report.html.jinja");
/// The style of every page, which templates know as `style`.
const STYLE: &str = include_str!("style.css");

/// What the experts of a layer saw of the sample data.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCoverage {
    /// The layer's number in the model.
    pub layer: usize,
    /// Tokens routed to each expert.
    pub tokens_per_expert: Vec<u64>,
    /// Each expert's share of the layer's gate mass.
    pub share: Vec<f64>,
}

/// What the template shows; pictures are SVG, made and escaped in [`svg`].
#[derive(Serialize)]
struct Page<'a> {
    results: &'a Results,
    saved: String,
    verdict: Advice,
    figures: Vec<Figure>,
    scores: Vec<Picture>,
    tables: Vec<Section>,
    experts: String,
    legend: Vec<Swatch>,
    kept: usize,
    replaced: usize,
    layers: Vec<LayerRow>,
    coverage: Option<String>,
    most_tokens: String,
    silent: usize,
    curve: Option<String>,
    steps: usize,
    annealed: bool,
    threshold: Option<String>,
    norm: Option<String>,
    damage: Option<Damage>,
    recipe: &'a str,
}

#[derive(Serialize)]
struct Advice {
    word: &'static str,
    sentence: &'static str,
    comparisons: Vec<String>,
}

#[derive(Serialize)]
struct Figure {
    label: &'static str,
    value: String,
    note: String,
}

#[derive(Serialize)]
struct Damage {
    predicted: String,
    svg: String,
}

#[derive(Serialize)]
struct Picture {
    name: String,
    note: String,
    svg: String,
}

/// The report as one HTML page without scripts or outside resources.
///
/// `coverage` and `curve` may be empty (nothing observed, nothing trained): their parts are then
/// left out.
///
/// # Errors
/// If the template cannot be rendered.
pub fn render(
    results: &Results,
    plan: &Plan,
    coverage: &[LayerCoverage],
    curve: &[Point],
    recipe_toml: &str,
) -> Result<String> {
    let seen = |layer: usize| coverage.iter().find(|c| c.layer == layer);
    let most = coverage.iter().flat_map(|c| &c.tokens_per_expert).max();
    let replaced: usize = plan.layers.iter().map(LayerPlan::replaced).sum();
    let experts: usize = plan.layers.iter().map(|l| l.slots.len()).sum();
    let silent = |c: &LayerCoverage| c.tokens_per_expert.iter().filter(|&&t| t == 0).count();
    let page = Page {
        results,
        saved: format!("{:.1}%", 100.0 * results.ratio.achieved),
        verdict: advice(&results.verdict()),
        figures: figures(results, replaced, experts),
        scores: scores(results),
        tables: table::sections(results),
        experts: grids::experts(plan, &seen, experts, replaced),
        legend: grids::legend(plan),
        kept: experts - replaced,
        replaced,
        layers: plan
            .layers
            .iter()
            .map(|l| grids::layer_row(l, seen(l.layer).map(silent)))
            .collect(),
        coverage: (!coverage.is_empty()).then(|| grids::coverage(coverage)),
        most_tokens: thousands(most.copied().unwrap_or(0)),
        silent: coverage.iter().map(silent).sum(),
        curve: curve_picture(curve),
        steps: curve.len(),
        annealed: curve.iter().any(|p| p.beta != 0.0),
        threshold: layer_bars(plan, "Threshold", |l| l.threshold, plan.p_hat),
        norm: layer_bars(plan, "Mean router norm", |l| l.router_norm, None),
        damage: plan.damage.as_ref().and_then(damage_picture),
        recipe: recipe_toml,
    };
    page_of(TEMPLATE, page)
}

/// A page of a template, in which every value is escaped unless marked `safe`.
///
/// # Errors
/// If the template cannot be rendered.
pub(crate) fn page_of(template: &str, values: impl Serialize) -> Result<String> {
    let mut environment = Environment::new();
    environment.add_global("style", STYLE);
    environment.add_template("page.html", template)?;
    let page = environment.get_template("page.html")?;
    Ok(page.render(minijinja::value::Serde(values))?)
}

fn advice(verdict: &Verdict) -> Advice {
    let comparisons = verdict.comparisons().iter();
    Advice {
        word: verdict.word(),
        sentence: verdict.sentence(),
        comparisons: comparisons.map(ToString::to_string).collect(),
    }
}

fn figures(results: &Results, replaced: usize, experts: usize) -> Vec<Figure> {
    let (parameters, bytes) = (results.parameters, results.bytes);
    vec![
        Figure {
            label: "Parameters",
            value: change(parameters.before, parameters.after),
            note: format!(
                "{} → {}",
                thousands(parameters.before),
                thousands(parameters.after)
            ),
        },
        Figure {
            label: "Weights on disk",
            value: change(bytes.before, bytes.after),
            note: format!("{} → {}", bytes_text(bytes.before), bytes_text(bytes.after)),
        },
        Figure {
            label: "Experts replaced",
            value: thousands(replaced as u64),
            note: format!("of {}", thousands(experts as u64)),
        },
        Figure {
            label: "Whole run",
            value: format!("{:.0} s", results.seconds.values().sum::<f64>()),
            note: format!("peak memory {}", bytes_text(results.peak_rss_bytes)),
        },
    ]
}

/// One picture for each metric of the run's task.
fn scores(results: &Results) -> Vec<Picture> {
    let of_task = |stage| Some((stage, results.stages.get(&stage)?.get(&results.task)?));
    let stages: Vec<_> = Stage::ALL.into_iter().filter_map(of_task).collect();
    let mut names: Vec<_> = stages.iter().flat_map(|(_, s)| s.keys()).collect();
    names.sort();
    names.dedup();
    let picture = |name: &String| {
        let whisker = |(stage, scores): &(Stage, &BTreeMap<String, Score>)| {
            let score = scores.get(name)?;
            Some(Whisker {
                label: stage.name(),
                value: score.value,
                stderr: score.stderr,
                text: score.show(digits(name)),
            })
        };
        let whiskers: Vec<_> = stages.iter().filter_map(whisker).collect();
        let words: Vec<_> = whiskers
            .iter()
            .map(|w| format!("{} {}", w.label, w.text))
            .collect();
        let better = if lower_is_better(name) {
            "lower is better"
        } else {
            "higher is better"
        };
        Picture {
            name: name.clone(),
            note: better.to_owned(),
            svg: svg::whiskers(&format!("{name}: {}", words.join(", ")), &whiskers),
        }
    };
    names.into_iter().map(picture).collect()
}

fn curve_picture(curve: &[Point]) -> Option<String> {
    let (first, last) = (curve.first()?, curve.last()?);
    let describe = format!(
        "Training loss from {:.3} at step {} to {:.3} at step {}; β from {} to {}",
        first.loss, first.step, last.loss, last.step, first.beta, last.beta
    );
    svg::curve(&describe, curve)
}

fn damage_picture(damage: &PlanDamage) -> Option<Damage> {
    let predicted = format!("{:.2e}", damage.predicted);
    let describe = format!(
        "Expected damage by size; the plan leaves {} and is expected to cost {predicted} nats a token",
        bytes_text(damage.bytes)
    );
    let svg = svg::damage::damage(&describe, damage)?;
    Some(Damage { predicted, svg })
}

fn layer_bars(
    plan: &Plan,
    name: &str,
    value: fn(&LayerPlan) -> Option<f64>,
    reference: Option<f64>,
) -> Option<String> {
    let values: Vec<_> = plan.layers.iter().map(|l| (l.layer, value(l))).collect();
    values.iter().any(|v| v.1.is_some()).then(|| {
        let label = reference.map(|r| format!("global threshold {r:.3}"));
        let reference = reference.zip(label.as_deref());
        let describe = format!("{name} of each layer; the table of layers holds the numbers");
        svg::bars(&describe, &values, reference)
    })
}

#[cfg(test)]
mod tests;
