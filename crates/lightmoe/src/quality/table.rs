//! The page of the quality bench, made from its raw data alone.

use super::cells::{Method, RATES, RATIOS, Rule, lightmoe_rank};
use super::{ITEMS, Raw, Record};
use crate::results::TaskScores;
use lightmoe_data::Task;
use lightmoe_models::ModelConfig;
use std::fmt::Write;

/// What a column of a table shows of a record.
type Pick = fn(&Record) -> &TaskScores;

/// The mean over seeds, and the distance between the highest and the lowest.
struct Spread {
    mean: f64,
    range: f64,
    n: usize,
}

impl Spread {
    fn of(values: &[f64]) -> Option<Self> {
        let (low, high) = (
            values.iter().copied().fold(f64::INFINITY, f64::min),
            values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        );
        (!values.is_empty()).then(|| Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            range: high - low,
            n: values.len(),
        })
    }

    fn show(this: Option<&Self>, seeds: usize) -> String {
        match this {
            None => "–".to_owned(),
            Some(s) if s.n < seeds => format!("{:.3} ± {:.3} ({})", s.mean, s.range, s.n),
            Some(s) => format!("{:.3} ± {:.3}", s.mean, s.range),
        }
    }
}

/// The records of one row.
struct Row {
    method: Method,
    rule: Rule,
    ratio: Option<f64>,
}

impl Row {
    fn new(method: Method, rule: Rule, ratio: f64) -> Self {
        Self {
            method,
            rule,
            ratio: (method != Method::Lora).then_some(ratio),
        }
    }

    fn records<'a>(&'a self, raw: &'a Raw) -> impl Iterator<Item = &'a Record> + 'a {
        raw.records.iter().filter(move |r| {
            let c = &r.cell;
            c.rate.is_none() && (c.method, c.rule, c.ratio) == (self.method, self.rule, self.ratio)
        })
    }

    fn spread(&self, raw: &Raw, task: Task, pick: Pick, metric: &str) -> Option<Spread> {
        let records = self.records(raw).filter(|r| r.cell.task == task);
        let values: Vec<f64> = records
            .filter_map(|r| Record::score(pick(r), metric))
            .collect();
        Spread::of(&values)
    }

    /// The mean over the five tasks of the means over seeds, if every task has one.
    fn average(&self, raw: &Raw, metric: &str) -> Option<f64> {
        let means = Task::ALL.map(|t| self.spread(raw, t, |r| &r.test, metric).map(|s| s.mean));
        let sum: Option<f64> = means.into_iter().sum();
        sum.map(|s| s / Task::ALL.len() as f64)
    }
}

/// Writing to a string cannot fail; the results are dropped.
macro_rules! line {
    ($out:expr) => { { let _ = writeln!($out); } };
    ($out:expr, $($arg:tt)*) => { { let _ = writeln!($out, $($arg)*); } };
}

pub(super) fn markdown(raw: &Raw, config: &ModelConfig) -> String {
    let mut out = String::new();
    let seeds = raw
        .records
        .iter()
        .map(|r| r.cell.seed + 1)
        .max()
        .unwrap_or(0) as usize;
    line!(out, "# Quality of the methods on the built-in model\n");
    line!(out, "{}\n", caveats(raw, config, seeds));
    line!(
        out,
        "## Exact match after recovery, equal trainable parameters\n"
    );
    compared(&mut out, raw, seeds, "exact_match");
    line!(
        out,
        "\n## Answer NLL (nats per token) after recovery, equal trainable parameters\n"
    );
    compared(&mut out, raw, seeds, "answer_nll");
    line!(out, "\n## What the paper would have us expect\n");
    expectations(&mut out, raw);
    line!(
        out,
        "\n## Controls: LightMoE with one thing changed, exact match\n"
    );
    let with = [&[Method::Lightmoe][..], &Method::CONTROLS].concat();
    by_ratio(
        &mut out,
        raw,
        seeds,
        &with,
        Rule::EqualTrainable,
        |r| &r.test,
        "exact_match",
    );
    line!(out, "\n## Untrained: built only, exact match\n");
    by_ratio(
        &mut out,
        raw,
        seeds,
        &with,
        Rule::EqualTrainable,
        |r| &r.built,
        "exact_match",
    );
    line!(
        out,
        "\n## Equal rank instead of equal trainable parameters, exact match\n"
    );
    line!(
        out,
        "Every adapter has rank {}; LightMoE, the same cells as above, then trains more parameters \
         than the others.\n",
        lightmoe_rank(config)
    );
    let methods = [Method::Lora, Method::ReplaceNone, Method::ReplaceOne];
    by_ratio(
        &mut out,
        raw,
        seeds,
        &methods,
        Rule::EqualRank,
        |r| &r.test,
        "exact_match",
    );
    line!(out, "\n## Learning rates chosen on the validation split\n");
    rates(&mut out, raw);
    line!(out, "\n## Sizes\n");
    sizes(&mut out, raw);
    out
}

