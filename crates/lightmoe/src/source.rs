//! Where a run's inputs come from: the model folder and the examples.

use crate::hub;
use crate::preflight::Refused;
use crate::recipe::Recipe;
use anyhow::{Context, Result};
use lightmoe_data::{Encoded, Example, Split, Task, encode, records};
use lightmoe_eval::EvalOptions;
use lightmoe_eval::harness::rendered;
use lightmoe_models::hub::{HubName, Want};
use lightmoe_models::{Checkpoint, ModelTokenizer, folder};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The name of the model in the repository.
pub const BUILT_IN: &str = "olmoe-nano";
/// Fewer records than this cannot be split into training and test.
pub(crate) const FEWEST_RECORDS: usize = 20;
/// The folder of a model: a path, a name on the Hub, or the built-in model's name. What is wanted of
/// a model on the Hub is downloaded if it is not there yet.
///
/// # Errors
/// [`Refused`] if there is no such model; if the download fails.
pub fn model_folder(name: &str, want: Want) -> Result<PathBuf> {
    if name == BUILT_IN {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../fixtures")
            .join(name);
        return match repository.exists() {
            true => Ok(repository),
            false => Err(Refused(format!(
                "the built-in model `{name}` lies in the repository, which is no longer where this \
                 program was built; give a model folder or `org/name` with `--model`"
            ))
            .into()),
        };
    }
    let path = PathBuf::from(name);
    match hub_name(name) {
        Some(name) => hub::download(&name, want),
        None if path.join("config.json").is_file() || folder::abandoned(&path).is_some() => {
            Ok(path)
        }
        None => Err(Refused(format!(
            "`{name}` is no model folder: it has no config.json; give a folder in the Hugging Face \
             layout, a model on the Hugging Face Hub as `org/name` or `org/name@revision`, or \
             `{BUILT_IN}`"
        ))
        .into()),
    }
}

/// The model on the Hub that `name` means, if it means one.
pub fn hub_name(name: &str) -> Option<HubName> {
    let path = Path::new(name);
    // Whoever opens an abandoned folder is told how to get it back.
    let here = name == BUILT_IN || path.exists() || folder::abandoned(path).is_some();
    HubName::parse(name).filter(|_| !here)
}

/// An opened model; see [`model_folder`].
///
/// # Errors
/// If there is no such model, or it cannot be read.
pub fn open_model(name: &str) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(&model_folder(name, Want::Whole)?)?;
    checkpoint.check()?;
    Ok(checkpoint)
}

/// The examples of a run.
pub struct TaskData {
    /// Name in results.
    pub name: String,
    /// The built-in task.
    pub task: Option<Task>,
    /// To observe and train on.
    pub train: Vec<Example>,
    /// To choose settings on.
    pub validation: Vec<Example>,
    /// To report.
    pub test: Vec<Example>,
}

impl TaskData {
    /// The examples of a built-in task.
    pub fn built_in(task: Task, train: usize, eval: usize, seed: u64) -> Self {
        Self {
            name: task.to_string(),
            task: Some(task),
            train: task.examples(Split::Train, train, seed),
            // Evaluation items are the same for every seed, so that seeds can be compared.
            validation: task.examples(Split::Validation, eval, 0),
            test: task.examples(Split::Test, eval, 0),
        }
    }

    /// The examples that a recipe names: a built-in task, or the user's own records, of which every
    /// twentieth is for validation and every twentieth for test (at most `eval_examples` each); with
    /// both, the records train and the task tests.
    ///
    /// # Errors
    /// If the records cannot be read or are too few.
    pub fn load(recipe: &Recipe, tokenizer: &ModelTokenizer) -> Result<Self> {
        let built_in = recipe.task.map(|task| {
            Self::built_in(
                task,
                recipe.train_examples,
                recipe.eval_examples,
                recipe.seed,
            )
        });
        let Some(path) = &recipe.train else {
            return built_in.context("no data: give `--task` or `--train`");
        };
        let records = read_records(path, recipe, tokenizer)?;
        if let Some(task) = built_in {
            return Ok(Self {
                train: records,
                ..task
            });
        }
        if records.len() < FEWEST_RECORDS {
            let message = format!(
                "`{}` has {} records, too few to hold some out for the test; give at least \
                 {FEWEST_RECORDS}",
                path.display(),
                records.len()
            );
            return Err(Refused(message).into());
        }
        let name = path
            .file_stem()
            .map_or("records".into(), |s| s.to_string_lossy().into_owned());
        let (mut train, mut validation, mut test) = (Vec::new(), Vec::new(), Vec::new());
        for (i, record) in records.into_iter().enumerate() {
            match i % 20 {
                9 if validation.len() < recipe.eval_examples => validation.push(record),
                19 if test.len() < recipe.eval_examples => test.push(record),
                _ => train.push(record),
            }
        }
        Ok(Self {
            name,
            task: None,
            train,
            validation,
            test,
        })
    }

