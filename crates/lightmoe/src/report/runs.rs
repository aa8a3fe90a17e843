//! Where a run stands among others: what it weighs against what it can do.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Evidence;
use super::svg::WIDTH;
use super::svg::scatter::{Axes, Better, Dot, front, scatter};
use super::table::{Section, bytes_text};
use crate::results::{Results, Score, Stage, digits, lower_is_better};
use crate::run::Inputs;

/// Another run, or this one.
pub struct Sibling {
    /// The name of its folder.
    pub name: String,
    /// What it led to.
    pub results: Results,
    /// What it depended on besides its recipe; `None` where that is unknown.
    pub inputs: Option<Inputs>,
}

/// The folder that a run lies in.
pub fn beside(run: &Path) -> PathBuf {
    match run.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The finished runs in `folder` but `run` itself, by name. A folder without a results file that can be
/// read is no finished run.
pub(super) fn siblings(folder: &Path, run: &Path) -> Vec<Sibling> {
    let whole = |path: &Path| fs::canonicalize(path).ok();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<Sibling> = entries
        .filter(|entry| whole(&entry.path()) != whole(run))
        .filter_map(|entry| {
            let path = entry.path().join("results.json");
            if !path.is_file() {
                return None;
            }
            let results = Results::load(&path)
                .inspect_err(|error| tracing::warn!("left out of the report: {error:#}"));
            let inputs = Inputs::of(&entry.path())
                .inspect_err(|error| tracing::warn!("left out of the report: {error:#}"));
            Some(Sibling {
                name: entry.file_name().to_string_lossy().into_owned(),
                results: results.ok()?,
                inputs: inputs.ok()?,
            })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The section of the page.
#[derive(Serialize)]
pub(super) struct Shown {
    svg: String,
    metric: String,
    runs: usize,
    /// Runs in the folder that cannot be compared with this one.
    others: usize,
    table: Section,
}

/// A row of the table.
struct Entry<'a> {
    name: &'a str,
    method: &'a str,
    bytes: u64,
    score: Score,
    class: &'static str,
}

/// Whether two runs can stand on one front: of the same model and task, with the same data and as many
/// test items. Where what a run depended on is unknown, its names speak for it.
fn is_comparable(this: &Evidence, metric: &str, other: &Sibling) -> bool {
    let (ours, theirs) = (&this.results, &other.results);
    let items = |results: &Results| Some(results.scores(Stage::Recovered)?.get(metric)?.n);
    let inputs = this.inputs.as_ref().zip(other.inputs.as_ref());
    ours.model == theirs.model
        && ours.task == theirs.task
        && items(ours) == items(theirs)
        && inputs.is_none_or(|(a, b)| a.model == b.model && a.data == b.data)
}

/// `None` where nothing can be compared: the task has no metric of which more is better and no
/// perplexity, or was not scored.
pub(super) fn shown(evidence: &Evidence, name: &str) -> Option<Shown> {
    let (this, siblings) = (&evidence.results, &evidence.siblings);
    let original = this.scores(Stage::Original)?;
    let metric = original.keys().find(|metric| !lower_is_better(metric));
    let metric = metric.or_else(|| Some(original.get_key_value("perplexity")?.0))?;
    let better = Better::of(metric);
    let same = |s: &&Sibling| is_comparable(evidence, metric, s);
    let mut entries = vec![
        Entry {
            name: "original",
            method: "–",
            bytes: this.bytes.before,
            score: original[metric],
            class: "dot original",
        },
        Entry::of(name, this, metric, "dot recovered")?,
    ];
    let others = siblings.iter().filter(same);
    entries.extend(others.filter_map(|s| Entry::of(&s.name, &s.results, metric, "dot")));
    entries.sort_by_key(|entry| entry.bytes);
    let points: Vec<_> = entries.iter().map(Entry::point).collect();
    let best = front(&points, better);
    let mut table = Section::new([
        "run",
        "number",
        "method",
        "weights",
        "of the original",
        "score",
        "frontier",
    ]);
    let mut dots = Vec::new();
    for (number, (entry, point)) in entries.iter().zip(&points).enumerate() {
        let number = (number + 1).to_string();
        let (weights, score) = (bytes_text(entry.bytes), entry.score.show(digits(metric)));
        dots.push(Dot {
            x: point.0,
            y: point.1,
            range: (
                point.1 - 2.0 * entry.score.stderr,
                point.1 + 2.0 * entry.score.stderr,
            ),
            class: entry.class.to_owned(),
            label: number.clone(),
            title: format!("{}: {weights}, {metric} {score}", entry.name),
        });
        let this_one = entry.class == "dot recovered";
        table.rows.push(vec![
            match this_one {
                true => format!("{} (this run)", entry.name),
                false => entry.name.to_owned(),
            },
            number,
            entry.method.to_owned(),
            weights,
            format!(
                "{:.1}%",
                100.0 * entry.bytes as f64 / this.bytes.before as f64
            ),
            score,
            if best.contains(point) { "yes" } else { "–" }.to_owned(),
        ]);
    }
    let describe = format!(
        "{metric} against the bytes of the weights for {} runs and the original; the table holds \
         the numbers",
        entries.len() - 1
    );
    Some(Shown {
        svg: scatter(
            &describe,
            WIDTH,
            &Axes {
                x: "weights on disk, MiB",
                y: &match better {
                    Better::More => metric.clone(),
                    Better::Less => format!("{metric}, lower is better"),
                },
                better,
            },
            &dots,
            None,
        )?,
        metric: metric.clone(),
        runs: entries.len() - 1,
        others: siblings.len() - siblings.iter().filter(same).count(),
        table,
    })
}

impl<'a> Entry<'a> {
    /// `None` for a run that was not scored by the metric.
    fn of(name: &'a str, results: &'a Results, metric: &str, class: &'static str) -> Option<Self> {
        Some(Self {
            name,
            method: &results.method,
            bytes: results.bytes.after,
            score: *results.scores(Stage::Recovered)?.get(metric)?,
            class,
        })
    }

    /// MiB and score.
    fn point(&self) -> (f64, f64) {
        (self.bytes as f64 / 1_048_576.0, self.score.value)
    }
}
