//! The results as tables: on the terminal, as Markdown, and for the page.

use std::collections::BTreeSet;
use std::fmt::Write;

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};
use lightmoe_eval::divergence::Estimate;
use serde::Serialize;

use crate::results::{Results, Stage, digits};
use crate::verdict::{Verdict, Word};

/// What is said where there is nothing to judge by.
pub(crate) const NO_THRESHOLDS: &str = "No verdict: the recipe sets no thresholds; give some, such as \
                                        `--min-score 0.97`, to `report` or to the run";

/// The steps of a run in their order; a step of another name comes after them.
const STEPS: [&str; 10] = [
    "observe",
    "plan",
    "build",
    "evaluate_original",
    "evaluate_built",
    "recover",
    "keep",
    "evaluate_recovered",
    "contrast",
    "divergence",
];

/// A table: the first column names the row, the others hold its numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Section {
    /// The head of each column.
    pub head: Vec<String>,
    /// The rows, each as long as the head.
    pub rows: Vec<Vec<String>>,
}

impl Section {
    /// A table without rows.
    pub(crate) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self {
            head: head.map(str::to_owned).to_vec(),
            rows: Vec::new(),
        }
    }
}

/// The tables of a run: what became of its size, of its scores, and what that took.
pub fn sections(results: &Results) -> Vec<Section> {
    [size(results), scores(results), cost(results)]
        .into_iter()
        .filter(|section| !section.rows.is_empty())
        .collect()
}

pub(super) fn size(results: &Results) -> Section {
    let mut section = Section::new(["size", "before", "after", "change"]);
    let (parameters, bytes) = (results.parameters, results.bytes);
    section.rows.push(vec![
        "parameters".to_owned(),
        thousands(parameters.before),
        thousands(parameters.after),
        change(parameters.before, parameters.after),
    ]);
    section.rows.push(vec![
        "weights on disk".to_owned(),
        bytes_text(bytes.before),
        bytes_text(bytes.after),
        change(bytes.before, bytes.after),
    ]);
    if parameters.trained > 0 {
        section.rows.push(vec![
            "trained in recovery".to_owned(),
            "–".to_owned(),
            thousands(parameters.trained),
            String::new(),
        ]);
    }
    section
}

pub(super) fn scores(results: &Results) -> Section {
    let mut section = Section::new(["score ± standard error", "original", "built", "recovered"]);
    let names: BTreeSet<_> = results
        .stages
        .values()
        .flatten()
        .flat_map(|(task, metrics)| metrics.keys().map(move |metric| (task, metric)))
        .collect();
    for (task, metric) in names {
        let mut row = vec![format!("{task} · {metric}")];
        row.extend(Stage::ALL.map(|stage| {
            let score = results.stages.get(&stage);
            let score = score.and_then(|s| s.get(task)?.get(metric));
            score.map_or("–".to_owned(), |s| s.show(digits(metric)))
        }));
        section.rows.push(row);
    }
    section
}

pub(super) fn cost(results: &Results) -> Section {
    let mut section = Section::new(["cost", "seconds", "peak memory, MiB"]);
    let names = results
        .seconds
        .keys()
        .chain(results.peak_rss_by_stage.keys());
    let mut names: Vec<_> = names.collect::<BTreeSet<_>>().into_iter().collect();
    names.sort_by_key(|name| STEPS.iter().position(|s| s == name).unwrap_or(STEPS.len()));
    for name in names {
        section.rows.push(vec![
            name.clone(),
            results
                .seconds
                .get(name)
                .map_or("–".to_owned(), |s| format!("{s:.1}")),
            results
                .peak_rss_by_stage
                .get(name)
                .map_or("–".to_owned(), |&b| mebibytes(b)),
        ]);
    }
    if section.rows.len() > 1 {
        section.rows.push(vec![
            "whole run".to_owned(),
            format!("{:.1}", results.seconds.values().sum::<f64>()),
            mebibytes(results.peak_rss_bytes),
        ]);
    }
    section
}

/// Sets a text in the style of an ANSI code, or leaves it.
pub type Paint = fn(&str, &str) -> String;

/// A text with the ANSI sequence `code` around it.
pub fn coloured(code: &str, text: &str) -> String {
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// A text as it is.
pub fn plain(_: &str, text: &str) -> String {
    text.to_owned()
}

/// The tables and the verdict for a terminal.
pub fn terminal(results: &Results, paint: Paint) -> String {
    let rule = LineStyle::none().fill('─').junction('─');
    let mut out = String::new();
    for section in sections(results) {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING.header_separator(rule))
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header(&section.head)
            .add_rows(&section.rows);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for (i, line) in table.trim_fmt().lines().enumerate() {
            let line = if i == 0 {
                paint("1", line)
            } else {
                line.to_owned()
            };
            out += &line;
            out.push('\n');
        }
        out.push('\n');
    }
    // Writing to a string cannot fail, here and below.
    let compared = results.comparisons();
    if !compared.is_empty() {
        let _ = writeln!(out, "{} against the original:", results.task);
    }
    for comparison in compared {
        let _ = writeln!(out, "  {comparison}");
    }
    out + &verdict(results.verdict.as_ref(), paint)
}

