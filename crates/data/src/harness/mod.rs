//! Benchmarks as lm-evaluation-harness describes them: tasks as YAML files in its vocabulary, their
//! data read from a folder in each benchmark's own form, or as the Hub's repositories have them, and
//! the requests that follow from both.
//!
//! The texts of the prompts, the versions and the way few-shot examples are drawn are those of
//! lm-evaluation-harness 0.4.9; `fixtures/harness` holds them against it.

mod builtin;
mod catalogue;
mod check;
mod config;
mod data_files;
mod docs;
mod fewshot;
mod find;
mod group;
pub mod latex;
mod parquet;
mod prompt;
pub mod python;
pub mod repository;
mod rows;
mod template;
mod texts;

pub use catalogue::{Benchmark, Catalogue, Check};
pub use config::{
    Choices, FilterChain, FilterStep, GenerationConfig, MetricConfig, NO_FILTER, OutputType,
    TaskConfig,
};
pub use data_files::{DataFiles, DataFormat};
pub use docs::Doc;
pub use group::{GroupConfig, GroupMetric};
pub use parquet::catches_panics;
pub use prompt::{Chat, Item, PromptOptions, Prompts, Request, Turns, build_prompts};
pub use template::{Engine, Fields};
