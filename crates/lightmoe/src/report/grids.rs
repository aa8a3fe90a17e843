//! The pictures with one square per expert, their legend, and the same layer by layer in numbers.

use lightmoe_compress::plan::{LayerPlan, Plan, SlotForm, SlotPlan};
use serde::Serialize;

use super::coverage::LayerCoverage;
use super::svg::{self, Cell, Mark, Row};
use super::table::{Section, thousands};

/// Colours for groups; a group beyond them takes the first again, and its number tells it apart.
const COLOURS: usize = 8;

/// An entry of the legend.
#[derive(Serialize)]
pub(super) struct Swatch {
    class: String,
    label: String,
}

fn class_of(form: SlotForm) -> String {
    match (form, form.group()) {
        (SlotForm::Dense, _) => "kept".to_owned(),
        (SlotForm::Removed { .. }, _) => "removed".to_owned(),
        (SlotForm::Mixed { .. }, _) => "mixed".to_owned(),
        (SlotForm::Constant, _) => "constant".to_owned(),
        (_, Some(group)) => format!("g{}", group % COLOURS),
        (_, None) => "alone".to_owned(),
    }
}

/// One square per expert, coloured by what becomes of it.
pub(super) fn experts<'a>(
    plan: &Plan,
    seen: &dyn Fn(usize) -> Option<&'a LayerCoverage>,
    experts: usize,
    replaced: usize,
) -> String {
    let widest = plan.settings.rank.max(1) as f64;
    let unit = plan.damage.as_ref().map(|damage| damage.sensitivity.unit());
    let varied = unit.is_some();
    let cell = |plan: &LayerPlan, slot: &SlotPlan| {
        let layer = plan.layer;
        let mut opacity = 1.0;
        let (mut class, mut text) = (class_of(slot.form), String::new());
        let mut title = format!("Layer {layer}, expert {}: ", slot.expert);
        match slot.form {
            SlotForm::Adapted {
                group,
                rank,
                bias,
                dominant,
            } => {
                match group {
                    Some(group) => {
                        title += &format!("replaced, group {group}");
                        text = group.to_string();
                    }
                    None => title += "replaced, no shared base",
                }
                if varied {
                    text = rank.to_string();
                    opacity = 0.15 + 0.85 * rank as f64 / widest;
                }
                if dominant {
                    title += " (dominant)";
                    class += " dominant";
                }
                title += &format!(", rank {rank}");
                if bias {
                    title += ", with a bias";
                }
                if let Some(shape) = &plan.factored {
                    title += &format!(", its base of rank {} and a few rows", shape.rank);
                }
            }
            SlotForm::Dense => title += "kept",
            SlotForm::Mixed { bases, rank } => {
                title += &format!("mixed from {bases} bases, rank {rank}");
            }
            SlotForm::Constant => {
                title += "its mean output";
                text = "μ".to_owned();
            }
            SlotForm::Removed { into: None } => title += "removed",
            SlotForm::Removed { into: Some(into) } => {
                title += &format!("merged into expert {into}");
                text = into.to_string();
            }
        }
        title += &format!(", score {:.4}", slot.score);
        if let Some((damage, unit)) = slot.damage.zip(unit) {
            title += &format!(", expected damage {damage:.2e} {unit}");
        }
        let tokens = seen(layer).and_then(|c| c.tokens_per_expert.get(slot.expert));
        if let Some(&tokens) = tokens {
            title += &format!(", {} tokens", thousands(tokens));
        }
        Cell {
            class,
            opacity,
            text,
            mark: Mark::None,
            title,
        }
    };
    let rows: Vec<_> = plan
        .layers
        .iter()
        .map(|layer| Row {
            label: layer.layer.to_string(),
            cells: layer.slots.iter().map(|s| cell(layer, s)).collect(),
        })
        .collect();
    let describe = format!(
        "Experts by layer: {replaced} of {experts} are replaced; the table below counts them"
    );
    svg::grid(&describe, &rows)
}

/// A square whose fill tells a `part` of the fullest one's number, and nothing by a cross. The fill grows
/// with the square root, so that rare experts stay visible.
pub(super) fn heat(part: f64, mark: Mark, title: String) -> Cell {
    let none = part == 0.0;
    Cell {
        class: if none { "silent" } else { "heat" }.to_owned(),
        opacity: if none { 1.0 } else { 0.05 + 0.95 * part.sqrt() },
        text: String::new(),
        mark: if none { Mark::Cross } else { mark },
        title,
    }
}

/// Only the kinds of expert that occur.
pub(super) fn legend(plan: &Plan) -> Vec<Swatch> {
    let slots = || plan.layers.iter().flat_map(|l| &l.slots);
    let swatch = |class: &str, label: String| Swatch {
        class: class.to_owned(),
        label,
    };
    let mut legend = Vec::new();
    if slots().any(|s| !s.form.is_replaced()) {
        legend.push(swatch("kept", "kept".to_owned()));
    }
    let groups = slots().filter_map(|s| s.form.group()).max();
    for group in 0..groups.map_or(0, |g| g + 1) {
        let class = format!("g{}", group % COLOURS);
        legend.push(swatch(&class, format!("group {group}")));
    }
    for (class, label) in [
        ("alone", "replaced, no shared base"),
        ("mixed", "mixed from the layer's bases"),
        ("constant", "μ: its mean output"),
        ("removed", "removed; a number: merged into that expert"),
    ] {
        if slots().any(|s| class_of(s.form) == class) {
            legend.push(swatch(class, label.to_owned()));
        }
    }
    if groups.is_some() {
        legend.push(swatch("dominant", "dominant of its group".to_owned()));
    }
    legend
}

/// The layers in numbers; how many experts of a layer saw too little, where that is known.
pub(super) fn layers(plan: &Plan, few: &dyn Fn(usize) -> Option<usize>) -> Section {
    let mut section = Section::new([
        "layer",
        "kept",
        "replaced",
        "group sizes",
        "few tokens",
        "threshold",
        "router norm",
    ]);
    let dash = || "–".to_owned();
    let number = |value: Option<f64>| value.map_or_else(dash, |v| format!("{v:.4}"));
    section.rows = plan
        .layers
        .iter()
        .map(|layer| {
            let sizes = (0..layer.groups).map(|g| layer.members(g).count().to_string());
            let sizes: Vec<_> = sizes.collect();
            vec![
                layer.layer.to_string(),
                (layer.slots.len() - layer.replaced()).to_string(),
                layer.replaced().to_string(),
                match sizes.is_empty() {
                    true => dash(),
                    false => sizes.join(" + "),
                },
                few(layer.layer).map_or_else(dash, |n| n.to_string()),
                number(layer.threshold),
                number(layer.router_norm),
            ]
        })
        .collect();
    section
}
