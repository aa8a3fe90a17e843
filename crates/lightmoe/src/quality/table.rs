//! The page of the quality bench, made from its raw data alone.

use super::cells::{Method, RATES, RATIOS, Rule, TELLING, TRANSLATION_STEPS, lightmoe_rank};
use super::{ITEMS, Raw, Record};
use crate::results::TaskScores;
use crate::spread::Spread;
use lightmoe_data::Task;
use lightmoe_models::ModelConfig;
use std::fmt::Write;

/// What a column of a table shows of a record.
type Pick = fn(&Record) -> &TaskScores;

/// The mean over seeds, and the distance between the highest and the lowest.
fn show(spread: Option<&Spread>, seeds: usize) -> String {
    match spread {
        None => "–".to_owned(),
        Some(s) if s.n < seeds => format!("{:.3} ± {:.3} ({})", s.mean, s.high - s.low, s.n),
        Some(s) => format!("{:.3} ± {:.3}", s.mean, s.high - s.low),
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
        mean(&means, |_| true)
    }
}

/// Writing to a string cannot fail; the results are dropped.
macro_rules! line {
    ($out:expr) => { { let _ = writeln!($out); } };
    ($out:expr, $($arg:tt)*) => { { let _ = writeln!($out, $($arg)*); } };
}

/// What a table shows of the raw data.
#[derive(Clone, Copy)]
struct View<'a> {
    raw: &'a Raw,
    seeds: usize,
    rule: Rule,
    pick: Pick,
    metric: &'static str,
}

pub(super) fn markdown(raw: &Raw, config: &ModelConfig) -> String {
    let mut out = String::new();
    let seeds = raw.records.iter().map(|r| r.cell.seed + 1).max();
    let exact = View {
        raw,
        seeds: seeds.unwrap_or(0) as usize,
        rule: Rule::EqualTrainable,
        pick: |r| &r.test,
        metric: "exact_match",
    };
    line!(out, "# Quality of the methods on the built-in model\n");
    line!(out, "{}\n", caveats(raw, config, exact.seeds));
    line!(
        out,
        "## Exact match after recovery, equal trainable parameters\n"
    );
    exact.compared(&mut out);
    line!(
        out,
        "\n## Answer NLL (nats per token) after recovery, equal trainable parameters\n"
    );
    let nll = View {
        metric: "answer_nll",
        ..exact
    };
    nll.compared(&mut out);
    line!(out, "\n## What the paper would have us expect\n");
    expectations(&mut out, raw);
    line!(
        out,
        "\n## Controls: LightMoE with one thing changed, exact match\n"
    );
    let with = [&[Method::Lightmoe][..], &Method::CONTROLS].concat();
    exact.table(&mut out, &with, &[TELLING]);
    line!(out, "\n## Untrained: built only, exact match\n");
    let untrained = View {
        pick: |r| &r.built,
        ..exact
    };
    untrained.table(&mut out, &with, &[TELLING]);
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
    let equal_rank = View {
        rule: Rule::EqualRank,
        ..exact
    };
    let methods = [Method::Lora, Method::ReplaceNone, Method::ReplaceOne];
    equal_rank.table(&mut out, &methods, &RATIOS);
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
         {minutes:.0} minutes of one thread in all; last on {}, {}). What we read from it: \
         [quality-reading.md](quality-reading.md). `fixtures/olmoe-nano` ({} parameters, {} \
         layers, {} experts, top {}), five built-in tasks, {} recovery steps ({} for translation, \
         whose words are learned in jumps) of 16 sequences on 8,000 examples, {ITEMS} test items: the standard error of one exact match is at most \
         {:.3}. Cells show the mean over {seeds} seeds ± the distance between the best and the \
         worst seed; a number in brackets says that fewer seeds are done. A seed changes the \
         training examples, their order and the fresh weights, not the base model or the test \
         items. One small model on synthetic text says which way effects point, not how large they \
         are elsewhere.",
        raw.date,
        raw.processor,
        config.parameters().total(),
        config.num_layers,
        config.moe.num_experts,
        config.moe.top_k,
        raw.steps,
        TRANSLATION_STEPS * raw.steps,
        0.5 / (ITEMS as f64).sqrt(),
    )
}

fn header(out: &mut String, first: &str) {
    let names = Task::ALL.map(|t| t.to_string()).join(" | ");
    line!(out, "| {first} | {names} | preserved | new | average |");
    line!(out, "|---|{}", "---|".repeat(Task::ALL.len() + 3));
}

/// A row: one cell a task, and the means of `values` over the tasks of pre-training, over the new
/// ones and over all, where every task has one.
fn row(out: &mut String, label: &str, cells: &[String], values: &PerTask) {
    let of: [fn(Task) -> bool; 3] = [|t| t.is_preserved(), |t| !t.is_preserved(), |_| true];
    let means = of.map(|which| mean(values, which).map_or("–".to_owned(), |m| format!("{m:.3}")));
    let (cells, means) = (cells.join(" | "), means.join(" | "));
    line!(out, "| {label} | {cells} | {means} |");
}

/// One value a task, in the order of [`Task::ALL`], where there is one.
type PerTask = [Option<f64>; Task::ALL.len()];

fn mean(values: &PerTask, which: fn(Task) -> bool) -> Option<f64> {
    let chosen = Task::ALL.iter().zip(values).filter(|(t, _)| which(**t));
    let n = chosen.clone().count();
    let sum: Option<f64> = chosen.map(|(_, value)| *value).sum();
    sum.map(|s| s / n as f64)
}

impl View<'_> {
    /// The original model, LoRA, and the methods at every ratio.
    fn compared(self, out: &mut String) {
        header(out, "method");
        let original = Task::ALL.map(|t| {
            let scores = self.raw.original.get(&t)?;
            scores.values().next()?.get(self.metric).map(|s| s.value)
        });
        let cells = original.map(|v| v.map_or("–".to_owned(), |v| format!("{v:.3}")));
        row(out, "original, untuned", &cells, &original);
        self.rows(out, &Method::COMPARED, &RATIOS);
    }

    fn table(self, out: &mut String, methods: &[Method], ratios: &[f64]) {
        header(out, "method");
        self.rows(out, methods, ratios);
    }

    /// LoRA once, the others at each ratio.
    fn rows(self, out: &mut String, methods: &[Method], ratios: &[f64]) {
        let lora = methods.iter().filter(|m| **m == Method::Lora);
        let others = ratios.iter().flat_map(|&ratio| {
            let others = methods.iter().filter(|m| **m != Method::Lora);
            others.map(move |&m| Row::new(m, self.rule, ratio))
        });
        for this in lora.map(|&m| Row::new(m, self.rule, 0.0)).chain(others) {
            let spreads = Task::ALL.map(|t| this.spread(self.raw, t, self.pick, self.metric));
            let cells = spreads.each_ref().map(|s| show(s.as_ref(), self.seeds));
            let means = spreads.each_ref().map(|s| s.as_ref().map(|s| s.mean));
            let saved = this
                .ratio
                .map_or(String::new(), |r| format!("{:.0}%, ", 100.0 * r));
            let label = format!("{saved}{}", this.method.label());
            row(out, &label, &cells, &means);
        }
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
        "Tried: {tried}, at {:.0}% and seed 0; validation answer NLL decides.\n",
        100.0 * TELLING
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
