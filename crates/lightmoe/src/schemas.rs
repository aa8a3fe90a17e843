//! JSON Schemas of the files that the program writes, made from the types that write them;
//! `docs/schemas` holds them.

use crate::compare::Comparison;
use crate::contrast::Contrast;
use crate::divergence::DivergenceFile;
use crate::paired::PairedFile;
use crate::preflight::Refused;
use crate::recipe::Recipe;
use crate::results::Results;
use crate::run::State;
use crate::settings::Settings;
use anyhow::Result;
use lightmoe_compress::plan::Plan;
use lightmoe_eval::Sample;
use lightmoe_eval::harness::{BenchmarkResults, BenchmarkSample};
use lightmoe_models::BankLayout;
use lightmoe_train::Point;
use schemars::generate::{Contract, SchemaSettings};
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

/// A schema.
pub struct Artefact {
    /// Its name: `docs/schemas/<name>.schema.json`.
    pub name: &'static str,
    /// The file that it is of.
    file: &'static str,
    make: fn() -> Schema,
}

/// All of them, in the order of `docs/artefacts.md`.
pub const ALL: [Artefact; 13] = [
    of::<Plan>("plan", "plan.json"),
    of::<State>("run", "run.json of a run"),
    of::<Results>("results", "results.json of a run"),
    of::<DivergenceFile>("divergence", "divergence.json"),
    of::<Contrast>("contrast", "contrast.json"),
    of::<Comparison>("compare", "compare.json of a comparison"),
    of::<PairedFile>("compare-results", "what `compare-results --json` writes"),
    of::<Point>("loss", "a line of logs/loss.jsonl"),
    of::<Sample>("samples", "a line of logs/samples_<task>_<stage>.jsonl"),
    of::<BenchmarkResults>(
        "benchmarks",
        "results.json and results.partial.json of an evaluation on benchmarks",
    ),
    of::<BenchmarkSample>("benchmark-samples", "a line of samples_<task>.jsonl"),
    of::<BankLayout>("config", "the key `lightmoe` of a checkpoint's config.json"),
    Artefact {
        name: "recipe",
        file: "a recipe; the recipe.toml of a run has every key that has a value",
        make: recipe,
    },
];

const fn of<T: JsonSchema>(name: &'static str, file: &'static str) -> Artefact {
    Artefact {
        name,
        file,
        make: schema::<T>,
    }
}

impl Artefact {
    /// The schema (draft 2020-12). It allows no keys but those that it names.
    pub fn schema(&self) -> Value {
        let mut schema = (self.make)().to_value();
        if let Some(whole) = schema.as_object_mut() {
            whole.insert("title".into(), self.file.into());
            close(whole);
            let definitions = whole.get_mut("$defs").and_then(Value::as_object_mut);
            for definition in definitions.into_iter().flat_map(Map::values_mut) {
                definition.as_object_mut().map(close);
            }
        }
        schema
    }
}

/// The names, one a line.
pub fn names() -> String {
    ALL.map(|artefact| artefact.name).join("\n")
}

/// The text of the schema by that name.
///
/// # Errors
/// [`Refused`] if none has it.
pub fn print(name: &str) -> Result<String> {
    let found = ALL.iter().find(|artefact| artefact.name == name);
    let artefact = found.ok_or_else(|| {
        let names = names().replace('\n', ", ");
        Refused(format!("no schema `{name}`; use one of {names}"))
    })?;
    Ok(serde_json::to_string_pretty(&artefact.schema())?)
}

fn schema<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12()
        .with(|settings| settings.contract = Contract::Serialize)
        .with_transform(RecursiveTransform(unwrap_lines))
        .into_generator()
        .into_root_schema_for::<T>()
}

/// The lines of a description become one; they end where those of the code do.
fn unwrap_lines(schema: &mut Schema) {
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = text.replace('\n', " ");
    }
}

/// Types of the resolved recipe with what the settings say of the keys, none of which a recipe needs.
fn recipe() -> Schema {
    let (mut recipe, settings) = (schema::<Recipe>(), schema::<Settings>());
    recipe.remove("required");
    let described = settings.get("properties").and_then(Value::as_object);
    let keys = recipe
        .get_mut("properties")
        .and_then(Value::as_object_mut)
        .into_iter()
        .flatten();
    for (key, schema) in keys {
        let text = described.and_then(|all| all.get(key)?.get("description"));
        if let (Some(schema), Some(text)) = (schema.as_object_mut(), text) {
            schema.insert("description".into(), text.clone());
        }
    }
    recipe
}

/// Refuses further keys where the schema names some, in itself or in one of several forms.
fn close(schema: &mut Map<String, Value>) {
    let has_keys = |schema: &Value| schema.get("properties").is_some();
    let forms = schema.get("oneOf").and_then(Value::as_array);
    let is_object =
        schema.contains_key("properties") || forms.is_some_and(|forms| forms.iter().any(has_keys));
    if is_object && !schema.contains_key("additionalProperties") {
        schema.insert("unevaluatedProperties".into(), json!(false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every key of an object, in itself, in forms and in definitions, with where it stands.
    fn keys<'a>(place: &str, schema: &'a Value, found: &mut Vec<(String, &'a Value)>) {
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            for (key, value) in properties {
                found.push((format!("{place}.{key}"), value));
            }
        }
        for (key, value) in schema.as_object().into_iter().flatten() {
            match value {
                Value::Object(_) => keys(&format!("{place}/{key}"), value, found),
                Value::Array(list) => list
                    .iter()
                    .for_each(|value| keys(&format!("{place}/{key}"), value, found)),
                _ => {}
            }
        }
    }

    #[test]
    fn every_key_says_what_it_is_in_words() {
        for artefact in &ALL {
            let (schema, mut found) = (artefact.schema(), Vec::new());
            keys(artefact.name, &schema, &mut found);
            assert!(found.len() > 2, "{}", artefact.name);
            for (place, key) in found {
                // What names a form is described with the form.
                if key.get("const").is_some_and(Value::is_string) {
                    continue;
                }
                let text = key.get("description").and_then(Value::as_str);
                let text = text.unwrap_or_else(|| panic!("{place} has no description"));
                // Links and options are Rust's.
                assert!(
                    !text.contains("[`") && !text.contains("`None`"),
                    "{place}: {text}"
                );
            }
        }
    }
}
