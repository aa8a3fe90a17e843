//! `results.json` in the layout of lm-evaluation-harness.

use super::{Outcome, TaskOutcome, TaskPrompts, hash_text, metrics::metrics};
use crate::Result;
use lightmoe_data::harness::{Benchmark, GroupConfig, GroupMetric, TaskConfig};
use lightmoe_models::ModelTokenizer;
use serde_json::{Map, Value as Json, json};

/// What is recorded of a run besides its scores.
pub struct RunFacts<'a> {
    /// The model, as given.
    pub model: &'a str,
    /// Options of the run, for `config`.
    pub config: Map<String, Json>,
    /// Text before the tasks' descriptions.
    pub system_instruction: Option<&'a str>,
    /// The chat template, if it was used.
    pub chat_template: Option<&'a str>,
    /// Whether few-shot examples were turns of their own.
    pub fewshot_as_multiturn: bool,
    /// Seconds since the epoch when the run began.
    pub date: f64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Version of the program.
    pub version: &'a str,
}

/// The whole of `results.json`. Of an interrupted run it holds what was done, and says so under
/// `partial`.
///
/// # Errors
/// None in practice: every metric was known when the tasks ran.
pub fn results(
    selected: &[Benchmark],
    tasks: &[TaskPrompts],
    outcome: &Outcome,
    tokenizer: &ModelTokenizer,
    facts: RunFacts<'_>,
) -> Result<Map<String, Json>> {
    let mut tables = Tables {
        outcome,
        results: Map::new(),
        groups: Map::new(),
        subtasks: Map::new(),
        versions: Map::new(),
    };
    tables.add(selected, 0);
    let by_task = |value: &dyn Fn(&TaskPrompts) -> Result<Json>| -> Result<Map<String, Json>> {
        let pairs = tasks
            .iter()
            .map(|t| Ok((t.task.name().to_owned(), value(t)?)));
        let mut map: Map<String, Json> = pairs.collect::<Result<_>>()?;
        map.sort_keys();
        Ok(map)
    };
    let direction = |task: &TaskConfig| -> Result<Map<String, Json>> {
        let metrics = metrics(task)?.into_iter();
        Ok(metrics
            .map(|metric| (metric.asked, metric.higher_is_better.into()))
            .collect())
    };
    let mut directions = by_task(&|t| Ok(direction(&t.task)?.into()))?;
    for benchmark in selected {
        add_directions(benchmark, &mut directions, &direction)?;
    }
    let configs = by_task(&|t| config(t).map(Json::from))?;
    let shots = by_task(&|t| Ok(t.prompts.num_fewshot.into()))?;
    let counts = by_task(&|t| {
        Ok(json!({"original": t.prompts.documents, "effective": t.prompts.items.len()}))
    })?;
    let hashes: Map<String, Json> = outcome
        .tasks
        .iter()
        .map(|task| (task.name.clone(), json!(task.hash)))
        .collect();
    let token = |id: Option<u32>| -> Result<Json> {
        Ok(match id {
            Some(id) => json!([tokenizer.decode_all(&[id])?, id.to_string()]),
            None => Json::Null,
        })
    };
    let mut all = Map::new();
    let mut put = |key: &str, value: Json| all.insert(key.to_owned(), value);
    put("results", tables.results.into());
    if !tables.groups.is_empty() {
        put("groups", tables.groups.into());
    }
    put("group_subtasks", tables.subtasks.into());
    put("configs", configs.into());
    tables.versions.sort_keys();
    put("versions", tables.versions.into());
    put("n-shot", shots.into());
    put("higher_is_better", directions.into());
    put("n-samples", counts.into());
    put("config", facts.config.into());
    // The harness puts the state of its user's repository here, which says nothing of the program.
    put("git_hash", Json::Null);
    put("date", facts.date.into());
    put("lightmoe_version", facts.version.into());
    put("tokenizer_eos_token", token(Some(tokenizer.eos))?);
    put("tokenizer_bos_token", token(tokenizer.bos)?);
    put("eot_token_id", tokenizer.eos.into());
    put("max_length", outcome.max_length.into());
    let signatures = signatures(outcome);
    if !signatures.is_empty() {
        put("signatures", signatures.into());
    }
    put("task_hashes", hashes.into());
    put("model_source", "lightmoe".into());
    put("model_name", facts.model.into());
    put("model_name_sanitized", sanitized(facts.model).into());
    put("system_instruction", facts.system_instruction.into());
    put(
        "system_instruction_sha",
        facts.system_instruction.map(hash_text).into(),
    );
    put("fewshot_as_multiturn", facts.fewshot_as_multiturn.into());
    put("chat_template", facts.chat_template.into());
    put(
        "chat_template_sha",
        facts.chat_template.map(hash_text).into(),
    );
    put(
        "total_evaluation_time_seconds",
        facts.seconds.to_string().into(),
    );
    if !outcome.is_whole {
        let done: usize = outcome.tasks.iter().map(|task| task.documents).sum();
        let documents: usize = tasks.iter().map(|task| task.prompts.items.len()).sum();
        put(
            "partial",
            json!({"documents_done": done, "documents": documents}),
        );
    }
    Ok(all)
}

