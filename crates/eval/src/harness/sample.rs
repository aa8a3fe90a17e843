//! What became of a document, in the form of the harness's `samples_<task>.jsonl`.

use super::hash_text;
use super::metrics::Value;
use super::score::{Scored, Scorer};
use crate::Result;
use lightmoe_data::harness::{Item, Request, python};
use serde_json::{Map, Value as Json, json};

/// The sample of a document; its hashes are added to `hashes`.
pub(super) fn sample(
    scorer: &Scorer<'_>,
    item: &Item,
    scored: Scored,
    filter: &str,
    hashes: &mut String,
) -> Result<Map<String, Json>> {
    let mut arguments = Map::new();
    for (number, request) in item.requests.iter().enumerate() {
        let second = match request {
            Request::Loglikelihood { continuation, .. } => Some(json!(continuation)),
            Request::Generate { .. } => Some(json!(scorer.task.generation())),
            Request::Rolling { .. } => None,
        };
        let mut of_request = Map::from_iter([("arg_0".to_owned(), json!(request.context()))]);
        of_request.extend(second.map(|second| ("arg_1".to_owned(), second)));
        arguments.insert(format!("gen_args_{number}"), of_request.into());
    }
    let target = python::text_of(&item.target);
    let prompt = item.requests.first().map_or("", Request::context);
    let of_sample = [
        hash_text(&serde_json::to_string_pretty(&item.doc.fields)?),
        hash_text(prompt),
        hash_text(&target),
    ];
    hashes.extend(of_sample.iter().map(String::as_str));
    let [doc_hash, prompt_hash, target_hash] = of_sample;
    let names: Vec<&str> = scorer
        .metrics
        .iter()
        .map(|metric| metric.name.as_str())
        .collect();
    let fields = [
        ("doc_id", json!(scored.number)),
        ("doc", json!(item.doc.fields)),
        ("target", json!(target)),
        ("arguments", arguments.into()),
        ("resps", scored.responses.into()),
        ("filtered_resps", scored.filtered.clone().into()),
        ("filter", json!(filter)),
        ("metrics", json!(names)),
        ("doc_hash", json!(doc_hash)),
        ("prompt_hash", json!(prompt_hash)),
        ("target_hash", json!(target_hash)),
    ];
    let values = names.iter().zip(&scored.values).map(|(name, value)| {
        (
            *name,
            match value {
                Value::One(value) => json!(value),
                Value::Of(value, units) => json!([value, units]),
                Value::Counts(_) => json!([item.target, scored.filtered[0]]),
            },
        )
    });
    Ok(fields
        .into_iter()
        .chain(values)
        .map(|(key, value)| (key.to_owned(), value))
        .collect())
}