fn caveats(raw: &Raw, config: &ModelConfig, seeds: usize) -> String {
    let cells = raw.records.len();
    let minutes: f64 = raw.records.iter().map(|r| r.seconds).sum::<f64>() / 60.0;
    format!(
        "Written by `cargo xtask bench quality` from the raw data beside this page ({cells} cells, \
         {minutes:.0} minutes of one CPU thread each). `fixtures/olmoe-nano` ({} parameters, {} \
         layers, {} experts, top {}), five built-in tasks, {} recovery steps of 16 sequences on \
         8,000 examples, {ITEMS} test items: the standard error of one exact match is at most \
         {:.3}. Cells show the mean over {seeds} seeds ± the distance between the best and the \
         worst seed; a number in brackets says that fewer seeds are done. A seed changes the \
         training examples, their order and the fresh weights, not the base model or the test \
         items. One small model on synthetic text says which way effects point, not how large they \
         are elsewhere.",
        config.parameters().total(),
        config.num_layers,
        config.moe.num_experts,
        config.moe.top_k,
        raw.steps,
        0.5 / (ITEMS as f64).sqrt(),
    )
}

fn header(out: &mut String, first: &str) {
    let names = Task::ALL.map(|t| t.to_string()).join(" | ");
    line!(out, "| {first} | {names} | average |");
    line!(out, "|---|{}", "---|".repeat(Task::ALL.len() + 1));
}

fn row(out: &mut String, label: &str, cells: &[String], average: Option<f64>) {
    let average = average.map_or("–".to_owned(), |a| format!("{a:.3}"));
    line!(out, "| {label} | {} | {average} |", cells.join(" | "));
}

fn compared(out: &mut String, raw: &Raw, seeds: usize, metric: &str) {
    header(out, "method");
    let original = Task::ALL.map(|t| {
        let scores = raw.original.get(&t)?;
        scores.values().next()?.get(metric).map(|s| s.value)
    });
    let cells = original.map(|v| v.map_or("–".to_owned(), |v| format!("{v:.3}")));
    let sum: Option<f64> = original.into_iter().sum();
    row(
        out,
        "original, untuned",
        &cells,
        sum.map(|s| s / Task::ALL.len() as f64),
    );
    body(
        out,
        raw,
        seeds,
        &[Method::Lora],
        Rule::EqualTrainable,
        0.0,
        |r| &r.test,
        metric,
    );
    for ratio in RATIOS {
        let rest = &Method::COMPARED[1..];
        body(
            out,
            raw,
            seeds,
            rest,
            Rule::EqualTrainable,
            ratio,
            |r| &r.test,
            metric,
        );
    }
}

#[allow(clippy::too_many_arguments)] // the coordinates of a table
fn body(
    out: &mut String,
    raw: &Raw,
    seeds: usize,
    methods: &[Method],
    rule: Rule,
    ratio: f64,
    pick: Pick,
    metric: &str,
) {
    for &method in methods {
        let this = Row::new(method, rule, ratio);
        let spreads = Task::ALL.map(|t| this.spread(raw, t, pick, metric));
        let cells = spreads.each_ref().map(|s| Spread::show(s.as_ref(), seeds));
        let sum: Option<f64> = spreads.iter().map(|s| s.as_ref().map(|s| s.mean)).sum();
        let saved = this
            .ratio
            .map_or(String::new(), |r| format!("{:.0}%, ", 100.0 * r));
        let average = sum.map(|s| s / Task::ALL.len() as f64);
        row(out, &format!("{saved}{}", method.label()), &cells, average);
    }
}

