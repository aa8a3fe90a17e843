//! The report: one HTML page with everything in it, to be read without a network, and the tables
//! for the terminal and for Markdown.

mod answers;
mod coverage;
mod curves;
mod divergence;
mod grids;
mod load;
mod reproduce;
mod runs;
pub(crate) mod svg;
pub mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{LayerPlan, Plan, PlanDamage};
use lightmoe_models::folder::write_file;
use lightmoe_train::{Curve, Point};
use minijinja::Environment;
use serde::Serialize;

use crate::contrast::Contrast;
use crate::divergence::DivergenceFile;
use crate::preflight::Refused;
use crate::recipe::Recipe;
use crate::results::{Results, Score, Stage, digits, lower_is_better};
use crate::run::Inputs;
use crate::verdict::Verdict;
use coverage::LayerCoverage;
use grids::Swatch;
use runs::Sibling;
pub use runs::beside;
use svg::Whisker;
use table::{NO_THRESHOLDS, Section, bytes_text, change, thousands};

/// Where the stage contrast leaves what it found, in the folder of a run.
pub const CONTRAST: &str = "contrast.json";
/// The template, behind what all pages have in common.
const TEMPLATE: &str = concat!(
    include_str!("macros.html.jinja"),
    include_str!("report.html.jinja")
);
/// The style of every page, which templates know as `style`.
const STYLE: &str = include_str!("style.css");

/// All that the page of a run shows.
pub struct Evidence {
    /// Its folder, as it was given.
    pub run: PathBuf,
    /// What it led to.
    pub results: Results,
    /// What it depended on besides its recipe; `None` where that is unknown.
    pub inputs: Option<Inputs>,
    /// What became of each expert.
    pub plan: Plan,
    /// The settings.
    pub recipe: Recipe,
    /// What the experts saw; empty where nothing was observed.
    pub coverage: Vec<LayerCoverage>,
    /// The loss curve; empty where nothing was trained.
    pub curve: Vec<Point>,
    /// The original beside the result, where that was looked at.
    pub contrast: Option<Contrast>,
    /// How far the result's predictions are from the original's, where that was measured.
    pub divergence: Option<DivergenceFile>,
    /// Other runs to stand among.
    pub siblings: Vec<Sibling>,
}

impl Evidence {
    /// Reads the folder `run`, and the results of the other runs in the folder `runs`.
    ///
    /// # Errors
    /// [`Refused`] if `run` holds no finished run; if a file of it is damaged.
    pub fn read(run: &Path, runs: &Path) -> Result<Self> {
        let at = |name: &str| run.join(name);
        if !at("results.json").is_file() {
            let message = format!(
                "`{}` holds no finished run, for it has no `results.json`; check the path, or finish \
                 the run first",
                run.display()
            );
            return Err(Refused(message).into());
        }
        let results = Results::load(&at("results.json"))?;
        let recipe = Recipe::load(&at("recipe.toml"))?;
        let observations = at("observations.safetensors");
        Ok(Self {
            run: run.to_owned(),
            results,
            inputs: Inputs::of(run)?,
            plan: Plan::load(&at("plan.json"))?,
            coverage: match observations.exists() {
                true => LayerCoverage::of(&Observations::load(&observations)?),
                false => Vec::new(),
            },
            curve: match recipe.steps {
                0 => Vec::new(),
                _ => Curve::read(&at("logs"))?,
            },
            contrast: match at(CONTRAST).exists() {
                true => Some(Contrast::load(&at(CONTRAST))?),
                false => None,
            },
            divergence: DivergenceFile::of_run(run)?,
            siblings: runs::siblings(runs, run),
            recipe,
        })
    }
}

/// Writes the page of the run in the folder `run` among those in the folder `runs` to `target`.
///
/// # Errors
/// As [`Evidence::read`], or if the file cannot be written.
pub fn write(run: &Path, runs: &Path, target: &Path) -> Result<()> {
    let page = render(&Evidence::read(run, runs)?)?;
    Ok(write_file(target, page.as_bytes())?)
}

