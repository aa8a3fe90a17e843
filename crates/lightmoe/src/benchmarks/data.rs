//! Where the data of benchmarks come from: the user's folders, the Hub's cache, the Hub.

use crate::hub;
use crate::preflight::Refused;
use anyhow::Result;
use lightmoe_data::Error;
use lightmoe_data::harness::repository::{Layout, Repository};
use lightmoe_data::harness::{PromptOptions, Prompts, TaskConfig, build_prompts};
use lightmoe_models::hub::HubName;
use std::path::PathBuf;

/// Whether data that are nowhere here are downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Download {
    /// Never.
    Never,
    /// What is missing, from the Hub.
    Missing,
}

/// The requests of a task.
///
/// # Errors
/// [`Refused`] for a task or data that cannot be used, and for data that are nowhere.
pub(super) fn prompts_of(
    task: &TaskConfig,
    folders: &[PathBuf],
    download: Download,
    options: &PromptOptions<'_>,
) -> Result<Prompts> {
    let names = task.repositories().into_iter();
    let names: Vec<HubName> = names.filter_map(HubName::data_set).collect();
    let mut fetched: Vec<String> = Vec::new();
    loop {
        let repository = cached(&names);
        let options = PromptOptions {
            repository: repository.as_ref(),
            ..*options
        };
        match (build_prompts(task, folders, &options), names.first()) {
            (Err(Error::NoData(missing)), Some(name))
                if download == Download::Missing && !fetched.contains(&missing.split) =>
            {
                let part = task.dataset_name.as_deref();
                hub::download_files(name, &|files, readme| {
                    Layout::of(readme, part, &missing.split).choose(files)
                })?;
                fetched.push(missing.split);
            }
            (prompts, _) => return Ok(prompts.map_err(Refused::of)?),
        }
    }
}

/// The data set under the first of its names that the cache has, or under the first.
fn cached(names: &[HubName]) -> Option<Repository> {
    let all = || {
        names.iter().map(|name| Repository {
            folder: hub::cached(name),
            name: name.to_string(),
        })
    };
    all()
        .find(|repository| repository.folder.exists())
        .or_else(|| all().next())
}