    /// How the examples are scored.
    pub fn eval_options(&self, max_length: usize) -> EvalOptions {
        EvalOptions {
            max_len: Some(max_length),
            ..self
                .task
                .map_or_else(EvalOptions::default, EvalOptions::for_task)
        }
    }

    /// The training examples as tokens.
    ///
    /// # Errors
    /// If one has an answer that does not fit `max_length`.
    pub fn encoded(&self, tokenizer: &ModelTokenizer, max_length: usize) -> Result<Vec<Encoded>> {
        Self::encode(&self.train, tokenizer, max_length)
    }

    /// Examples as tokens.
    ///
    /// # Errors
    /// If one has an answer that does not fit `max_length`.
    pub fn encode(
        examples: &[Example],
        tokenizer: &ModelTokenizer,
        max_length: usize,
    ) -> Result<Vec<Encoded>> {
        let encode = |e| encode(&tokenizer.inner, tokenizer.eos, e, Some(max_length));
        let encoded = examples.iter().map(encode);
        Ok(encoded.collect::<lightmoe_data::Result<_>>()?)
    }
}

/// The records of a file, messages rendered by the model's chat template.
///
/// # Errors
/// If they cannot be read, or one has an answer that does not fit the longest sequence.
pub(crate) fn read_records(
    path: &Path,
    recipe: &Recipe,
    tokenizer: &ModelTokenizer,
) -> Result<Vec<Example>> {
    let chat = |messages: &[records::Message]| rendered(tokenizer, messages);
    let fits = |example: &Example| {
        encode(
            &tokenizer.inner,
            tokenizer.eos,
            example,
            Some(recipe.max_length),
        )
        .map(|_| ())
        .map_err(|e| e.to_string())
    };
    Ok(records::read_jsonl(path, &chat, &fits)?)
}

/// A short name of a model's content: its JSON files and weights. Of a file above 256 MiB only the
/// size and 256 pieces of 1 MiB at even distances count, the first and the last among them: hashing
/// all of a 60 GB checkpoint would take as long as observing it.
///
/// # Errors
/// If a file cannot be read.
pub fn model_fingerprint(dir: &Path) -> Result<String> {
    const PIECE: u64 = 1 << 20;
    const PIECES: u64 = 256;
    let mut names: Vec<PathBuf> = std::fs::read_dir(dir)?
        .map(|e| Ok(e?.path()))
        .collect::<Result<_>>()?;
    names.retain(|p| {
        p.extension()
            .is_some_and(|e| e == "safetensors" || e == "json")
    });
    names.sort();
    let mut hash = Sha256::new();
    for path in names {
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        let mut read = || -> std::io::Result<()> {
            use std::io::{Read, Seek, SeekFrom};
            let mut file = std::fs::File::open(&path)?;
            let size = file.metadata()?.len();
            hash.update(size.to_le_bytes());
            let pieces = size.div_ceil(PIECE).min(PIECES);
            let mut bytes = Vec::new();
            for piece in 0..pieces {
                // The last piece ends with the file; in a small file the pieces meet or overlap.
                let last = size.saturating_sub(PIECE);
                let start = (last as u128 * piece as u128 / (pieces - 1).max(1) as u128) as u64;
                file.seek(SeekFrom::Start(start))?;
                bytes.clear();
                (&mut file).take(PIECE).read_to_end(&mut bytes)?;
                hash.update(&bytes);
            }
            Ok(())
        };
        read().with_context(|| format!("cannot read `{}`", path.display()))?;
    }
    Ok(hash.finalize()[..16]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect())
}