/// The verdict for a terminal, with what it rests on.
pub fn verdict(verdict: Option<&Verdict>, paint: Paint) -> String {
    let Some(verdict) = verdict else {
        return format!("{NO_THRESHOLDS}\n");
    };
    let code = match verdict.word {
        Word::Go => "1;32",
        Word::NoGo => "1;31",
        Word::Undecided => "1;33",
    };
    let word = paint(code, verdict.word.name());
    let mut out = format!("{word}: {}\n", verdict.word.sentence());
    for check in &verdict.checks {
        let _ = writeln!(out, "  {check}");
    }
    out
}

/// The tables as Markdown.
pub fn markdown(results: &Results) -> String {
    let tables: Vec<_> = sections(results).iter().map(markdown_table).collect();
    tables.join("\n")
}

/// A table as Markdown.
pub(crate) fn markdown_table(section: &Section) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<_> = cells
            .iter()
            .map(|cell| cell.replace('|', "\\|").replace(['\n', '\r'], " "))
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut out = line(&section.head);
    out += "| :--- |";
    out += &" ---: |".repeat(section.head.len() - 1);
    out.push('\n');
    out.extend(section.rows.iter().map(|row| line(row)));
    out
}

/// A table for the terminal that is Markdown, too, with columns of one width: the first `words` of them to
/// the left, the numbers behind them to the right.
pub(crate) fn ascii(section: &Section, words: usize) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(&section.head).add_rows(&section.rows);
    for column in table.column_iter_mut().skip(words) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// `0.1250 ± 0.0125`, with `digits` after the point, as far as there is an error.
pub(crate) fn estimate(estimate: Estimate, digits: usize) -> String {
    let value = estimate.value;
    match estimate.stderr {
        Some(stderr) => format!("{value:.digits$} ± {stderr:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

/// `1,234,567`.
pub(crate) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in MiB, or in GiB from 1 GiB on.
pub(crate) fn bytes_text(bytes: u64) -> String {
    match bytes >> 30 {
        0 => format!("{:.2} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

fn mebibytes(bytes: u64) -> String {
    thousands((bytes as f64 / 1_048_576.0).round() as u64)
}

/// `−50.2%`.
pub(super) fn change(before: u64, after: u64) -> String {
    if before == 0 {
        return "–".to_owned();
    }
    let percent = 100.0 * (after as f64 / before as f64 - 1.0);
    let sign = if percent <= 0.0 { '−' } else { '+' };
    format!("{sign}{:.1}%", percent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;
    use crate::verdict::{Thresholds, judge};

    const MARKDOWN: &str = "\
| size | before | after | change |
| :--- | ---: | ---: | ---: |
| parameters | 3,560,000 | 1,772,880 | −50.2% |
| weights on disk | 13.58 MiB | 6.76 MiB | −50.2% |
| trained in recovery | – | 240,000 |  |

| score ± standard error | original | built | recovered |
| :--- | ---: | ---: | ---: |
| math · answer_nll | 0.750 ± 0.031 | 2.500 ± 0.062 | 0.500 ± 0.031 |
| math · exact_match | 0.570 ± 0.022 | 0.112 ± 0.014 | 0.554 ± 0.022 |

| cost | seconds | peak memory, MiB |
| :--- | ---: | ---: |
| observe | 2.2 | 40 |
| build | 1.5 | 50 |
| recover | 60.0 | 100 |
| whole run | 63.8 | 100 |
";

    #[test]
    fn the_markdown_is_the_golden_one() {
        assert_eq!(markdown(&sample()), MARKDOWN);
    }

    #[test]
    fn the_terminal_table_holds_every_cell_and_colour_only_on_request() {
        let mut results = sample();
        let plain = terminal(&results, plain);
        assert!(!plain.contains('\x1b'));
        for cell in sections(&results)
            .iter()
            .flat_map(|s| s.rows.iter().flatten())
        {
            assert!(
                plain.contains(cell.as_str()),
                "{cell} is missing in\n{plain}"
            );
        }
        assert!(plain.contains("\nNo verdict: "), "{plain}");
        let thresholds = Thresholds {
            min_score: Some(0.9),
            ..Thresholds::default()
        };
        results.verdict = judge(&results.measured(), &thresholds).unwrap();
        let text = terminal(&results, coloured);
        assert!(text.contains("\x1b[1;32mGo\x1b[0m"), "{text}");
        assert!(text.contains("math · exact_match: 0.554"), "{text}");
    }

    #[test]
    fn a_missing_stage_is_a_dash_and_bars_are_escaped() {
        let mut results = sample();
        results.stages.remove(&Stage::Built);
        for tasks in results.stages.values_mut() {
            let scores = tasks.remove("math").unwrap_or_default();
            tasks.insert("a|b".to_owned(), scores);
        }
        let text = markdown(&results);
        assert!(
            text.contains("| a\\|b · exact_match | 0.570 ± 0.022 | – | 0.554"),
            "{text}"
        );
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(1_000), "1,000");
        assert_eq!(thousands(12_345_678), "12,345,678");
        assert_eq!(bytes_text(3 << 30), "3.00 GiB");
        assert_eq!(change(0, 1), "–");
        assert_eq!(change(2, 3), "+50.0%");
    }
}
