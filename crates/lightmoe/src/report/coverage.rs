//! What the experts saw of the sample data, and which of them saw too little.

use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::Plan;
use serde::Serialize;

use super::grids::heat;
use super::svg::{self, Mark, Row};
use super::table::{Section, thousands};

/// An expert with fewer tokens than this is flagged: what is counted on `n` tokens has a relative
/// standard error of about `1/√n`, here a tenth.
pub(super) const FEW: u64 = 100;

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

impl LayerCoverage {
    /// That of every layer.
    pub fn of(observations: &Observations) -> Vec<Self> {
        let layer = observations.layers.iter().map(|layer| Self {
            layer: layer.layer,
            tokens_per_expert: layer.selections.clone(),
            share: layer.importance(),
        });
        layer.collect()
    }

    /// How many experts saw too little.
    pub(super) fn few(&self) -> usize {
        self.tokens_per_expert.iter().filter(|&&t| t < FEW).count()
    }
}

/// The section of the page.
#[derive(Serialize)]
pub(super) struct Shown {
    svg: String,
    most: String,
    threshold: u64,
    experts: usize,
    /// How many saw fewer tokens than the threshold, and how many of them none.
    few: usize,
    silent: usize,
    flagged: Section,
}

/// `None` where nothing was observed.
pub(super) fn shown(coverage: &[LayerCoverage], plan: &Plan) -> Option<Shown> {
    let tokens = || coverage.iter().flat_map(|c| &c.tokens_per_expert);
    let most = *tokens().max()?;
    Some(Shown {
        svg: grid(coverage, most),
        most: thousands(most),
        threshold: FEW,
        experts: tokens().count(),
        few: coverage.iter().map(LayerCoverage::few).sum(),
        silent: tokens().filter(|&&t| t == 0).count(),
        flagged: flagged(coverage, plan),
    })
}

/// The experts that saw too little, with what became of them.
fn flagged(coverage: &[LayerCoverage], plan: &Plan) -> Section {
    let mut section = Section::new(["layer", "experts kept", "experts replaced"]);
    for seen in coverage {
        let Some(layer) = plan.layers.iter().find(|l| l.layer == seen.layer) else {
            continue;
        };
        let named = |replaced: bool| {
            let slots = layer.slots.iter().zip(&seen.tokens_per_expert);
            let few = slots.filter(|(s, t)| **t < FEW && s.form.is_replaced() == replaced);
            let names: Vec<_> = few.map(|(s, t)| format!("{} ({t})", s.expert)).collect();
            match names.is_empty() {
                true => "–".to_owned(),
                false => names.join(", "),
            }
        };
        if seen.few() > 0 {
            let row = vec![seen.layer.to_string(), named(false), named(true)];
            section.rows.push(row);
        }
    }
    section
}

/// Tokens per expert; the fill grows with the square root, so that rare experts stay visible.
fn grid(coverage: &[LayerCoverage], most: u64) -> String {
    let row = |layer: &LayerCoverage| {
        let cell = |(expert, &tokens): (usize, &u64)| {
            let mut title = format!(
                "Layer {}, expert {expert}: {} tokens",
                layer.layer,
                thousands(tokens)
            );
            if let Some(share) = layer.share.get(expert) {
                title += &format!(", {:.2}% of the layer's gate mass", 100.0 * share);
            }
            let mark = match tokens < FEW {
                true => Mark::Stroke,
                false => Mark::None,
            };
            heat(tokens as f64 / most.max(1) as f64, mark, title)
        };
        Row {
            label: layer.layer.to_string(),
            cells: layer
                .tokens_per_expert
                .iter()
                .enumerate()
                .map(cell)
                .collect(),
        }
    };
    let rows: Vec<_> = coverage.iter().map(row).collect();
    let describe = "Tokens per expert and layer; the table below lists the experts with few";
    svg::grid(describe, &rows)
}
