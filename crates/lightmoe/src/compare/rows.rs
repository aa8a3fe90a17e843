//! The rows of a comparison: what each method at each ratio has in every column, over seeds and tasks.

use super::grid::{Rate, task_name};
use super::measure::Measure;
use super::{Comparison, Record};
use crate::report::table::{bytes_text, thousands};
use crate::results::{Score, Stage, nll};
use crate::spread::Spread;
use std::collections::BTreeMap;

/// Name of the rows that are means over the tasks.
const AVERAGE: &str = "average";
/// The method's name in the rows of the untuned model.
pub(super) const ORIGINAL: &str = "original";

/// What a column shows of a record.
pub(super) struct Column {
    /// Its name in the CSV.
    pub key: &'static str,
    /// Its head in tables.
    pub head: &'static str,
    kind: Kind,
    /// Of the compressed model, or of the original one if asked for.
    value: fn(&Record, Of) -> Option<Value>,
}

/// Whose number is asked for.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Original,
    Method,
}

/// How a number is shown.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// A share of test items, with its standard error.
    Score,
    /// A NLL, shown as its exponential.
    Perplexity,
    Count,
    Bytes,
    Seconds,
    /// Of the peaks of several seeds, the highest.
    Peak,
}

/// A number of one record.
#[derive(Clone, Copy)]
struct Value {
    value: f64,
    stderr: f64,
}

impl Value {
    fn of(score: &Score) -> Self {
        Self {
            value: score.value,
            stderr: score.stderr,
        }
    }
}

/// Every column, in the order of the tables.
pub(super) const COLUMNS: [Column; 10] = [
    column("score_before", "score, before", Kind::Score, |r, of| {
        score(r, before(of))
    }),
    column("score_after", "score, after", Kind::Score, |r, of| {
        score(r, after(of)?)
    }),
    column(
        "perplexity_before",
        "perplexity, before",
        Kind::Perplexity,
        |r, of| mean_nll(r, before(of)),
    ),
    column(
        "perplexity_after",
        "perplexity, after",
        Kind::Perplexity,
        |r, of| mean_nll(r, after(of)?),
    ),
    column("parameters", "parameters", Kind::Count, |r, of| {
        let counts = r.results.parameters;
        Some(exact(if of == Of::Original {
            counts.before
        } else {
            counts.after
        }))
    }),
    column("active_parameters", "active", Kind::Count, |r, of| {
        let counts = r.active_parameters;
        Some(exact(if of == Of::Original {
            counts.before
        } else {
            counts.after
        }))
    }),
    column("trained_parameters", "trained", Kind::Count, |r, of| {
        Some(exact(if of == Of::Original {
            0
        } else {
            r.results.parameters.trained
        }))
    }),
    column("bytes", "weights", Kind::Bytes, |r, of| {
        let bytes = r.results.bytes;
        Some(exact(if of == Of::Original {
            bytes.before
        } else {
            bytes.after
        }))
    }),
    column("seconds", "seconds", Kind::Seconds, |r, of| {
        (of == Of::Method).then(|| Value {
            value: making(&r.results.seconds).sum(),
            stderr: 0.0,
        })
    }),
    column("peak_bytes", "peak memory", Kind::Peak, |r, of| {
        (of == Of::Method).then(|| {
            let peaks = making(&r.results.peak_rss_by_stage);
            exact(peaks.max().unwrap_or(r.results.peak_rss_bytes))
        })
    }),
];

const fn column(
    key: &'static str,
    head: &'static str,
    kind: Kind,
    value: fn(&Record, Of) -> Option<Value>,
) -> Column {
    Column {
        key,
        head,
        kind,
        value,
    }
}

/// What the stages that make the model have in a map; scoring it is no part of that.
fn making<T: Copy>(of_stages: &BTreeMap<String, T>) -> impl Iterator<Item = T> + '_ {
    let stages = of_stages.iter();
    let stages = stages.filter(|(name, _)| !name.starts_with("evaluate"));
    stages.map(|(_, value)| *value)
}

