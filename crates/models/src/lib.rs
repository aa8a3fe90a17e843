//! Mixture-of-Experts models in the layout of Hugging Face: configuration, checkpoint folders, the
//! decoder and the expert bank.
//!
//! Symbols: `B` sequences, `T` tokens, `V` vocabulary, `H` hidden size, `E` experts, `K` top-k,
//! `F` expert intermediate size, `R` adapter rank, `D` head size.

mod attention;
mod bank;
mod bank_io;
mod cache;
mod checkpoint;
mod conversation;
mod decoder;
mod encode;
mod error;
mod generate;
mod index;
mod layer;
mod layout;
mod manifest;
mod mlp;
mod norm;
mod placement;
mod rotary;
mod router;
mod shards;
mod synthesize;
mod tensor_file;
mod text_stream;
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
pub use bank::{
    Adapters, Bank, ExpertRows, Factored, MixedSlots, Mixture, Projections, RankedAdapters, Scales,
    largest_rows,
};
pub use bank_io::{load_experts, multiplied_out};
pub use cache::Cache;
pub use candle_core::DType;
pub use checkpoint::{Checkpoint, Extra};
pub use config::{Family, ModelConfig, torch_dtype};
pub use conversation::{Conversation, Turn};
pub use decoder::{Decoder, Embedding, Ends, LanguageModel, Observer, StreamedDecoder, Tokens};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Next, Step, generate, generate_rows};
pub use index::parse_index;
pub use layer::{Layer, LayerObserver, ParameterKind, Visitor};
pub use layout::{BankLayout, FactoredBases, LayerLayout, SlotLayout};
pub use manifest::{Manifest, NamedShape};
pub use names::{ExpertPacking, Scheme};
pub use placement::{Placement, to_be_read};
pub use rotary::Rotary;
pub use router::{Routing, route_logits};
pub use synthesize::synthesize;
pub use tensor_file::{TensorFile, count_numbers, header_length, parse_header};
pub use text_stream::TextStream;
pub use tokenizer::{ChatMessage, ModelTokenizer};
pub use writer::{CheckpointWriter, Format};
