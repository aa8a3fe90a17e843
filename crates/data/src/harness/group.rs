//! Groups of tasks.

use super::config::{NO_FILTER, one_or_many, version};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Several tasks under one name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// The name.
    pub group: String,
    /// The name in tables.
    #[serde(default)]
    pub group_alias: Option<String>,
    /// Names of tasks, groups or tags, or tasks written out.
    pub task: Vec<Member>,
    /// Scores of the group.
    #[serde(default)]
    pub aggregate_metric_list: Option<Vec<GroupMetric>>,
    /// `version`, and whatever else is to be recorded.
    #[serde(default)]
    pub metadata: Option<Map<String, Value>>,
}

impl GroupConfig {
    /// The name in tables.
    pub fn alias(&self) -> &str {
        self.group_alias.as_deref().unwrap_or(&self.group)
    }

    /// `metadata.version`.
    pub fn version(&self) -> Value {
        version(self.metadata.as_ref())
    }
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Member {
    /// By name.
    Name(String),
    /// Keys of a task, with `include`.
    Task(Map<String, Value>),
}

impl Member {
    /// The name of what is meant.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Name(name) => Some(name),
            Self::Task(keys) => keys.get("task")?.as_str(),
        }
    }
}

/// A score of a group: the mean over its tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupMetric {
    /// The metric's name.
    pub metric: String,
    /// Only `mean`.
    #[serde(default)]
    pub aggregation: Option<String>,
    /// Whether a task counts by its documents.
    #[serde(default)]
    pub weight_by_size: bool,
    /// Names of filters.
    #[serde(default = "no_filter", deserialize_with = "one_or_many")]
    pub filter_list: Vec<String>,
}

fn no_filter() -> Vec<String> {
    vec![NO_FILTER.into()]
}
