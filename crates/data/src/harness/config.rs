//! The files that describe tasks and groups: YAML in the vocabulary of lm-evaluation-harness.

use super::data_files::DataFiles;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// One task. What a file leaves out is absent, so that a file can be laid over one that it includes;
/// the methods name the defaults, which are the harness's.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = need_no_key)]
pub struct TaskConfig {
    /// A file beside this one whose keys hold where this one has none.
    pub include: Option<String>,
    /// The name.
    pub task: Option<String>,
    /// The name in tables.
    pub task_alias: Option<String>,
    /// Names under which several tasks can be asked for together.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "one_or_many"
    )]
    pub tag: Vec<String>,
    /// The data set's name on the Hub, in whose cache it is looked for.
    pub dataset_path: Option<String>,
    /// Its part.
    pub dataset_name: Option<String>,
    /// Where the rows of each split lie in the folder of the data; not in the harness. Without it, the
    /// files are those of the data set's repository.
    pub data_files: Option<DataFiles>,
    /// Split for few-shot examples, if `fewshot_split` names none.
    pub training_split: Option<String>,
    /// Split to score on, if there is no `test_split`.
    pub validation_split: Option<String>,
    /// Split to score on.
    pub test_split: Option<String>,
    /// Split for few-shot examples.
    pub fewshot_split: Option<String>,
    /// Fields of a document, each an expression over the row that was read; without it, a document
    /// is the row. (In the harness this is a Python function.)
    pub process_docs: Option<Map<String, Value>>,
    /// The prompt: a field's name or a template. With choices, a number says that the choices are
    /// prompts and this is the right one.
    pub doc_to_text: Option<String>,
    /// The answer: a field's name or a template; with choices, the number of the right one.
    pub doc_to_target: Option<String>,
    /// The choices: a list, a field's name, or a template that is one expression giving a list.
    pub doc_to_choice: Option<Choices>,
    /// The text whose words and bytes the perplexities are per, if not the target; not in the harness.
    pub doc_to_count: Option<String>,
    /// What is asked of the model.
    pub output_type: Option<OutputType>,
    /// Text before the few-shot examples, a template.
    pub description: Option<String>,
    /// Between prompt and answer.
    pub target_delimiter: Option<String>,
    /// Behind each few-shot example.
    pub fewshot_delimiter: Option<String>,
    /// How few-shot examples are chosen.
    pub fewshot_config: Option<FewshotConfig>,
    /// Few-shot examples in a prompt; a 0 here cannot be overruled.
    pub num_fewshot: Option<usize>,
    /// How answers are generated.
    pub generation_kwargs: Option<GenerationConfig>,
    /// Answers to each request; more than 1 for sampled ones only.
    pub repeats: Option<usize>,
    /// What is taken from a generated answer; each entry scores for itself.
    pub filter_list: Option<Vec<FilterChain>>,
    /// What is computed.
    pub metric_list: Option<Vec<MetricConfig>>,
    /// Tokens from one scored window of text to the next; absent, a whole window. Not in the harness.
    pub stride: Option<usize>,
    /// Known and without effect: what runs programs of the model is a metric.
    pub unsafe_code: Option<bool>,
    /// Known and without effect: nothing is compared with training data.
    pub should_decontaminate: Option<bool>,
    /// Known and without effect.
    pub doc_to_decontamination_query: Option<String>,
    /// `version`, and whatever else is to be recorded.
    pub metadata: Option<Map<String, Value>>,
}

impl TaskConfig {
    /// The name; empty in a file that is only included.
    pub fn name(&self) -> &str {
        self.task.as_deref().unwrap_or_default()
    }

    /// The name in tables.
    pub fn alias(&self) -> &str {
        self.task_alias.as_deref().unwrap_or(self.name())
    }

    /// What is asked of the model.
    pub fn output_type(&self) -> OutputType {
        self.output_type.unwrap_or(OutputType::GenerateUntil)
    }

    /// Between prompt and answer.
    pub fn target_delimiter(&self) -> &str {
        self.target_delimiter.as_deref().unwrap_or(" ")
    }

    /// Behind each few-shot example.
    pub fn fewshot_delimiter(&self) -> &str {
        self.fewshot_delimiter.as_deref().unwrap_or("\n\n")
    }

    /// The split to score on.
    pub fn eval_split(&self) -> Option<&str> {
        self.test_split
            .as_deref()
            .or(self.validation_split.as_deref())
    }

    /// The split for few-shot examples.
    pub fn examples_split(&self) -> Option<&str> {
        let given = self
            .fewshot_split
            .as_deref()
            .or(self.training_split.as_deref());
        given
            .or(self.validation_split.as_deref())
            .or(self.test_split.as_deref())
    }

    /// How answers are generated, `until` filled in.
    pub fn generation(&self) -> GenerationConfig {
        let mut generation = self.generation_kwargs.clone().unwrap_or_default();
        if generation.until.is_empty() {
            generation.until = vec![self.fewshot_delimiter().to_owned()];
        }
        generation
    }

    /// Answers to each request.
    pub fn repeats(&self) -> usize {
        self.repeats.unwrap_or(1)
    }

    /// Whether a metric runs programs that the model writes.
    pub fn runs_programs(&self) -> bool {
        let mut metrics = self.metric_list.iter().flatten();
        metrics.any(|metric| metric.metric.starts_with("pass_at_"))
    }

    /// Names of the data set on the Hub, the one that it has now first.
    pub fn repositories(&self) -> Vec<&str> {
        let moved = self
            .data_files
            .as_ref()
            .and_then(|files| files.repository.as_deref());
        moved
            .into_iter()
            .chain(self.dataset_path.as_deref())
            .collect()
    }

