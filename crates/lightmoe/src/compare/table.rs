//! The tables of a comparison, as Markdown, as CSV and for the page; made from `compare.json` alone.

use super::Comparison;
use super::measure::Measure;
use super::rows::{Block, COLUMNS, ORIGINAL, blocks};
use crate::report::table::{Section, markdown_table};
use std::fmt::Write;

/// The table of a task.
pub(super) fn section(block: &Block, comparison: &Comparison) -> Section {
    let mut section = Section::new(["method", "ratio"]);
    let columns = COLUMNS.iter().enumerate();
    let columns: Vec<_> = columns.filter(|(i, _)| block.measure.shows(*i)).collect();
    let heads = columns.iter().map(|(_, column)| column.head.to_owned());
    section.head.extend(heads);
    section.head.extend(["lr", "seeds"].map(str::to_owned));
    for line in &block.lines {
        let mut row = vec![line.method.clone(), line.ratio()];
        row.extend(
            columns
                .iter()
                .map(|(i, column)| column.show(line.entries[*i])),
        );
        row.push(line.lr.map_or("–".to_owned(), |lr| lr.to_string()));
        row.push(match line.is_whole(comparison.grid.seeds) {
            true if line.method == ORIGINAL => "–".to_owned(),
            true => line.seeds.to_string(),
            false => format!("{} of {}", line.seeds, comparison.grid.seeds),
        });
        section.rows.push(row);
    }
    section
}

/// Every row with its score after recovery on each task; the original's, untuned.
pub(super) fn overview(blocks: &[Block], comparison: &Comparison) -> Section {
    let mut section = Section::new(["method", "ratio"]);
    let names = blocks.iter().map(|b| b.measure.head(&b.task));
    section.head.extend(names);
    for (row, first) in blocks[0].lines.iter().enumerate() {
        let mut cells = vec![first.method.clone(), first.ratio()];
        cells.extend(blocks.iter().map(|block| {
            let line = &block.lines[row];
            let missing = match line.is_whole(comparison.grid.seeds) || line.seeds == 0 {
                true => String::new(),
                false => format!(" ({})", line.seeds),
            };
            let column = match line.method == ORIGINAL {
                true => block.measure.before(),
                false => block.measure.after(),
            };
            COLUMNS[column].show(line.entries[column]) + &missing
        }));
        section.rows.push(cells);
    }
    section
}

/// The table for the terminal.
pub(super) fn summary(comparison: &Comparison) -> String {
    markdown_table(&overview(&blocks(comparison), comparison))
}

/// What the numbers are, a paragraph each.
pub(super) fn notes(comparison: &Comparison) -> Vec<String> {
    let grid = &comparison.grid;
    let records = &comparison.records;
    let mut machines: Vec<String> = records
        .iter()
        .map(|r| format!("{}, threads of a cell: {}", r.processor, r.threads))
        .collect();
    machines.sort();
    machines.dedup();
    let last = records.iter().map(|r| r.date.as_str()).max().unwrap_or("–");
    let choice = match grid.rates.len() {
        0 => "The learning rate is the recipe's.".to_owned(),
        1 => format!("The learning rate is {}.", grid.rates[0]),
        _ => format!(
            "The learning rate of each method and task is the one of {} with the lowest answer NLL on \
             the validation split, at the method's highest ratio and seed 0; a method with a rate of \
             its own keeps it.",
            grid.rates
                .iter()
                .map(f64::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    };
    let (what, items, of) = match comparison.measure {
        Measure::Perplexity => (
            "The score is perplexity: lower is better.",
            "windows",
            "NLL",
        ),
        Measure::Score => (
            "The score is exact match, of translation chrF / 100.",
            "items",
            "answer NLL",
        ),
    };
    vec![
        format!(
            "Model `{}` ({}), {} cells; last on {last}; {}.",
            comparison.model,
            comparison.inputs.model,
            records.len(),
            machines.join("; ")
        ),
        format!(
            "{what} It is the mean over seeds. Behind ± \
             stands the standard error of the score of one seed over its test {items}, in brackets the lowest and the highest of the {} seeds. A \
             seed changes the training examples, their order and what is drawn at random, not the \
             model or the test {items}.",
            grid.seeds
        ),
        format!("Before and after mean the training of the recovery; `original` is the untuned model. Perplexity is exp of the mean {of} per token. {choice}"),
        "Active parameters work on one token, on average: all but the routed experts and the embedding \
         rows of other tokens, and of the slots that the router chooses what they hold: an expert, a base \
         and an adapter, or a constant. Trained parameters are those of the recovery. Weights are bytes \
         on disk."
            .to_owned(),
        "Seconds (the mean over seeds) and peak memory (the highest) are those of observe, plan, build and \
         recover, each cell in a process of its own; the observations that cells share count in each."
            .to_owned(),
    ]
}

/// The page as Markdown.
pub(super) fn markdown(comparison: &Comparison) -> String {
    let blocks = blocks(comparison);
    let mut out = String::from("# Comparison of methods\n");
    // Writing to a string cannot fail.
    for note in notes(comparison) {
        let _ = write!(out, "\n{note}\n");
    }
    if blocks.len() > 1 {
        let table = markdown_table(&overview(&blocks, comparison));
        let _ = write!(out, "\n## Score after recovery\n\n{table}");
    }
    for block in &blocks {
        let table = markdown_table(&section(block, comparison));
        let _ = write!(out, "\n## {}\n\n{table}", block.task);
    }
    out
}

/// One line for each row of each task; scores with their standard error, the lowest and the highest
/// seed.
pub(super) fn csv(comparison: &Comparison) -> String {
    let mut head: Vec<String> = ["task", "method", "ratio", "seeds", "lr"]
        .map(str::to_owned)
        .to_vec();
    for column in &COLUMNS {
        head.push(column.key.to_owned());
        if column.is_scored() {
            head.extend(["stderr", "min", "max"].map(|part| format!("{}_{part}", column.key)));
        }
    }
    let mut out = head.join(",") + "\n";
    let text = |number: Option<f64>| number.map_or(String::new(), |n| n.to_string());
    for block in blocks(comparison) {
        for line in block.lines {
            let mut cells = vec![
                block.task.clone(),
                quoted(&line.method),
                text(line.ratio),
                line.seeds.to_string(),
                text(line.lr),
            ];
            for (entry, column) in line.entries.iter().zip(&COLUMNS) {
                cells.push(text(entry.map(|e| e.spread.mean)));
                if column.is_scored() {
                    cells.push(text(entry.map(|e| e.stderr)));
                    cells.push(text(entry.map(|e| e.spread.low)));
                    cells.push(text(entry.map(|e| e.spread.high)));
                }
            }
            out += &(cells.join(",") + "\n");
        }
    }
    out
}

/// A field of a CSV (RFC 4180).
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}