/// By task and metric, what decides the scores of a corpus besides the texts.
fn signatures(outcome: &Outcome) -> Map<String, Json> {
    let of_task = |task: &TaskOutcome| {
        let signed = task
            .scores
            .iter()
            .filter_map(|score| Some((score.metric.clone(), score.signature.clone()?.into())));
        let signed: Map<String, Json> = signed.collect();
        (!signed.is_empty()).then(|| (task.name.clone(), signed.into()))
    };
    outcome.tasks.iter().filter_map(of_task).collect()
}

/// Characters that names of files may not hold become `__`, a run of them one.
fn sanitized(name: &str) -> String {
    let is_bad = |c: char| {
        matches!(
            c,
            '"' | '<' | '>' | ':' | '/' | '|' | '\\' | '?' | '*' | '[' | ']'
        )
    };
    let mut out = String::new();
    for c in name.chars() {
        match is_bad(c) {
            true if out.ends_with("__") => {}
            true => out.push_str("__"),
            false => out.push(c),
        }
    }
    out
}

/// The keys of a task with what was filled in.
fn config(task: &TaskPrompts) -> Result<Map<String, Json>> {
    let mut keys = task.task.to_map()?;
    let mut fill = |key: &str, value: Json| {
        keys.entry(key).or_insert(value);
    };
    fill("description", json!(""));
    fill("target_delimiter", task.task.target_delimiter().into());
    fill("fewshot_delimiter", task.task.fewshot_delimiter().into());
    fill("output_type", json!(task.task.output_type()));
    fill("repeats", json!(1));
    fill("should_decontaminate", json!(false));
    keys.insert("num_fewshot".into(), task.prompts.num_fewshot.into());
    Ok(keys)
}

type Direction<'a> = dyn Fn(&TaskConfig) -> Result<Map<String, Json>> + 'a;

/// Of each group, whether more is better, of all metrics of its tasks; unknown where they disagree.
fn add_directions(
    benchmark: &Benchmark,
    all: &mut Map<String, Json>,
    direction: &Direction<'_>,
) -> Result<()> {
    if let Benchmark::Group(group, members) = benchmark {
        let mut of_group: Map<String, Json> = Map::new();
        for task in benchmark.tasks() {
            for (metric, higher) in direction(task)? {
                let agreed = of_group.entry(metric).or_insert(higher.clone());
                if *agreed != higher {
                    *agreed = Json::Null;
                }
            }
        }
        all.insert(group.group.clone(), of_group.into());
        for member in members {
            add_directions(member, all, direction)?;
        }
        all.sort_keys();
    }
    Ok(())
}

/// The parts of the results that groups have a place in.
struct Tables<'a> {
    outcome: &'a Outcome,
    results: Map<String, Json>,
    groups: Map<String, Json>,
    subtasks: Map<String, Json>,
    versions: Map<String, Json>,
}