    /// `metadata.version`.
    pub fn version(&self) -> Value {
        version(self.metadata.as_ref())
    }

    /// The keys that are there, as they would stand in a file.
    ///
    /// # Errors
    /// None in practice: every key is representable.
    pub fn to_map(&self) -> serde_json::Result<Map<String, Value>> {
        let mut value = serde_json::to_value(self)?;
        remove_nulls(&mut value);
        match value {
            Value::Object(map) => Ok(map),
            _ => Ok(Map::new()),
        }
    }
}

pub(super) fn version(metadata: Option<&Map<String, Value>>) -> Value {
    metadata
        .and_then(|m| m.get("version"))
        .cloned()
        .unwrap_or(Value::Null)
}

/// In a schema: what is absent is not written.
fn need_no_key(schema: &mut Schema) {
    schema.remove("required");
}

/// What is absent is not written.
fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(remove_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

/// What is asked of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputType {
    /// The likelihood of one answer.
    Loglikelihood,
    /// The likelihood of a whole text, window by window.
    LoglikelihoodRolling,
    /// The likelihood of each choice.
    MultipleChoice,
    /// An answer, up to a text that ends it.
    GenerateUntil,
}

/// The choices of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Choices {
    /// The same for every document.
    Fixed(Vec<String>),
    /// A field's name, or one expression.
    Of(String),
}

/// How few-shot examples are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FewshotConfig {
    /// The rule.
    #[serde(default)]
    pub sampler: Sampler,
}

/// The rule by which few-shot examples are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// At random, others for each document.
    #[default]
    Default,
    /// The first ones.
    FirstN,
}

/// How answers are generated: greedily, or sampled.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = need_no_key)]
pub struct GenerationConfig {
    /// Texts that end an answer, and are no part of it.
    #[serde(default, deserialize_with = "one_or_many")]
    pub until: Vec<String>,
    /// Whether tokens are drawn by their probabilities.
    #[serde(default)]
    pub do_sample: Option<bool>,
    /// What logits are divided by before tokens are drawn; 0 is greedy.
    #[serde(default)]
    pub temperature: Option<f64>,
    /// Tokens are drawn from the fewest that have this probability together.
    #[serde(default)]
    pub top_p: Option<f64>,
    /// Most tokens of an answer.
    #[serde(default)]
    pub max_gen_toks: Option<usize>,
}

impl GenerationConfig {
    /// Temperature and `top_p`, if tokens are drawn.
    pub fn sampling(&self) -> Option<(f64, Option<f64>)> {
        let temperature = self.temperature.unwrap_or(1.0);
        let is_drawn = self.do_sample == Some(true) && temperature > 0.0;
        is_drawn.then_some((temperature, self.top_p))
    }
}

/// A chain of filters with a name, which results carry behind the metric's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FilterChain {
    /// The name.
    pub name: String,
    /// One after the other.
    pub filter: Vec<FilterStep>,
}

/// One filter on generated answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "function", rename_all = "snake_case", deny_unknown_fields)]
pub enum FilterStep {
    /// A match of the pattern, or of its first group that took part.
    Regex {
        /// In Python's syntax.
        #[serde(default = "default_pattern")]
        regex_pattern: String,
        /// Which of all matches; negative counts from the last.
        #[serde(default)]
        group_select: i64,
        /// Where nothing matches.
        #[serde(default = "default_fallback")]
        fallback: String,
    },
    /// The first of the answers to a request; metrics that need one take it anyway.
    TakeFirst,
    /// Without white space in front.
    RemoveWhitespace,
    /// What the last `\boxed` holds; not in the harness.
    LastBoxed {
        /// Where there is none.
        #[serde(default = "default_fallback")]
        fallback: String,
    },
    /// What stands between the first and the last `$`, if there are two; in the harness a part of
    /// `hendrycks_math`.
    InsideDollars,
    /// A text over the document's fields and `response`. (In the harness this is a Python function.)
    Template {
        /// The template.
        template: String,
    },
    /// In small letters.
    Lowercase,
    /// In capital letters.
    Uppercase,
    /// What stands for the answer.
    Map {
        /// By answer.
        #[serde(default)]
        mapping_dict: Map<String, Value>,
        /// For answers that are not there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        default_value: Option<String>,
    },
}

fn default_pattern() -> String {
    r"#### (\-?[0-9\.\,]+)".into()
}

fn default_fallback() -> String {
    "[invalid]".into()
}

/// One metric.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricConfig {
    /// Its name.
    pub metric: String,
    /// How values become one; the metric's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<String>,
    /// Overrules what is known of the metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub higher_is_better: Option<bool>,
    /// `exact_match`, `bleu`, `chrf`, `chrf++`: in small letters.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_case: bool,
    /// `exact_match`: without ASCII punctuation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_punctuation: bool,
    /// `exact_match`: without digits.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_numbers: bool,
    /// `exact_match`: what matches these patterns is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regexes_to_ignore: Vec<String>,
    /// `exact_match`: answers in LaTeX are the same that mean the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub math_equivalence: bool,
    /// `rouge1`, `rouge2`, `rougeL`, `rougeLsum`: words are reduced to stems.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub use_stemmer: bool,
    /// `bleu`: how texts become words, `13a` or `zh`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenize: Option<String>,
    /// `pass_at_k`: programs of which one has to pass; one score each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub k: Vec<usize>,
}

/// The name that results carry where a task has no filters.
pub const NO_FILTER: &str = "none";

pub(super) fn one_or_many<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}
