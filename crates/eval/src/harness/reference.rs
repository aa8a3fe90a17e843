//! The answers that benchmarks hold for right, as rows of tokens: what a model is to predict, whatever
//! it would answer.

use super::encode::{Encoder, check_windows};
use super::work::of_document;
use super::{HarnessOptions, TaskPrompts};
use crate::Result;
use lightmoe_data::Encoded;
use lightmoe_data::harness::{Item, Request, TaskConfig, python};
use lightmoe_models::ModelTokenizer;
use serde_json::Value as Json;

/// The right answer to each document of a task behind its prompt, the first of several; of a text
/// whose likelihood is asked, its windows. At most `max_length` tokens are read at once.
///
/// # Errors
/// [`crate::Error::Document`] for an answer that has no tokens or does not fit.
pub fn reference_rows(
    task: &TaskPrompts,
    tokenizer: &ModelTokenizer,
    max_length: usize,
    options: &HarnessOptions,
) -> Result<Vec<Encoded>> {
    let encoder = Encoder {
        tokenizer,
        begin: options.begin,
        max_length,
    };
    let stride = options.stride.or(task.task.stride);
    check_windows(max_length, stride)?;
    let mut rows = Vec::new();
    for item in &task.prompts.items {
        // Of several requests, one a choice, the right one's.
        let number = item.right.first().copied().unwrap_or(0);
        let request = item.requests.get(number).or(item.requests.first());
        let of_item = match request {
            None => Ok(Vec::new()),
            Some(Request::Rolling { text }) => encoder.windows(text, stride),
            Some(Request::Loglikelihood {
                context,
                continuation,
            }) => encoder.pair(context, continuation).map(|row| vec![row]),
            Some(Request::Generate { context }) => {
                let answer = answer(&task.task, item);
                encoder.pair(context, &answer).map(|row| vec![row])
            }
        };
        rows.extend(of_item.map_err(|e| of_document(item, e))?);
    }
    Ok(rows)
}

/// The answer as it stands behind a prompt's examples.
fn answer(task: &TaskConfig, item: &Item) -> String {
    let text = match (&item.target, item.right.first()) {
        (_, Some(&right)) => item.choices[right].clone(),
        (Json::Array(list), None) => list.first().map(python::text_of).unwrap_or_default(),
        (other, None) => python::text_of(other),
    };
    format!("{}{text}", task.target_delimiter())
}
