//! `lightmoe bench speed`: how fast a model reads prompts and answers them, several at a time.

use crate::cli::SpeedArgs;
use crate::device;
use crate::pipeline::load_model;
use crate::preflight::Refused;
use crate::progress::Progress;
use crate::source::open_model;
use crate::tokens::TokenBatch;
use anyhow::{Result, ensure};
use lightmoe_models::{GenerateOptions, LanguageModel, Next, Step, generate_rows};
use serde::Serialize;
use std::fmt;
use std::time::Instant;

/// What was measured.
#[derive(Debug, Serialize)]
struct Speed {
    model: String,
    device: String,
    dtype: &'static str,
    parameters: u64,
    load_seconds: f64,
    /// Tokens of each prompt.
    prompt_tokens: usize,
    /// Tokens of each answer.
    new_tokens: usize,
    cases: Vec<Case>,
}

/// So many prompts at a time; medians of the runs.
#[derive(Debug, Serialize)]
struct Case {
    prompts: usize,
    /// Until each has its first token.
    prompt_tokens_per_second: f64,
    /// One token more for each.
    milliseconds_per_step: f64,
    new_tokens_per_second: f64,
}

/// Runs the bench.
///
/// # Errors
/// If the model cannot be read, or prompts and answers do not fit its context.
pub fn run(args: SpeedArgs) -> Result<String> {
    device::choose(&args.place.device, &args.place.dtype)?;
    if args.new_tokens < 2 {
        let message = "`--new-tokens` is less than 2; what is timed begins with the second token";
        return Err(Refused(message.into()).into());
    }
    let checkpoint = open_model(&args.model)?;
    let (all, context) = (
        args.prompt_tokens + args.new_tokens,
        checkpoint.config().max_position_embeddings,
    );
    if all > context {
        let message = format!(
            "prompts and answers of {all} tokens together, and the model's context is {context}; give \
             less of `--prompt-tokens` or `--new-tokens`"
        );
        return Err(Refused(message).into());
    }
    let placement = device::placement(&checkpoint);
    let begin = Instant::now();
    let model = load_model(&checkpoint)?;
    let mut speed = Speed {
        model: args.model,
        device: match placement.device.is_cpu() {
            true => crate::machine::processor(),
            false => format!("{:?}", placement.device.location()),
        },
        dtype: placement.dtype.as_str(),
        parameters: checkpoint.parameters(),
        load_seconds: begin.elapsed().as_secs_f64(),
        prompt_tokens: args.prompt_tokens,
        new_tokens: args.new_tokens,
        cases: Vec::new(),
    };
    let bar = Progress::new("speed", args.prompts.len());
    for (i, &prompts) in args.prompts.iter().enumerate() {
        // The first run finds kernels to compile and caches empty.
        let mut runs = Vec::new();
        for _ in 0..=args.runs {
            runs.push(timed(
                &*model,
                prompts,
                speed.prompt_tokens,
                speed.new_tokens,
            )?);
        }
        let median = |part: fn(&[f64; 2]) -> f64| {
            let mut all: Vec<f64> = runs[1..].iter().map(part).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let (reading, step) = (median(|run| run[0]), median(|run| run[1]));
        speed.cases.push(Case {
            prompts,
            prompt_tokens_per_second: (prompts * speed.prompt_tokens) as f64 / reading,
            milliseconds_per_step: step * 1e3,
            new_tokens_per_second: prompts as f64 / step,
        });
        ensure!(bar.at(i + 1), "interrupted");
    }
    Ok(match args.json {
        true => serde_json::to_string_pretty(&speed)?,
        false => speed.to_string(),
    })
}

/// Seconds until all prompts have a first token, and of each step after it.
fn timed(
    model: &dyn LanguageModel,
    prompts: usize,
    prompt_tokens: usize,
    new_tokens: usize,
) -> Result<[f64; 2]> {
    let batch = TokenBatch::spread(prompts, prompt_tokens, model.config().vocab_size);
    let prompts: Vec<Vec<u32>> = batch
        .ids
        .chunks(prompt_tokens)
        .map(<[u32]>::to_vec)
        .collect();
    let options = GenerateOptions::greedy(new_tokens, Vec::new());
    let begin = Instant::now();
    let (mut first, mut last) = (begin, begin);
    let answers = generate_rows(model, &prompts, &options, &mut |_, step| {
        if let Step::Token(answer) = step {
            last = Instant::now();
            if answer.len() == 1 {
                first = last;
            }
        }
        Ok(Next::Continue)
    })?;
    ensure!(
        answers.iter().all(|answer| answer.len() == new_tokens),
        "answers ended before they had {new_tokens} tokens"
    );
    let reading = (first - begin).as_secs_f64();
    Ok([
        reading,
        (last - first).as_secs_f64() / (new_tokens - 1) as f64,
    ])
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} parameters as {} on {}, read in {:.1} s; prompts of {} tokens, answers of {}",
            self.model,
            self.parameters,
            self.dtype,
            self.device,
            self.load_seconds,
            self.prompt_tokens,
            self.new_tokens
        )?;
        write!(f, "prompts  read tokens/s  ms/step  new tokens/s")?;
        for case in &self.cases {
            write!(
                f,
                "\n{:7}  {:13.0}  {:7.2}  {:12.1}",
                case.prompts,
                case.prompt_tokens_per_second,
                case.milliseconds_per_step,
                case.new_tokens_per_second
            )?;
        }
        Ok(())
    }
}