/// What the template shows; pictures are SVG, made and escaped in [`svg`].
#[derive(Serialize)]
struct Page<'a> {
    results: &'a Results,
    name: String,
    saved: String,
    verdict: Advice,
    figures: Vec<Figure>,
    scores: Vec<Picture>,
    score_table: Section,
    size_table: Section,
    cost_table: Section,
    runs: Option<runs::Shown>,
    experts: String,
    legend: Vec<Swatch>,
    kept: usize,
    replaced: usize,
    layers: Section,
    load: Option<load::Shown>,
    divergence: Option<divergence::Shown>,
    coverage: Option<coverage::Shown>,
    curve: Option<String>,
    steps: usize,
    annealed: bool,
    threshold: Option<String>,
    norm: Option<String>,
    damage: Option<Damage>,
    answers: Vec<answers::Shown>,
    environment: Section,
    commands: Vec<Vec<String>>,
    recipe: String,
}

/// What is said of the verdict, and the comparison with the original.
#[derive(Serialize)]
struct Advice {
    word: &'static str,
    sentence: &'static str,
    checks: Section,
    close: bool,
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

/// The report as one HTML page without scripts or outside resources; what is not in the evidence is left
/// out.
///
/// # Errors
/// If the template cannot be rendered.
pub fn render(evidence: &Evidence) -> Result<String> {
    let Evidence {
        run,
        results,
        plan,
        recipe,
        coverage,
        curve,
        contrast,
        ..
    } = evidence;
    let seen = |layer: usize| coverage.iter().find(|c| c.layer == layer);
    let few = |layer: usize| seen(layer).map(LayerCoverage::few);
    let replaced: usize = plan.layers.iter().map(LayerPlan::replaced).sum();
    let experts: usize = plan.layers.iter().map(|l| l.slots.len()).sum();
    let name = run.file_name().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    let page = Page {
        results,
        saved: format!("{:.1}%", 100.0 * results.ratio.achieved),
        verdict: advice(results),
        figures: figures(results, replaced, experts),
        scores: scores(results),
        score_table: table::scores(results),
        size_table: table::size(results),
        cost_table: table::cost(results),
        runs: runs::shown(evidence, &name),
        experts: grids::experts(plan, &seen, experts, replaced),
        legend: grids::legend(plan),
        kept: experts - replaced,
        replaced,
        layers: grids::layers(plan, &few),
        load: contrast.as_ref().and_then(load::shown),
        divergence: evidence.divergence.as_ref().and_then(divergence::shown),
        coverage: coverage::shown(coverage, plan),
        curve: curves::picture(curve),
        steps: curve.len(),
        annealed: curve.iter().any(|p| p.beta != 0.0),
        threshold: layer_bars(plan, "Threshold", |l| l.threshold, plan.p_hat),
        norm: layer_bars(plan, "Mean router norm", |l| l.router_norm, None),
        damage: plan.damage.as_ref().and_then(damage_picture),
        answers: contrast
            .as_ref()
            .map_or_else(Vec::new, |c| answers::shown(&c.answers)),
        environment: reproduce::environment(results, evidence.inputs.as_ref()),
        commands: reproduce::commands(run, results, recipe),
        recipe: recipe.to_toml()?,
        name,
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

fn advice(results: &Results) -> Advice {
    let mut checks = Section::new(["threshold", "outcome", "measured", "asked for", "on"]);
    let verdict = results.verdict.as_ref();
    let of = |verdict: &Verdict| verdict.checks.clone();
    let all = verdict.map(of).unwrap_or_default();
    checks.rows = all
        .iter()
        .map(|check| {
            vec![
                check.threshold.clone(),
                check.word().to_owned(),
                check.number(),
                check.asked(),
                check.of.clone(),
            ]
        })
        .collect();
    Advice {
        word: verdict.map_or("", |v| v.word.name()),
        sentence: verdict.map_or(NO_THRESHOLDS, |v| v.word.sentence()),
        checks,
        close: all.iter().any(|check| check.is_close()),
        comparisons: results
            .comparisons()
            .iter()
            .map(ToString::to_string)
            .collect(),
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

fn damage_picture(damage: &PlanDamage) -> Option<Damage> {
    let predicted = format!("{:.2e} {}", damage.predicted, damage.sensitivity.unit());
    let describe = format!(
        "Expected damage by size; the plan leaves {} and is expected to cost {predicted}",
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
