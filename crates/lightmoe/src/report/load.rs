//! How busy the experts are in the original and in the result, on the same texts.

use serde::Serialize;

use super::grids::heat;
use super::svg::{self, Mark, Row};
use super::table::{Section, thousands};
use crate::contrast::{Contrast, LoadPair};

/// The section of the page.
#[derive(Serialize)]
pub(super) struct Shown {
    task: String,
    examples: usize,
    tokens: String,
    original: String,
    result: String,
    /// The largest share of a layer's choices that an expert has, in percent.
    most: String,
    table: Section,
}

/// `None` where nothing was counted.
pub(super) fn shown(contrast: &Contrast) -> Option<Shown> {
    let pairs = &contrast.load;
    let both = |pair: &LoadPair| [shares(&pair.original), shares(&pair.result)].concat();
    let most = pairs.iter().flat_map(both).fold(0.0, f64::max);
    let picture = |name: &str, of: fn(&LoadPair) -> &[u64]| {
        let rows: Vec<_> = pairs
            .iter()
            .map(|pair| row(pair.layer, of(pair), most))
            .collect();
        let describe = format!("Load of every expert in the {name}; the table sums it up by layer");
        svg::grid(&describe, &rows)
    };
    (most > 0.0).then(|| Shown {
        task: contrast.task.clone(),
        examples: contrast.examples,
        tokens: thousands(contrast.tokens),
        original: picture("original", |pair| &pair.original),
        result: picture("result", |pair| &pair.result),
        most: format!("{:.1}%", 100.0 * most),
        table: table(pairs),
    })
}

/// Each expert's share of a layer's choices.
fn shares(tokens: &[u64]) -> Vec<f64> {
    let all = tokens.iter().sum::<u64>().max(1) as f64;
    tokens.iter().map(|&t| t as f64 / all).collect()
}

fn row(layer: usize, tokens: &[u64], most: f64) -> Row {
    let cell = |(expert, (share, &tokens)): (usize, (f64, &u64))| {
        let title = format!(
            "Layer {layer}, expert {expert}: {} tokens, {:.2}% of the layer's choices",
            thousands(tokens),
            100.0 * share
        );
        heat(share / most, Mark::None, title)
    };
    let of_expert = shares(tokens).into_iter().zip(tokens).enumerate();
    Row {
        label: layer.to_string(),
        cells: of_expert.map(cell).collect(),
    }
}

fn table(pairs: &[LoadPair]) -> Section {
    let mut section = Section::new([
        "layer",
        "choices moved",
        "experts in use",
        "busiest expert",
        "never chosen",
    ]);
    section.rows = pairs
        .iter()
        .map(|pair| {
            let both = [&pair.original, &pair.result];
            let of =
                |value: &dyn Fn(&[u64]) -> String| both.map(|tokens| value(tokens)).join(" → ");
            let busiest = |tokens: &[u64]| shares(tokens).into_iter().fold(0.0, f64::max);
            let silent = |tokens: &[u64]| tokens.iter().filter(|&&t| t == 0).count();
            vec![
                pair.layer.to_string(),
                format!("{:.1}%", 100.0 * moved(&pair.original, &pair.result)),
                of(&|tokens| format!("{:.1}", in_use(tokens))),
                of(&|tokens| format!("{:.1}%", 100.0 * busiest(tokens))),
                of(&|tokens| silent(tokens).to_string()),
            ]
        })
        .collect();
    section
}

/// The share of choices that would have to go to other experts to make one load the other: half of the
/// sum of the differences of the shares.
fn moved(before: &[u64], after: &[u64]) -> f64 {
    let differences = shares(before).into_iter().zip(shares(after));
    0.5 * differences.map(|(a, b)| (a - b).abs()).sum::<f64>()
}

/// How many experts with equal shares would be as evenly used: the exponential of the entropy.
fn in_use(tokens: &[u64]) -> f64 {
    let shares = shares(tokens).into_iter().filter(|&share| share > 0.0);
    (-shares.map(|share| share * share.ln()).sum::<f64>()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_summed_up() {
        assert!((in_use(&[5, 5, 5, 5]) - 4.0).abs() < 1e-12);
        assert!((in_use(&[9, 0, 0]) - 1.0).abs() < 1e-12);
        // Of ten choices two went from the first expert to the last.
        assert!((moved(&[6, 4, 0], &[4, 4, 2]) - 0.2).abs() < 1e-12);
        assert_eq!(moved(&[3, 1], &[6, 2]), 0.0);
    }
}
