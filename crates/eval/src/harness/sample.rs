//! What became of a document, in the form of the harness's `samples_<task>.jsonl`.

use super::hash_text;
use super::metrics::Value;
use super::score::{Scored, Scorer};
use crate::Result;
use indexmap::IndexMap;
use lightmoe_data::harness::{Fields, GenerationConfig, Item, Request, python};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value as Json;

/// A document under a chain of filters.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct BenchmarkSample {
    /// Number of the document, from 0.
    pub doc_id: usize,
    /// Its fields.
    pub doc: Fields,
    /// The right answer, as text.
    pub target: String,
    /// What the model was asked: `gen_args_<number>` for each request, from 0.
    pub arguments: IndexMap<String, Arguments>,
    /// What the model gave to each request: one answer or more.
    pub resps: Vec<Vec<Response>>,
    /// What the filters left of each request's answers.
    pub filtered_resps: Vec<Response>,
    /// The chain of filters.
    pub filter: String,
    /// The metrics, each of which is a key, too.
    pub metrics: Vec<String>,
    /// SHA-256 of the document's fields as JSON.
    pub doc_hash: String,
    /// SHA-256 of the first request's prompt.
    pub prompt_hash: String,
    /// SHA-256 of the target.
    pub target_hash: String,
    /// By metric.
    #[serde(flatten)]
    pub values: IndexMap<String, SampleValue>,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Arguments {
    /// The prompt; of the perplexity of a text, the text.
    pub arg_0: String,
    /// What was asked; absent of the perplexity of a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arg_1: Option<Asked>,
}

/// What is asked of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Asked {
    /// The likelihood of a continuation.
    Continuation(String),
    /// An answer.
    Answer(GenerationConfig),
}

/// What the model gave to a request.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Response {
    /// An answer; of a text, its log-likelihood in nats.
    One(String),
    /// Several answers; of a continuation, its log-likelihood in nats and whether it is what the model says
    /// greedily, `True` or `False`.
    Several(Vec<String>),
}

/// What a metric is of a document.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum SampleValue {
    /// A number.
    Number(f64),
    /// Of a perplexity, the log-likelihood in nats, and the words, bytes or tokens that it is of.
    PerUnit(f64, f64),
    /// Of a metric of a corpus, the target or the targets, and the answer, which it counts in.
    Texts(Json, Response),
}

/// The sample of a document; its hashes are added to `hashes`.
pub(super) fn sample(
    scorer: &Scorer<'_>,
    item: &Item,
    scored: Scored,
    filter: &str,
    hashes: &mut String,
) -> Result<BenchmarkSample> {
    let arguments = item.requests.iter().enumerate().map(|(number, request)| {
        let arguments = Arguments {
            arg_0: request.context().to_owned(),
            arg_1: match request {
                Request::Loglikelihood { continuation, .. } => {
                    Some(Asked::Continuation(continuation.clone()))
                }
                Request::Generate { .. } => Some(Asked::Answer(scorer.task.generation())),
                Request::Rolling { .. } => None,
            },
        };
        (format!("gen_args_{number}"), arguments)
    });
    let target = python::text_of(&item.target);
    let prompt = item.requests.first().map_or("", Request::context);
    let of_sample = [
        hash_text(&serde_json::to_string_pretty(&item.doc.fields)?),
        hash_text(prompt),
        hash_text(&target),
    ];
    hashes.extend(of_sample.iter().map(String::as_str));
    let [doc_hash, prompt_hash, target_hash] = of_sample;
    let metrics: Vec<String> = scorer.metrics.iter().map(|m| m.name.clone()).collect();
    let value = |value: Value| match value {
        Value::One(value) => SampleValue::Number(value),
        Value::Of(value, units) => SampleValue::PerUnit(value, units),
        Value::Counts(_) => SampleValue::Texts(item.target.clone(), scored.filtered[0].clone()),
    };
    let values = metrics.iter().cloned();
    let values = values.zip(scored.values.into_iter().map(value)).collect();
    Ok(BenchmarkSample {
        doc_id: scored.number,
        doc: item.doc.fields.clone(),
        target,
        arguments: arguments.collect(),
        resps: scored.responses,
        filtered_resps: scored.filtered,
        filter: filter.to_owned(),
        metrics,
        doc_hash,
        prompt_hash,
        target_hash,
        values,
    })
}
