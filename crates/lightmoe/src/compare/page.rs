//! The page of a comparison: scores against sizes, and the tables; one file without scripts or
//! outside resources.

use super::Comparison;
use super::measure::{BYTES, Measure, PARAMETERS};
use super::rows::{Block, COLUMNS, Line, ORIGINAL, blocks, percent};
use super::table::{notes, overview, section};
use crate::report::page_of;
use crate::report::svg::HALF;
use crate::report::svg::scatter::{Axes, Dot, scatter};
use crate::report::table::Section;
use anyhow::Result;
use serde::Serialize;

/// The template, behind what all pages have in common.
const TEMPLATE: &str = concat!(
    include_str!("../report/macros.html.jinja"),
    include_str!("compare.html.jinja")
);
/// Colours in the page's style; a method beyond them takes the first again, and its number tells it
/// apart.
const COLOURS: usize = 8;

#[derive(Serialize)]
struct Page<'a> {
    model: &'a str,
    version: &'a str,
    lead: String,
    legend: Vec<Swatch>,
    overview: Option<Section>,
    blocks: Vec<Shown>,
    notes: Vec<String>,
    settings: String,
}

#[derive(Serialize)]
struct Swatch {
    class: String,
    label: String,
}

/// One task: its pictures and its table.
#[derive(Serialize)]
struct Shown {
    task: String,
    /// What the pictures show of the models.
    score: &'static str,
    pictures: Vec<Picture>,
    table: Section,
}

#[derive(Serialize)]
struct Picture {
    name: &'static str,
    svg: String,
}

/// The page as HTML.
///
/// # Errors
/// If the template cannot be rendered.
pub(super) fn html(comparison: &Comparison) -> Result<String> {
    let grid = &comparison.grid;
    let blocks = blocks(comparison);
    let labels: Vec<&str> = grid.methods.iter().map(|m| m.label.as_str()).collect();
    let legend = labels.iter().enumerate().map(|(i, label)| Swatch {
        class: colour(i),
        label: format!("{} {label}", i + 1),
    });
    let shown = blocks.iter().map(|block| Shown {
        task: block.task.clone(),
        score: block.measure.shown(),
        pictures: pictures(block, &labels),
        table: section(block, comparison),
    });
    let count = |n: usize, what: &str| match n {
        1 => format!("1 {what}"),
        _ => format!("{n} {what}s"),
    };
    let lead = [
        count(labels.len(), "method"),
        count(grid.ratios.len(), "ratio"),
        count(grid.tasks.len(), "task"),
        count(grid.seeds as usize, "seed"),
    ];
    page_of(
        TEMPLATE,
        Page {
            model: &comparison.model,
            version: &comparison.inputs.lightmoe,
            lead: lead.join(" × "),
            legend: legend.collect(),
            overview: (blocks.len() > 1).then(|| overview(&blocks, comparison)),
            blocks: shown.collect(),
            notes: notes(comparison),
            settings: serde_json::to_string_pretty(&(&comparison.settings, grid))?,
        },
    )
}

fn colour(method: usize) -> String {
    format!("g{}", method % COLOURS)
}

/// Score against parameters and against bytes, where there is any.
fn pictures(block: &Block, labels: &[&str]) -> Vec<Picture> {
    let sizes = [("parameters", PARAMETERS), ("bytes of the weights", BYTES)];
    let picture = |(name, column): (&'static str, usize)| {
        let original = block.lines.iter().find(|l| l.method == ORIGINAL)?;
        let whole = original.entries[column]?.spread.mean;
        let dots: Vec<Dot> = block
            .lines
            .iter()
            .filter_map(|line| dot(line, block.measure, (column, whole), labels))
            .collect();
        let untuned = original.entries[block.measure.before()];
        let untuned = untuned.map(|e| block.measure.height(e.spread.mean));
        let untuned = untuned.map(|height| (height, "original, untuned"));
        let (y, better) = block.measure.axis();
        let describe = format!(
            "{y} on {} against {name} left; the table below holds the numbers",
            block.task
        );
        let axes = Axes {
            x: &format!("{name} left, %"),
            y,
            better,
        };
        let svg = scatter(&describe, HALF, &axes, &dots, untuned)?;
        Some(Picture { name, svg })
    };
    sizes.into_iter().filter_map(picture).collect()
}

/// The dot of a row that is measured, against the size in `column`, of which the original has `whole`.
fn dot(
    line: &Line,
    measure: Measure,
    (column, whole): (usize, f64),
    labels: &[&str],
) -> Option<Dot> {
    let method = labels.iter().position(|label| *label == line.method)?;
    let after = measure.after();
    let (score, size) = (line.entries[after]?.spread, line.entries[column]?.spread);
    let ratio = line.ratio.map_or(String::new(), percent);
    Some(Dot {
        x: 100.0 * size.mean / whole,
        y: measure.height(score.mean),
        range: (measure.height(score.low), measure.height(score.high)),
        class: colour(method),
        title: format!(
            "{} {ratio}: {}, {}",
            line.method,
            COLUMNS[after].show(line.entries[after]),
            COLUMNS[column].show(line.entries[column])
        ),
        label: (method + 1).to_string(),
    })
}
