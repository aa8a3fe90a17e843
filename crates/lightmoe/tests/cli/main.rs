//! The program from outside: the built binary on the built-in model, with tiny settings.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod artefacts;
mod benchmarks;
mod compare;
mod damage;
mod divergence;
mod factored;
mod generated;
mod hub;
mod models;
mod paired;
mod pretrain;
mod recipes;
mod refusals;
mod report;
mod resume;
mod sandbox;
mod speak;
mod stages;
mod support;
mod text;
mod updates;