fn by_ratio(
    out: &mut String,
    raw: &Raw,
    seeds: usize,
    methods: &[Method],
    rule: Rule,
    pick: Pick,
    metric: &str,
) {
    header(out, "method");
    let (without_ratio, with): (Vec<_>, Vec<_>) =
        methods.iter().copied().partition(|m| *m == Method::Lora);
    body(out, raw, seeds, &without_ratio, rule, 0.0, pick, metric);
    for ratio in RATIOS {
        body(out, raw, seeds, &with, rule, ratio, pick, metric);
    }
}

fn expectations(out: &mut String, raw: &Raw) {
    let average =
        |method, ratio| Row::new(method, Rule::EqualTrainable, ratio).average(raw, "exact_match");
    let difference = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => format!("measured {:+.1} points", 100.0 * (a - b)),
        _ => "not measured yet".to_owned(),
    };
    line!(
        out,
        "- LightMoE at 30% level with LoRA (paper: −0.2 points): {}.",
        difference(average(Method::Lightmoe, 0.3), average(Method::Lora, 0.0))
    );
    line!(
        out,
        "- LightMoE at 50% at least 3.8 points above replacing without a base: {}.",
        difference(
            average(Method::Lightmoe, 0.5),
            average(Method::ReplaceNone, 0.5)
        )
    );
    line!(
        out,
        "- LightMoE at 50% above one base (paper: +6.5 points): {}.",
        difference(
            average(Method::Lightmoe, 0.5),
            average(Method::ReplaceOne, 0.5)
        )
    );
}

fn rates(out: &mut String, raw: &Raw) {
    let tried = RATES.map(|r| format!("{r}")).join(", ");
    line!(
        out,
        "Tried: {tried}, at 50% and seed 0; validation answer NLL decides.\n"
    );
    let names = Task::ALL.map(|t| t.to_string()).join(" | ");
    line!(out, "| method | {names} |");
    line!(out, "|---|{}", "---|".repeat(Task::ALL.len()));
    for method in Method::COMPARED {
        let cells = Task::ALL.map(|task| {
            let search = raw.records.iter().filter(|r| {
                r.cell.rate.is_some() && (r.cell.method, r.cell.task) == (method, task)
            });
            let nll =
                |r: &Record| Record::score(&r.validation, "answer_nll").unwrap_or(f64::INFINITY);
            let best = search.min_by(|a, b| nll(a).total_cmp(&nll(b)));
            best.map_or("–".to_owned(), |r| r.lr.to_string())
        });
        line!(out, "| {} | {} |", method.label(), cells.join(" | "));
    }
}

fn sizes(out: &mut String, raw: &Raw) {
    line!(out, "| method | rank | trained | parameters left | saved |");
    line!(out, "|---|---|---|---|---|");
    let rules = [Rule::EqualTrainable, Rule::EqualRank];
    for (rule, ratio) in rules.iter().flat_map(|r| RATIOS.map(|ratio| (*r, ratio))) {
        for method in Method::COMPARED {
            let this = Row::new(method, rule, ratio);
            let records: Vec<&Record> = this.records(raw).collect();
            let (Some(first), true) = (records.first(), method != Method::Lora || ratio > 0.4)
            else {
                continue;
            };
            let mean = |f: fn(&Record) -> f64| {
                records.iter().map(|r| f(r)).sum::<f64>() / records.len() as f64
            };
            let note = if rule == Rule::EqualRank {
                ", equal rank"
            } else {
                ""
            };
            line!(
                out,
                "| {}{note} | {} | {:.0} | {:.0} | {:.1}% |",
                method.label(),
                first.rank,
                mean(|r| r.parameters.trained as f64),
                mean(|r| r.parameters.after as f64),
                100.0 * mean(|r| r.achieved)
            );
        }
    }
}