fn before(of: Of) -> Stage {
    match of {
        Of::Original => Stage::Original,
        Of::Method => Stage::Built,
    }
}

fn after(of: Of) -> Option<Stage> {
    (of == Of::Method).then_some(Stage::Recovered)
}

/// The share of answers that are right; of texts that may be right in part, chrF from 0 to 1.
fn score(record: &Record, stage: Stage) -> Option<Value> {
    let graded = metric(record, stage, "chrf").map(|chrf| Value {
        value: chrf.value / 100.0,
        stderr: chrf.stderr / 100.0,
    });
    graded.or_else(|| metric(record, stage, "exact_match"))
}

fn metric(record: &Record, stage: Stage, metric: &str) -> Option<Value> {
    record.results.scores(stage)?.get(metric).map(Value::of)
}

fn mean_nll(record: &Record, stage: Stage) -> Option<Value> {
    nll(record.results.scores(stage)?).map(Value::of)
}

fn exact(value: u64) -> Value {
    Value {
        value: value as f64,
        stderr: 0.0,
    }
}

/// What a row has in a column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Entry {
    /// Over seeds.
    pub spread: Spread,
    /// Standard error of one seed's score, over test items: the mean of those of the seeds.
    pub stderr: f64,
}

impl Entry {
    fn of(values: &[Value]) -> Option<Self> {
        let numbers = |f: fn(&Value) -> f64| values.iter().map(f).collect::<Vec<_>>();
        Some(Self {
            spread: Spread::of(&numbers(|v| v.value))?,
            stderr: Spread::of(&numbers(|v| v.stderr))?.mean,
        })
    }

    /// The mean over tasks, whose items are not the same; the spread over seeds is theirs alone.
    fn average(entries: &[Self], kind: Kind) -> Option<Self> {
        let highest = kind == Kind::Peak;
        let of = |e: &Self| {
            if highest {
                e.spread.high
            } else {
                e.spread.mean
            }
        };
        let over_tasks = Spread::of(&entries.iter().map(of).collect::<Vec<_>>())?;
        let mean = if highest {
            over_tasks.high
        } else {
            over_tasks.mean
        };
        let squares: f64 = entries.iter().map(|e| e.stderr.powi(2)).sum();
        Some(Self {
            spread: Spread {
                mean,
                low: mean,
                high: mean,
                n: entries.iter().map(|e| e.spread.n).min()?,
            },
            stderr: squares.sqrt() / entries.len() as f64,
        })
    }

    /// As it is shown: a perplexity for a NLL, the highest peak for the mean one.
    fn finished(self, kind: Kind) -> Self {
        let Spread { mean, low, high, n } = self.spread;
        match kind {
            Kind::Perplexity => Self {
                spread: Spread {
                    mean: mean.exp(),
                    low: low.exp(),
                    high: high.exp(),
                    n,
                },
                stderr: mean.exp() * self.stderr,
            },
            Kind::Peak => Self {
                spread: Spread {
                    mean: high,
                    ..self.spread
                },
                ..self
            },
            _ => self,
        }
    }
}

/// A row: one method at one ratio on one task.
pub(super) struct Line {
    /// The method as the user named it, or [`ORIGINAL`].
    pub method: String,
    /// The share of all parameters to save.
    pub ratio: Option<f64>,
    /// The learning rate; `None` for the recipe's, and where tasks differ.
    pub lr: Option<f64>,
    /// Seeds that are done.
    pub seeds: usize,
    /// By column.
    pub entries: [Option<Entry>; COLUMNS.len()],
}

impl Line {
    /// The ratio as tables show it.
    pub fn ratio(&self) -> String {
        self.ratio.map_or("–".to_owned(), percent)
    }

    /// Whether it has all of `seeds`.
    pub fn is_whole(&self, seeds: u64) -> bool {
        self.method == ORIGINAL || self.seeds as u64 >= seeds
    }
}

/// `50%`.
pub(super) fn percent(share: f64) -> String {
    let text = format!("{:.1}", 100.0 * share);
    format!("{}%", text.strip_suffix(".0").unwrap_or(&text))
}

