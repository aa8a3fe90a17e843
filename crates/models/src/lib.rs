//! Mixture-of-Experts models in the layout of Hugging Face: configuration, checkpoint folders, the
//! decoder and the expert bank.
//!
//! Symbols: `B` sequences, `T` tokens, `V` vocabulary, `H` hidden size, `E` experts, `K` top-k,
//! `F` expert intermediate size, `R` adapter rank, `D` head size.

mod attention;
mod bank;
mod bank_io;
mod checkpoint;
mod decoder;
mod error;
mod generate;
mod layer;
mod layout;
mod shared;
mod tokenizer;
mod writer;

pub mod config;
pub mod families;
pub mod folder;
pub mod hub;
pub mod names;
pub mod parameters;
pub mod random;

pub use attention::LayerCache;
pub use bank::{Adapters, Bank, Projections};
pub use bank_io::load_experts;
pub use candle_core::DType;
pub use checkpoint::Checkpoint;
pub use config::{Family, ModelConfig};
pub use decoder::{Cache, Decoder, Ends, Observer, Tokens};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, generate};
pub use layer::{Layer, ParameterKind, Routing, Visitor};
pub use layout::{BankLayout, LayerLayout, SlotLayout};
pub use tokenizer::{ChatMessage, ModelTokenizer};
pub use writer::CheckpointWriter;