impl Tables<'_> {
    /// Adds benchmarks by name, each group before what is in it, indented by depth in tables.
    fn add(&mut self, benchmarks: &[Benchmark], depth: usize) {
        let mut sorted: Vec<&Benchmark> = benchmarks.iter().collect();
        sorted.sort_by_key(|benchmark| benchmark.name());
        for benchmark in sorted {
            let mark = match depth {
                0 => String::new(),
                _ => format!("{}- ", " ".repeat(depth)),
            };
            let name = benchmark.name().to_owned();
            match benchmark {
                Benchmark::Task(task) => {
                    let alias = format!("{mark}{}", task.alias());
                    let mut row = Map::from_iter([("alias".to_owned(), alias.into())]);
                    for score in self
                        .of(&name)
                        .map(|t| t.scores.as_slice())
                        .unwrap_or_default()
                    {
                        row.extend(entries(
                            &score.metric,
                            &score.filter,
                            score.value,
                            score.stderr,
                        ));
                    }
                    self.results.insert(name.clone(), row.into());
                    self.versions.insert(name.clone(), task.version());
                    if depth == 0 {
                        self.subtasks.insert(name, json!([]));
                    }
                }
                Benchmark::Group(group, members) => {
                    let row = self.group(group, benchmark, format!("{mark}{}", group.alias()));
                    if group.aggregate_metric_list.is_some() {
                        self.groups.insert(name.clone(), row.clone().into());
                        self.versions.insert(name.clone(), group.version());
                    }
                    self.results.insert(name.clone(), row.into());
                    let members_names: Vec<&str> = members.iter().map(Benchmark::name).collect();
                    self.subtasks.insert(name, json!(members_names));
                    self.add(members, depth + 1);
                }
            }
        }
    }

    fn of(&self, task: &str) -> Option<&TaskOutcome> {
        self.outcome
            .tasks
            .iter()
            .find(|outcome| outcome.name == task && outcome.documents > 0)
    }

    fn group(
        &self,
        group: &GroupConfig,
        benchmark: &Benchmark,
        alias: String,
    ) -> Map<String, Json> {
        let mut row = Map::from_iter([("alias".to_owned(), Json::from(alias))]);
        let Some(list) = &group.aggregate_metric_list else {
            row.insert(" ".into(), " ".into());
            return row;
        };
        let tasks = benchmark.tasks();
        let tasks: Vec<&TaskOutcome> = tasks.iter().filter_map(|t| self.of(t.name())).collect();
        for metric in list {
            for filter in &metric.filter_list {
                if let Some((value, stderr)) = pooled(metric, filter, &tasks) {
                    row.extend(entries(&metric.metric, filter, value, stderr));
                }
            }
        }
        row
    }
}

fn entries(metric: &str, filter: &str, value: f64, stderr: Option<f64>) -> [(String, Json); 2] {
    [
        (format!("{metric},{filter}"), value.into()),
        (
            format!("{metric}_stderr,{filter}"),
            stderr.map_or("N/A".into(), Json::from),
        ),
    ]
}

/// The mean over tasks, by documents where the group says so, and the standard error of all documents
/// together (pooled variance).
fn pooled(
    metric: &GroupMetric,
    filter: &str,
    tasks: &[&TaskOutcome],
) -> Option<(f64, Option<f64>)> {
    let of_metric = tasks.iter().filter_map(|task| {
        let mut scores = task.scores.iter();
        let score = scores.find(|s| s.metric == metric.metric && s.filter == filter)?;
        Some((score, task.documents as f64))
    });
    let of_metric: Vec<_> = of_metric.collect();
    let weight = |size: f64| if metric.weight_by_size { size } else { 1.0 };
    let weights: f64 = of_metric.iter().map(|(_, size)| weight(*size)).sum();
    let sum: f64 = of_metric
        .iter()
        .map(|(score, size)| score.value * weight(*size))
        .sum();
    let sizes: f64 = of_metric.iter().map(|(_, size)| size).sum();
    let variances = of_metric.iter().map(|(score, size)| {
        score
            .stderr
            .map(|stderr| (size - 1.0) * stderr.powi(2) * size)
    });
    let variance: Option<f64> = variances.sum();
    let freedom = sizes - of_metric.len() as f64;
    let stderr = variance.map(|variance| (variance / freedom / sizes).sqrt());
    (!of_metric.is_empty()).then(|| (sum / weights, stderr))
}