/// The rows of one task, or of the average over them.
pub(super) struct Block {
    /// The task's name, or `average`.
    pub task: String,
    /// What says how good a model is.
    pub measure: Measure,
    /// The original first.
    pub lines: Vec<Line>,
}

/// The rows of every task, and of the average where there are several tasks.
pub(super) fn blocks(comparison: &Comparison) -> Vec<Block> {
    let grid = &comparison.grid;
    let mut blocks: Vec<Block> = Vec::new();
    for &task in &grid.tasks {
        let any = comparison.records.iter().find(|r| r.cell.task == task);
        let mut lines = vec![line(ORIGINAL, None, None, any.as_slice(), Of::Original)];
        for (method, ratio) in grid.rows() {
            let lr = match comparison.rate(method, task) {
                Rate::Known(lr) => lr,
                Rate::Open => None,
            };
            let records: Vec<&Record> = comparison.records(method, ratio, task).collect();
            lines.push(line(&method.label, ratio, lr, &records, Of::Method));
        }
        let own = any.filter(|_| task.is_none());
        blocks.push(Block {
            // The user's own data have the name of their file.
            task: own.map_or_else(|| task_name(task), |r| r.results.task.clone()),
            measure: comparison.measure,
            lines,
        });
    }
    if blocks.len() > 1 {
        let average = |row: usize| {
            let rows: Vec<&Line> = blocks.iter().map(|b| &b.lines[row]).collect();
            let entry = |column: usize| {
                let entries: Option<Vec<Entry>> = rows.iter().map(|l| l.entries[column]).collect();
                Entry::average(&entries?, COLUMNS[column].kind)
            };
            Line {
                method: rows[0].method.clone(),
                ratio: rows[0].ratio,
                lr: None,
                seeds: rows.iter().map(|l| l.seeds).min().unwrap_or(0),
                entries: std::array::from_fn(entry),
            }
        };
        let lines = (0..blocks[0].lines.len()).map(average).collect();
        let average = Block {
            task: AVERAGE.to_owned(),
            measure: Measure::Score,
            lines,
        };
        blocks.insert(0, average);
    }
    for line in blocks.iter_mut().flat_map(|b| &mut b.lines) {
        for (entry, column) in line.entries.iter_mut().zip(&COLUMNS) {
            *entry = entry.map(|e| e.finished(column.kind));
        }
    }
    blocks
}

fn line(method: &str, ratio: Option<f64>, lr: Option<f64>, records: &[&Record], of: Of) -> Line {
    Line {
        method: method.to_owned(),
        ratio,
        lr,
        seeds: records.len(),
        entries: COLUMNS.each_ref().map(|column| {
            let values = records.iter().filter_map(|r| (column.value)(r, of));
            Entry::of(&values.collect::<Vec<_>>())
        }),
    }
}

impl Column {
    /// Whether it is measured on test items, so that it has a standard error.
    pub fn is_scored(&self) -> bool {
        matches!(self.kind, Kind::Score | Kind::Perplexity)
    }

    /// What a table shows of an entry.
    pub fn show(&self, entry: Option<Entry>) -> String {
        let Some(Entry { spread, stderr }) = entry else {
            return "–".to_owned();
        };
        let scored = |show: &dyn Fn(f64) -> String| {
            let mut text = format!("{} ± {}", show(spread.mean), show(stderr));
            if spread.high > spread.low {
                text += &format!(" [{}–{}]", show(spread.low), show(spread.high));
            }
            text
        };
        match self.kind {
            Kind::Score => scored(&|v| format!("{v:.3}")),
            Kind::Perplexity => {
                let digits = (2 - spread.mean.log10().floor() as i64).clamp(0, 3) as usize;
                scored(&|v| format!("{v:.digits$}"))
            }
            Kind::Count => thousands(spread.mean.round() as u64),
            Kind::Bytes | Kind::Peak => bytes_text(spread.mean.round() as u64),
            Kind::Seconds => format!("{:.0}", spread.mean),
        }
    }
}
