//! Where a run's inputs come from: the model folder and the examples.

use crate::hub;
use crate::items::{Items, read_windows};
use crate::preflight::Refused;
use crate::recipe::Recipe;
use anyhow::{Context, Result};
use lightmoe_data::text::is_text;
use lightmoe_data::{Encoded, Example, Split, Task, encode, records};
use lightmoe_eval::EvalOptions;
use lightmoe_eval::harness::rendered;
use lightmoe_models::hub::{HubName, Want};
use lightmoe_models::{Checkpoint, ModelTokenizer, folder};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The name of the model in the repository.
pub const BUILT_IN: &str = "olmoe-nano";
/// Fewer records or windows than this cannot be split into training and test.
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
        None if is_model_folder(&path) => Ok(path),
        None => Err(Refused(format!(
            "`{name}` is no model folder: it has no config.json; give a folder in the Hugging Face \
             layout, a model on the Hugging Face Hub as `org/name` or `org/name@revision`, or \
             `{BUILT_IN}`"
        ))
        .into()),
    }
}

/// Whether there is a model folder, or what is left of one: whoever opens that is told how to get it back.
pub(crate) fn is_model_folder(path: &Path) -> bool {
    path.join("config.json").is_file() || folder::abandoned(path).is_some()
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

/// The data of a run.
pub struct TaskData {
    /// Name in results.
    pub name: String,
    /// The built-in task.
    pub task: Option<Task>,
    /// To observe and train on.
    pub train: Items,
    /// To choose settings on.
    pub validation: Items,
    /// To report.
    pub test: Items,
}

impl TaskData {
    /// The examples of a built-in task.
    pub fn built_in(task: Task, train: usize, eval: usize, seed: u64) -> Self {
        Self {
            name: task.to_string(),
            task: Some(task),
            train: Items::Examples(task.examples(Split::Train, train, seed)),
            // Evaluation items are the same for every seed, so that seeds can be compared.
            validation: Items::Examples(task.examples(Split::Validation, eval, 0)),
            test: Items::Examples(task.examples(Split::Test, eval, 0)),
        }
    }

    /// The data that a recipe names: a built-in task, or a file of the user's own; with both, the file
    /// trains and the task tests. A text of its own (`eval_text`) tests instead of a part of the file.
    ///
    /// # Errors
    /// If a file cannot be read or is too little.
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
        let items = Items::read(path, recipe, tokenizer)?;
        if let Some(task) = built_in {
            return Ok(Self {
                train: items.to_train(recipe.seed),
                ..task
            });
        }
        if items.len() < FEWEST_RECORDS {
            let (path, n) = (path.display(), items.len());
            let message = match items {
                Items::Examples(_) => format!(
                    "`{path}` has {n} records, too few to hold some out for the test; give at least \
                     {FEWEST_RECORDS}"
                ),
                Items::Text(_) => format!(
                    "`{path}` makes {n} windows of {} tokens, too few to hold some out for the test; \
                     give a text of at least {FEWEST_RECORDS}, or a smaller `max_length`",
                    recipe.max_length
                ),
            };
            return Err(Refused(message).into());
        }
        let mut data = match items {
            Items::Examples(records) => Self::of_records(records, recipe),
            Items::Text(windows) => Self::of_text(windows, recipe),
        };
        data.name = name_of(recipe.eval_text.as_ref().unwrap_or(path));
        if let Some(path) = &recipe.eval_text {
            if !is_text(path)? {
                return Err(Refused(format!(
                    "`{}` is no text to test on; `eval_text` takes a `.txt` file, or documents as JSON lines \
                     with `text`",
                    path.display()
                ))
                .into());
            }
            let windows = read_windows(path, recipe, tokenizer)?;
            data.test = Items::Text(evenly(&windows, recipe.eval_examples));
        }
        Ok(data)
    }

    /// Every twentieth record is for validation, and every twentieth for test unless a text tests, at most
    /// `eval_examples` each.
    fn of_records(records: Vec<Example>, recipe: &Recipe) -> Self {
        let (mut train, mut validation, mut test) = (Vec::new(), Vec::new(), Vec::new());
        for (i, record) in records.into_iter().enumerate() {
            match i % 20 {
                9 if validation.len() < recipe.eval_examples => validation.push(record),
                19 if recipe.eval_text.is_none() && test.len() < recipe.eval_examples => {
                    test.push(record);
                }
                _ => train.push(record),
            }
        }
        Self {
            name: String::new(),
            task: None,
            train: Items::Examples(train),
            validation: Items::Examples(validation),
            test: Items::Examples(test),
        }
    }

    /// The last twentieth of a text tests, unless another text does, and the twentieth before it
    /// validates: parts in a row, so that nothing of a passage that is tested was trained on. Of each at
    /// most `eval_examples` windows are read, at even distances.
    fn of_text(mut windows: Vec<Encoded>, recipe: &Recipe) -> Self {
        let twentieth = windows.len() / 20;
        let mut last = || {
            let part = windows.split_off(windows.len() - twentieth);
            Items::Text(evenly(&part, recipe.eval_examples))
        };
        let test = match recipe.eval_text {
            None => last(),
            Some(_) => Items::Text(Vec::new()),
        };
        let validation = last();
        Self {
            name: String::new(),
            task: None,
            train: Items::Text(windows).to_train(recipe.seed),
            validation,
            test,
        }
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
}

/// The name of a file in results.
fn name_of(path: &Path) -> String {
    // Packed: `book.txt.gz` is `book`.
    let packed = path.extension().is_some_and(|ending| ending == "gz");
    let path = if packed {
        path.with_extension("")
    } else {
        path.to_owned()
    };
    let stem = path.file_stem();
    stem.map_or("records".into(), |s| s.to_string_lossy().into_owned())
}

/// At most `most` of `windows`, at even distances.
fn evenly(windows: &[Encoded], most: usize) -> Vec<Encoded> {
    let count = windows.len().min(most);
    let at = |i: usize| windows[i * windows.len() / count].clone();
    (0..count).map(at).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_taken_at_even_distances() {
        let windows: Vec<Encoded> = (0..10)
            .map(|i| Encoded {
                tokens: vec![i],
                answer_start: 0,
            })
            .collect();
        let taken = |most| -> Vec<u32> {
            let taken = evenly(&windows, most);
            taken.iter().map(|w| w.tokens[0]).collect()
        };
        assert_eq!(taken(4), [0, 2, 5, 7]);
        assert_eq!(taken(10), (0..10).collect::<Vec<_>>());
        assert_eq!(taken(50).len(), 10);
    }
}
