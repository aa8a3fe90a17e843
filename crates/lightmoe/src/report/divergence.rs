//! How far the result's predictions are from the original's, whole and layer by layer.

use lightmoe_eval::divergence::Estimate;
use serde::Serialize;

use super::svg;
use super::table::{Section, estimate, thousands};
use crate::divergence::{DivergenceFile, TextDivergence};

/// The section of the page.
#[derive(Serialize)]
pub(super) struct Shown {
    name: String,
    rows: usize,
    tokens: String,
    summary: Section,
    /// The KL divergence that each layer makes alone; `None` where only the whole was measured.
    svg: Option<String>,
    layers: Section,
}

/// What was measured on the first text; `None` without any.
pub(super) fn shown(file: &DivergenceFile) -> Option<Shown> {
    let text = file.texts.first()?;
    let found = &text.divergence;
    Some(Shown {
        name: text.name.clone(),
        rows: found.rows,
        tokens: thousands(found.tokens as u64),
        summary: summary(text),
        svg: picture(text),
        layers: layers(text),
    })
}

fn summary(text: &TextDivergence) -> Section {
    let found = &text.divergence;
    let mut section = Section::new(["what", "value"]);
    let mut add = |what: &str, value: String| section.rows.push(vec![what.to_owned(), value]);
    let quantiles = &found.kl_quantiles;
    add("KL a token, mean", estimate(found.whole.kl, 4));
    add("KL a token, median", format!("{:.4}", quantiles.median));
    add(
        "KL a token, 99th percentile",
        format!("{:.3}", quantiles.p99),
    );
    add("KL a token, highest", format!("{:.3}", quantiles.max));
    add("same likeliest token", percent(found.whole.top1_agreement));
    let ratio = Estimate {
        value: found.perplexity.ratio,
        stderr: found.perplexity.ratio_stderr,
    };
    add("perplexity by the original's", estimate(ratio, 3));
    section
}

fn picture(text: &TextDivergence) -> Option<String> {
    let found = &text.divergence;
    let layers = found.layers.iter();
    let values: Vec<_> = layers
        .map(|l| (l.layer, Some(l.distance.kl.value)))
        .collect();
    (!values.is_empty()).then(|| {
        let describe = "KL divergence that each layer makes alone; the table holds the numbers";
        svg::bars(describe, &values, None)
    })
}

fn layers(text: &TextDivergence) -> Section {
    let mut section = Section::new([
        "layer",
        "KL a token",
        "same likeliest token",
        "NLL increase",
    ]);
    let found = &text.divergence;
    let of_layers = found
        .layers
        .iter()
        .map(|l| (l.layer.to_string(), &l.distance));
    let all = of_layers.chain([("all of them".to_owned(), &found.whole)]);
    section.rows = all
        .map(|(name, distance)| {
            vec![
                name,
                estimate(distance.kl, 4),
                percent(distance.top1_agreement),
                estimate(distance.nll_increase, 4),
            ]
        })
        .collect();
    section
}

fn percent(share: Estimate) -> String {
    let hundred = Estimate {
        value: 100.0 * share.value,
        stderr: share.stderr.map(|stderr| 100.0 * stderr),
    };
    format!("{} %", estimate(hundred, 1))
}
