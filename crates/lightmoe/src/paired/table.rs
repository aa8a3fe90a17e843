//! The comparison to look at: a table that is Markdown, too.

use super::{Outcome, PairedFile, Row};
use crate::report::table::{Section, ascii};
use lightmoe_eval::paired::Flips;
use std::fmt::Write;

/// The table with its warnings.
pub(super) fn table(file: &PairedFile) -> String {
    let mut table = Section::new([
        "task", "metric", "items", "A", "B", "B - A", "95 %", "lost", "gained", "p", "B is", "note",
    ]);
    // Warnings below the table, each once.
    let mut notes: Vec<&str> = Vec::new();
    for row in &file.rows {
        let numbers = row.warnings.iter().map(|warning| {
            let known = notes.iter().position(|note| *note == warning.as_str());
            let number = known.unwrap_or_else(|| {
                notes.push(warning);
                notes.len() - 1
            });
            format!("[{}]", number + 1)
        });
        let numbers: Vec<String> = numbers.collect();
        table.rows.push(cells(row, numbers.join(" ")));
    }
    let mut out = ascii(&table, 2) + "\n";
    for (side, name) in [(&file.a, "A"), (&file.b, "B")] {
        // Writing to a string cannot fail.
        let _ = write!(out, "\n{name}: {} ({})", side.path, side.model);
        if !side.alone.is_empty() {
            let _ = write!(out, "; not compared: {}", side.alone.join(", "));
        }
    }
    for (number, note) in notes.iter().enumerate() {
        let _ = write!(out, "\n[{}] {note}", number + 1);
    }
    out
}

/// A page with the table and what its columns mean.
pub(super) fn page(file: &PairedFile) -> String {
    let whole = table(file);
    let (table, rest) = whole.split_once("\n\n").unwrap_or((&whole, ""));
    let lines: String = rest.lines().map(|line| format!("- {line}\n")).collect();
    format!(
        "# {} against {}\n\n{table}\n\n{lines}\n\
         Scores on the items that are in both evaluations. 95 %: interval of the difference, from the \
         differences of the items, or by a paired bootstrap for perplexities, BLEU and chrF. Lost, gained: \
         items right in A or in B alone; p: McNemar's exact test of them, or that of the bootstrap, as \
         sacreBLEU computes it. B is better or worse where McNemar's test, or without it the interval, \
         leaves chance less than 5 %; each row is judged by itself.\n",
        file.b.model, file.a.model
    )
}

fn cells(row: &Row, notes: String) -> Vec<String> {
    let largest = row.difference.a.abs().max(row.difference.b.abs());
    let number = |value: f64| match largest {
        large if large >= 1e6 => format!("{value:.3e}"),
        large if large >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    };
    let signed = |value: f64| match value > 0.0 {
        true => format!("+{}", number(value)),
        false => number(value),
    };
    let difference = &row.difference;
    let count = |of: fn(Flips) -> usize| {
        row.flips
            .map_or(String::new(), |flips| of(flips).to_string())
    };
    let bootstrap_p = difference.uncertainty.and_then(|of| of.bootstrap_p);
    let p_value = row.mcnemar_p.or(bootstrap_p);
    let metric = match row.filter.as_str() {
        "" | "none" => row.metric.clone(),
        filter => format!("{}, {filter}", row.metric),
    };
    vec![
        row.task.clone(),
        metric,
        row.items.to_string(),
        number(difference.a),
        number(difference.b),
        signed(difference.difference),
        difference.uncertainty.map_or("unknown".into(), |of| {
            format!("{} … {}", signed(of.low), signed(of.high))
        }),
        count(|flips| flips.lost),
        count(|flips| flips.gained),
        p_value.map_or(String::new(), |p| match p < 0.001 {
            true => "< 0.001".into(),
            false => format!("{p:.3}"),
        }),
        match row.outcome {
            Outcome::Better => "better".into(),
            Outcome::Worse => "worse".into(),
            Outcome::Other => "other".into(),
            Outcome::Unclear => "–".into(),
        },
        notes,
    ]
}
