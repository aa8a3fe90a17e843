//! The program from outside: the built binary on the built-in model, with tiny settings.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod artefacts;
mod benchmarks;
mod cache;
mod compare;
mod damage;
mod divergence;
mod factored;
mod generated;
mod hub;
mod models;
mod paired;
mod parquet;
mod pretrain;
mod recipes;
mod refusals;
mod report;
mod resume;
mod sandbox;
mod schemas;
mod speak;
mod stages;
mod support;
mod text;
mod updates;
