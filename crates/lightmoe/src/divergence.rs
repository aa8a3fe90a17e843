//! `divergence.json`: how far a compressed model's predictions are from the original's, and the table
//! of it.

use crate::pipeline::load_pair;
use crate::preflight::Refused;
use crate::progress::{Progress, stopped};
use crate::report::table::{Section, ascii, estimate};
use crate::source::model_fingerprint;
use crate::versioned;
use anyhow::{Context, Result, bail};
use lightmoe_data::Encoded;
use lightmoe_eval::divergence::{Distance, Divergence, Estimate, ModelPair, Swaps, divergence};
use lightmoe_models::{Checkpoint, folder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the layout of `divergence.json`.
pub const SCHEMA_VERSION: u32 = 1;

/// Where a run keeps the file.
pub const DIVERGENCE: &str = "divergence.json";

/// The whole of `divergence.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DivergenceFile {
    /// Version of this layout.
    #[schemars(extend("const" = SCHEMA_VERSION))]
    pub schema_version: u32,
    /// Version of the program that wrote it.
    pub lightmoe_version: String,
    /// What was measured against.
    pub original: ModelFacts,
    /// What was made of it.
    pub compressed: ModelFacts,
    /// By text.
    pub texts: Vec<TextDivergence>,
}

impl DivergenceFile {
    /// That of the run in the folder `run`, if there is one.
    ///
    /// # Errors
    /// If it is damaged or of another version.
    pub fn of_run(run: &Path) -> Result<Option<Self>> {
        let path = run.join(DIVERGENCE);
        if !path.exists() {
            return Ok(None);
        }
        versioned::load(&path, SCHEMA_VERSION, "remove it").map(Some)
    }

    /// The whole compressed model on the first text.
    pub fn first(&self) -> Option<Distance> {
        self.texts.first().map(|text| text.divergence.whole)
    }
}

/// Which model it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelFacts {
    /// As it was given.
    pub name: String,
    /// Of its content.
    pub fingerprint: String,
}

/// What came of a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TextDivergence {
    /// The name of the file or task.
    pub name: String,
    /// Of the tokens and of which of them are predicted: equal where the same was measured.
    pub fingerprint: String,
    /// The numbers.
    #[serde(flatten)]
    pub divergence: Divergence,
}

/// A text as rows of tokens; those from `answer_start` on are predicted.
pub struct Text {
    /// The name of the file or task.
    pub name: String,
    /// The rows.
    pub rows: Vec<Encoded>,
}

/// A model with the name that it was given by.
#[derive(Clone, Copy)]
pub struct Named<'a> {
    /// The name.
    pub name: &'a str,
    /// The model.
    pub checkpoint: &'a Checkpoint,
}

/// Measures the way from `original` to `compressed` on each text, and writes it to `target`, if given.
///
/// # Errors
/// [`Refused`] for models that are not of one shape or vocabulary; if a model cannot be read, or the
/// work was stopped, of which nothing is left.
pub fn divergence_stage(
    original: Named<'_>,
    compressed: Named<'_>,
    texts: &[Text],
    swaps: Swaps,
    batch_tokens: usize,
    target: Option<&Path>,
) -> Result<DivergenceFile> {
    let facts = |model: Named<'_>| -> Result<ModelFacts> {
        Ok(ModelFacts {
            name: model.name.to_owned(),
            fingerprint: model_fingerprint(model.checkpoint.dir())?,
        })
    };
    let (one, other) = load_pair(original.checkpoint, compressed.checkpoint)?;
    let pair = ModelPair {
        original: &*one,
        compressed: &*other,
    };
    let mut file = DivergenceFile {
        schema_version: SCHEMA_VERSION,
        lightmoe_version: env!("CARGO_PKG_VERSION").into(),
        original: facts(original)?,
        compressed: facts(compressed)?,
        texts: Vec::new(),
    };
    for text in texts {
        let bar = Progress::new("divergence", 0);
        bar.note(text.name.clone());
        let each = &mut |done, all| bar.of(done, all);
        let found = match divergence(pair, &text.rows, swaps, batch_tokens, each) {
            Err(lightmoe_eval::Error::Interrupted) if stopped() => {
                bail!("interrupted; nothing was written, run the same command again")
            }
            Err(lightmoe_eval::Error::Invalid(message)) => return Err(Refused(message).into()),
            found => found.with_context(|| format!("on `{}`", text.name))?,
        };
        let tokens: Vec<_> = text
            .rows
            .iter()
            .map(|row| (row.answer_start, &row.tokens))
            .collect();
        file.texts.push(TextDivergence {
            name: text.name.clone(),
            fingerprint: crate::fingerprint(&tokens)?,
            divergence: found,
        });
    }
    if let Some(path) = target {
        let text = serde_json::to_string_pretty(&file)? + "\n";
        folder::write_file(path, text.as_bytes())?;
    }
    Ok(file)
}

/// The numbers as tables: all texts, and where they were measured the layers of each.
pub fn tables(file: &DivergenceFile) -> String {
    let mut whole = Section::new([
        "text",
        "tokens",
        "KL",
        "median",
        "99 %",
        "max",
        "same top-1",
        "perplexity",
        "original",
        "ratio",
    ]);
    for text in &file.texts {
        let found = &text.divergence;
        let (kl, perplexity) = (&found.kl_quantiles, &found.perplexity);
        whole.rows.push(vec![
            text.name.clone(),
            found.tokens.to_string(),
            estimate(found.whole.kl, 5),
            format!("{:.5}", kl.median),
            format!("{:.4}", kl.p99),
            format!("{:.4}", kl.max),
            estimate(found.whole.top1_agreement, 4),
            format!("{:.4}", perplexity.compressed),
            format!("{:.4}", perplexity.original),
            estimate(
                Estimate {
                    value: perplexity.ratio,
                    stderr: perplexity.ratio_stderr,
                },
                4,
            ),
        ]);
    }
    let mut out = ascii(&whole, 1)
        + "\n\nKL(original ‖ compressed) in nats a token, ± standard error between windows or answers";
    for text in file
        .texts
        .iter()
        .filter(|t| !t.divergence.layers.is_empty())
    {
        let mut layers = Section::new(["layer", "KL", "same top-1", "NLL increase"]);
        for of_layer in &text.divergence.layers {
            let name = of_layer.layer.to_string();
            layers.rows.push(row(&name, &of_layer.distance));
        }
        layers.rows.push(row("all", &text.divergence.whole));
        out.push_str(&format!(
            "\n\n{}: the original with one layer of the compressed model\n\n{}",
            text.name,
            ascii(&layers, 1)
        ));
    }
    out
}

fn row(name: &str, distance: &Distance) -> Vec<String> {
    vec![
        name.to_owned(),
        estimate(distance.kl, 5),
        estimate(distance.top1_agreement, 4),
        estimate(distance.nll_increase, 5),
    ]
}
