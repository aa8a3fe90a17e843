//! Where the files of a task's splits are.

use super::config::TaskConfig;
use super::data_files::{DataFiles, DataFormat, Paths};
use super::repository::{Layout, Repository, shards};
use super::rows::{Form, numbered_files};
use super::template::{Engine, Fields};
use crate::{Error, MissingData, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where the files of a split may lie.
pub(super) struct Finder<'a> {
    pub(super) task: &'a TaskConfig,
    pub(super) split: &'a str,
    pub(super) folders: &'a [PathBuf],
    pub(super) repositories: &'a [Repository],
    pub(super) engine: &'a Engine,
}

/// The files of a split.
pub(super) struct Found<'a> {
    /// In the order of their rows.
    pub(super) paths: Vec<PathBuf>,
    /// How they are read.
    pub(super) form: Form<'a>,
    /// A file with their labels.
    pub(super) labels: Option<PathBuf>,
}

impl<'a> Finder<'a> {
    /// The files of the split: in each of the folders under the names of the task, or as a repository
    /// has them; then in the repository.
    ///
    /// # Errors
    /// [`Error::NoData`] if none is there, [`Error::DataFile`] if some of several are missing.
    pub(super) fn find(&self) -> Result<Found<'a>> {
        let mut tried = Vec::new();
        let own = self.own()?;
        for folder in self.folders {
            if folder.is_file() {
                return self.alone(folder.clone(), own.map(|(files, _)| files));
            }
            let places = self.places(folder)?;
            if let Some((files, paths)) = own
                && let Some(path) = self.named(&places, paths, &mut tried)?
            {
                let labels = match files.labels.get(self.split) {
                    Some(paths) => {
                        let found = self.named(&places, paths, &mut tried)?;
                        Some(found.ok_or_else(|| self.missing(&tried))?)
                    }
                    None => None,
                };
                let found = self.alone(path, Some(files))?;
                return Ok(Found { labels, ..found });
            }
            let layout = Layout::parquet(self.task.dataset_name.as_deref(), self.split);
            for place in &places {
                let paths = layout.find(place);
                if !paths.is_empty() {
                    return self.several(paths);
                }
            }
            if own.is_none() {
                tried.extend(places);
            }
        }
        let part = self.task.dataset_name.as_deref();
        for repository in self.repositories {
            let paths = repository.find(part, self.split);
            if !paths.is_empty() {
                return self.several(paths);
            }
        }
        Err(self.missing(&tried))
    }

    /// What the task says of its files, and the paths of the split's.
    fn own(&self) -> Result<Option<(&'a DataFiles, &'a Paths)>> {
        let Some(files) = &self.task.data_files else {
            return Ok(None);
        };
        match files.splits.get(self.split) {
            Some(paths) => Ok(Some((files, paths))),
            None => Err(Error::Unusable {
                task: self.task.name().to_owned(),
                problem: format!(
                    "`data_files.splits` has no `{}`, which the task reads; name its file",
                    self.split
                ),
            }),
        }
    }

    /// What the task's own path leads to: a file, or a folder of files.
    fn alone(&self, path: PathBuf, files: Option<&'a DataFiles>) -> Result<Found<'a>> {
        let form = match files {
            // A Parquet file says what it is, whatever form the task's own files have.
            Some(files) if DataFormat::of(&path) != Some(DataFormat::Parquet) => {
                Form::of(files, self.split)
            }
            _ => Form::by_name(self.split),
        };
        Ok(Found {
            paths: match files.map(|files| files.format) {
                Some(DataFormat::JsonFiles) => numbered_files(&path)?,
                _ => vec![path],
            },
            form,
            labels: None,
        })
    }

    fn several(&self, paths: Vec<PathBuf>) -> Result<Found<'a>> {
        if let Some(count) = paths.first().and_then(|path| shards(path))
            && count != paths.len()
        {
            return Err(Error::DataFile {
                path: paths[0].clone(),
                problem: format!(
                    "{} of the {count} files of the split are there; get the others too",
                    paths.len()
                ),
            });
        }
        Ok(Found {
            paths,
            form: Form::by_name(self.split),
            labels: None,
        })
    }

    /// The first of `paths` that is in one of the places, packed or not.
    fn named(
        &self,
        places: &[PathBuf],
        paths: &Paths,
        tried: &mut Vec<PathBuf>,
    ) -> Result<Option<PathBuf>> {
        let files = self.task.data_files.as_ref();
        let is_folder = files.is_some_and(|files| files.format == DataFormat::JsonFiles);
        for place in places {
            for path in &paths.0 {
                let path = place.join(self.filled(path)?);
                let mut packed = path.clone().into_os_string();
                packed.push(".gz");
                for candidate in [path, packed.into()] {
                    if candidate.is_file() || is_folder && candidate.is_dir() {
                        return Ok(Some(candidate));
                    }
                    tried.push(candidate);
                }
            }
        }
        Ok(None)
    }

    /// The folders that bear the names of the task and its data, and then the folder that they are in:
    /// files of many benchmarks have the same names.
    fn places(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut places = vec![folder.join(self.task.name())];
        for name in self.task.data_files.iter().flat_map(|files| &files.folders) {
            places.push(folder.join(self.filled(name)?));
        }
        places.push(folder.to_owned());
        places.dedup();
        Ok(places)
    }

    fn filled(&self, path: &str) -> Result<String> {
        let name = self.task.dataset_name.clone();
        let fields = Fields::from_iter([("dataset_name".to_owned(), Value::from(name))]);
        self.engine
            .text(path, &fields)
            .map_err(|problem| Error::Unusable {
                task: self.task.name().to_owned(),
                problem,
            })
    }

    fn missing(&self, tried: &[PathBuf]) -> Error {
        let shown = |path: &Path| format!("`{}`", path.display());
        let tried: Vec<String> = tried.iter().map(|path| shown(path)).collect();
        let caches = self.repositories.iter();
        let caches: Vec<String> = caches.map(|of| shown(&of.folder)).collect();
        let (files, split) = (self.task.data_files.as_ref(), self.split);
        Error::NoData(Box::new(MissingData {
            task: self.task.name().to_owned(),
            split: split.to_owned(),
            tried: match tried.is_empty() {
                true => "no folder, for none was given".into(),
                false => format!(
                    "{}, there also as Parquet (`{split}.parquet`, `{split}-00000-of-00001.parquet`)",
                    tried.join(", ")
                ),
            },
            cache: match caches.is_empty() {
                true => String::new(),
                false => format!(
                    ", and in the Hugging Face Hub's cache in {}",
                    caches.join(", ")
                ),
            },
            format: files.map_or("rows as the data set has them".into(), format_name),
            origin: files.map_or(String::new(), |files| format!("{} ", files.source)),
            remedy: match caches.is_empty() {
                true => "",
                false => ", or call again with `--download`",
            },
        }))
    }
}

fn format_name(files: &DataFiles) -> String {
    let format = match files.format {
        DataFormat::Jsonl => "one JSON object a line",
        DataFormat::Json => "a JSON array of rows, or an object with one for each split",
        DataFormat::JsonFiles => "a folder with one JSON object a file",
        DataFormat::Csv => "comma-separated columns",
        DataFormat::Tsv => "tab-separated columns",
        DataFormat::Parquet => "Parquet",
        DataFormat::Text => "plain text",
        DataFormat::Wikitext => "the text of WikiText, articles one after the other",
    };
    match files.columns.is_empty() {
        true => format.to_owned(),
        false => format!("{format} ({})", files.columns.join(", ")),
    }
}
