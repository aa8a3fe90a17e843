//! The subcommands that look at a model or run it, and change none.

use super::dtype;
use crate::cli::{GenerateArgs, InspectArgs, LogitsArgs, SynthesizeArgs};
use crate::device;
use crate::inspect::Summary;
use crate::pipeline::load_model;
use crate::progress::{self, Progress};
use crate::source::{hub_name, model_folder, open_model};
use crate::speak::Speaker;
use crate::tokens::{INPUT_IDS, TokenBatch};
use anyhow::{Result, bail};
use lightmoe_models::hub::Want;
use lightmoe_models::{DType, ModelConfig, ModelTokenizer, Tokens, folder, synthesize};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// `inspect`
///
/// # Errors
/// If the folder or configuration cannot be read.
pub fn run_inspect(args: InspectArgs) -> Result<String> {
    let summary = match &args.config {
        Some(path) => Summary::of_config(&ModelConfig::from_file(path)?, path)?,
        // What the configuration tells is no reason to download weights.
        None if hub_name(&args.model).is_some() => {
            let path = model_folder(&args.model, Want::ConfigOnly)?.join("config.json");
            Summary::of_config(&ModelConfig::from_file(&path)?, &path)?
        }
        None => Summary::of_checkpoint(&open_model(&args.model)?)?,
    };
    Ok(match args.json {
        true => serde_json::to_string_pretty(&summary)?,
        false => summary.to_string(),
    })
}

/// `generate`: the text appears as it is made.
///
/// # Errors
/// If the prompt does not fit the model.
pub fn run_generate(args: GenerateArgs) -> Result<String> {
    device::choose(&args.place.device, &args.place.dtype)?;
    let checkpoint = open_model(&args.model)?;
    let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
    let model = load_model(&checkpoint)?;
    let mut speaker = Speaker::new(&*model, &tokenizer, args.speak);
    let answer = speaker.answer(&args.prompt, &mut std::io::stdout().lock())?;
    // The text has no end of line of its own; what is said of it is on one below.
    progress::say(&format!("\n{answer}"));
    Ok(String::new())
}

/// A tensor on its way into a file: name, type, shape, bytes.
type Written = (String, Dtype, Vec<usize>, Vec<u8>);

/// `logits`
///
/// # Errors
/// If the ids do not fit the model, or the file cannot be written.
pub fn run_logits(args: LogitsArgs) -> Result<String> {
    device::choose(&args.place.device, &args.place.dtype)?;
    let checkpoint = open_model(&args.model)?;
    let model = load_model(&checkpoint)?;
    let config = model.config();
    let batch = match &args.tokens {
        Some(path) => TokenBatch::load(path, config.vocab_size)?,
        None => TokenBatch::spread(2, 32, config.vocab_size),
    };
    let shape = |width: usize| [batch.shape(), vec![width]].concat();
    let floats = |name: String, shape: Vec<usize>, values: Vec<f32>| -> Written {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (name, Dtype::F32, shape, bytes)
    };
    let mut all: Vec<Written> = vec![(
        INPUT_IDS.to_owned(),
        Dtype::I64,
        batch.shape(),
        batch.bytes(),
    )];
    let bar = Progress::new("logits", config.num_layers);
    let tokens = Tokens {
        ids: &batch.ids,
        rows: batch.rows,
    };
    let hidden = model.forward(tokens, None, &mut |l, x, routing| {
        let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        all.push(floats(
            format!("hidden.{l}"),
            shape(config.hidden_size),
            values,
        ));
        if let Some(routing) = routing {
            let (experts, k) = (config.moe.num_experts, config.moe.top_k);
            let logits = routing.logits.flatten_all()?.to_vec1::<f32>()?;
            all.push(floats(format!("router.{l}.logits"), shape(experts), logits));
            let gates = routing.gates.to_vec1::<f32>()?;
            all.push(floats(format!("router.{l}.weights"), shape(k), gates));
            let ids = routing.chosen.iter();
            let ids = ids.flat_map(|&e| i64::from(e).to_le_bytes()).collect();
            all.push((format!("router.{l}.ids"), Dtype::I64, shape(k), ids));
        }
        bar.at(l + 1);
        Ok(())
    })?;
    let last = format!("hidden.{}", config.num_layers);
    let values = hidden
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    all.push(floats(last, shape(config.hidden_size), values));
    let logits = model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
    all.push(floats("logits".into(), shape(config.vocab_size), logits));
    let views = all.iter().map(|(name, dtype, shape, bytes)| {
        Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    folder::write_file(&args.out, &safetensors::serialize(views, None)?)?;
    Ok(format!("logits  {}", args.out.display()))
}

/// `synthesize`
///
/// # Errors
/// If the configuration cannot be read, or the folder cannot be written.
pub fn run_synthesize(args: SynthesizeArgs) -> Result<String> {
    let config = ModelConfig::from_file(&args.config)?;
    let dtype = dtype(&args.dtype)?.unwrap_or_else(|| config.file_dtype());
    let bar = Progress::new("synthesize", config.num_layers);
    let each = &mut |done, all| bar.of(done, all);
    if !synthesize(&config, dtype, args.seed, &args.out, each)? {
        bail!("interrupted; nothing half-written remains");
    }
    Ok(format!(
        "model  {}\n{} parameters",
        args.out.display(),
        config.parameters().total()
    ))
}
