//! What the commands take that let a model speak: `generate` and `chat`.

use super::share;
use clap::Args;
use std::path::PathBuf;

/// What a model runs on
#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// auto, cpu, or cuda (cuda:N for another than the first GPU) in a program with CUDA
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// The numbers that it computes with: auto (on the CPU f32, on a GPU its own), f32, bf16, and on a GPU f16
    #[arg(long, default_value = "auto")]
    pub dtype: String,
}

/// How a model speaks
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SpeakArgs {
    /// The most tokens of an answer
    #[arg(long, visible_alias = "max-tokens", default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Zero always takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Draw from so many tokens, the likeliest
    #[arg(long, value_parser = count)]
    pub top_k: Option<usize>,
    /// Draw from the smallest set of tokens with this probability
    #[arg(long, value_parser = share)]
    pub top_p: Option<f64>,
    /// Seed of the draw
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// A text that ends the answer and is no part of it; may be given more than once
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
}

/// `generate`
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The model, original or compressed
    #[arg(long, default_value = crate::source::BUILT_IN)]
    pub model: String,
    /// The text to continue
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub prompt: String,
    /// How
    #[command(flatten)]
    pub speak: SpeakArgs,
    /// Where
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// `chat`
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// The model, original or compressed
    #[arg(long, default_value = crate::source::BUILT_IN)]
    pub model: String,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A chat template in Jinja, instead of the model's own
    #[arg(long, value_name = "FILE.jinja")]
    pub chat_template: Option<PathBuf>,
    /// How
    #[command(flatten)]
    pub speak: SpeakArgs,
    /// Where
    #[command(flatten)]
    pub place: PlaceArgs,
}

fn temperature(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|n: &f64| *n >= 0.0 && n.is_finite())
        .ok_or_else(|| "give a number, 0 or more".to_owned())
}

pub(super) fn count(text: &str) -> Result<usize, String> {
    let number = text.parse().ok();
    number
        .filter(|n| *n > 0)
        .ok_or_else(|| "give a whole number above 0".to_owned())
}
