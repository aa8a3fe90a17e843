//! Text and records in, token sequences out.
//!
//! Four sources of data: records of the user's own ([`records`]), plain text ([`text`]), benchmarks ([`harness`]), and five built-in
//! [`Task`]s on which a small model is pre-trained ([`pretrain`]) and then adapted,
//! with a [`tokenizer`] of their own. Both become [`Example`]s, [`encode`] makes
//! token sequences of them, and [`Sampler`] and [`PackedStream`] make batches.
//!
//! Invariant: everything generated is a function of a seed. Invariant: the splits of
//! a task are disjoint by construction: the hash of an item's canonical content names
//! its split, and pre-training reads the train split only.

mod batch;
pub mod code;
mod commonsense;
mod error;
mod example;
mod filler;
pub mod harness;
mod intent;
mod math;
pub mod overlap;
pub mod pretrain;
pub mod records;
mod rng;
mod task;
pub mod text;
pub mod tokenizer;
mod translation;
mod words;

pub use batch::{Batch, PackedStream, Sampler};
pub use error::{Error, MissingData, Result};
pub use example::{Encoded, Example, continuation, encode, render};
pub use records::read_text;
pub use task::{Metric, Split, Task};
