//! Data sets as their repositories on the Hugging Face Hub lay them out: Parquet and other files, of
//! which `README.md` or their names say to which part and split they belong.

use super::config::one_or_many;
use glob::{MatchOptions, Pattern};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The file that may say which files there are.
pub const README: &str = "README.md";

/// Endings of files in repositories, the likeliest first.
const ENDINGS: [&str; 6] = ["parquet", "jsonl", "jsonl.gz", "json", "csv", "tsv"];

/// The files of a data set in a cache, or where they would be.
#[derive(Debug, Clone)]
pub struct Repository {
    /// The folder that holds the files; need not exist.
    pub folder: PathBuf,
    /// What the Hub calls the data set.
    pub name: String,
}

/// Which files of a repository are those of a split: lists of patterns, of which the first one counts
/// that any file matches.
pub struct Layout(Vec<Vec<String>>);

impl Layout {
    /// By what `README.md` says of the part and split, or by the usual names.
    pub fn of(readme: Option<&str>, part: Option<&str>, split: &str) -> Self {
        match readme.and_then(|text| declared(text, part, split)) {
            Some(patterns) => Self(vec![patterns]),
            None => Self::usual(part, split, &ENDINGS),
        }
    }

    /// Parquet files by the usual names.
    pub(super) fn parquet(part: Option<&str>, split: &str) -> Self {
        Self::usual(part, split, &ENDINGS[..1])
    }

    fn usual(part: Option<&str>, split: &str, endings: &[&str]) -> Self {
        let mut folders = vec![String::new(), "data/".into()];
        if let Some(part) = part {
            let part = Pattern::escape(part);
            folders.splice(0..0, [format!("{part}/"), format!("data/{part}/")]);
        }
        let names = match split {
            "validation" => ["validation", "valid", "val"].map(str::to_owned).to_vec(),
            split => vec![Pattern::escape(split)],
        };
        let mut lists = Vec::new();
        for folder in &folders {
            for ending in endings {
                for name in &names {
                    for form in ["", "-*-of-*", "/*"] {
                        lists.push(vec![format!("{folder}{name}{form}.{ending}")]);
                    }
                }
            }
        }
        Self(lists)
    }

    /// The files of the split among all that a repository has, sorted.
    pub fn choose(&self, names: &[String]) -> Vec<String> {
        let options = MatchOptions {
            require_literal_separator: true,
            ..MatchOptions::default()
        };
        self.first(|pattern| {
            let Ok(pattern) = Pattern::new(pattern) else {
                return Vec::new();
            };
            let names = names.iter();
            names
                .filter(|name| pattern.matches_with(name, options))
                .cloned()
                .collect()
        })
    }

    /// The files of the split in a folder, sorted.
    pub(super) fn find(&self, folder: &Path) -> Vec<PathBuf> {
        let root = Pattern::escape(&folder.to_string_lossy());
        self.first(|pattern| {
            let paths = glob::glob(&format!("{root}/{pattern}"));
            paths.into_iter().flatten().flatten().collect()
        })
    }

    fn first<T: Ord>(&self, matches: impl Fn(&str) -> Vec<T>) -> Vec<T> {
        let lists = self.0.iter();
        let found = lists.map(|list| {
            let mut found: Vec<T> = list.iter().flat_map(|pattern| matches(pattern)).collect();
            found.sort();
            found.dedup();
            found
        });
        found
            .into_iter()
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    }
}

impl Repository {
    /// The files of a split that are there, sorted.
    pub(super) fn find(&self, part: Option<&str>, split: &str) -> Vec<PathBuf> {
        let readme = fs::read_to_string(self.folder.join(README)).ok();
        Layout::of(readme.as_deref(), part, split).find(&self.folder)
    }
}

/// How many files a split has where their names say so, as `train-00000-of-00002.parquet` does.
pub(super) fn shards(path: &Path) -> Option<usize> {
    let name = path.file_name()?.to_str()?;
    let (_, count) = name.split_once("-of-")?;
    let digits = count
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(count.len());
    count[..digits].parse().ok()
}

/// What stands before the text of a README.
#[derive(Deserialize)]
struct Card {
    #[serde(default)]
    configs: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    config_name: String,
    #[serde(default)]
    data_files: Option<Files>,
    #[serde(default)]
    default: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Files {
    /// Of the split `train`.
    One(String),
    Splits(Vec<Split>),
    Map(BTreeMap<String, Many>),
    Train(Vec<String>),
}

#[derive(Deserialize)]
struct Split {
    split: String,
    path: Many,
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Many(#[serde(deserialize_with = "one_or_many")] Vec<String>);

/// The patterns that a README gives for a split of a part; of the default part where none is named.
/// What leads out of the repository is left out.
fn declared(readme: &str, part: Option<&str>, split: &str) -> Option<Vec<String>> {
    let (card, _) = readme
        .trim_start()
        .strip_prefix("---\n")?
        .split_once("\n---")?;
    let card: Card = serde_saphyr::from_str(card).ok()?;
    let is_wanted = |of: &&Part| match part {
        Some(part) => of.config_name == part,
        None => of.default || of.config_name == "default" || card.configs.len() == 1,
    };
    let files = card.configs.iter().find(is_wanted)?.data_files.as_ref()?;
    let mut patterns = match files {
        Files::One(path) if split == "train" => vec![path.clone()],
        Files::Train(paths) if split == "train" => paths.clone(),
        Files::One(_) | Files::Train(_) => Vec::new(),
        Files::Splits(all) => {
            let of_split = all.iter().filter(|of| of.split == split);
            of_split.flat_map(|of| of.path.0.clone()).collect()
        }
        Files::Map(all) => all.get(split)?.0.clone(),
    };
    patterns
        .retain(|pattern| !pattern.starts_with('/') && pattern.split('/').all(|word| word != ".."));
    Some(patterns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(
        readme: Option<&str>,
        part: Option<&str>,
        split: &str,
        names: &[&str],
    ) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        Layout::of(readme, part, split).choose(&names)
    }

    #[test]
    fn the_names_say_which_files_belong_together() {
        let names = [
            "README.md",
            "main/test-00000-of-00001.parquet",
            "main/train-00001-of-00002.parquet",
            "main/train-00000-of-00002.parquet",
            "socratic/train-00000-of-00001.parquet",
            "data/validation-00000-of-00001-3f9a.parquet",
            "dev.jsonl",
        ];
        let train = [names[3], names[2]];
        assert_eq!(chosen(None, Some("main"), "train", &names), train);
        assert_eq!(chosen(None, None, "validation", &names), [names[5]]);
        assert_eq!(chosen(None, None, "dev", &names), ["dev.jsonl"]);
        assert!(chosen(None, None, "train", &names).is_empty());
        let plain = ["x/test.csv", "val/0000.parquet", "validation.txt"];
        assert_eq!(chosen(None, Some("x"), "test", &plain), ["x/test.csv"]);
        assert_eq!(chosen(None, None, "validation", &plain), [plain[1]]);
    }

    #[test]
    fn the_readme_says_it_better() {
        let readme = "---\nlicense: mit\nconfigs:\n- config_name: a\n  data_files:\n  - split: test\n    \
                      path: [a/x*, b.jsonl]\n- config_name: default\n  data_files: all.csv\n- \
                      config_name: c\n  data_files: {test: '../c.csv'}\n---\n# Title\n";
        let names = [
            "a/x1.parquet",
            "a/x2.parquet",
            "a/y/x3.parquet",
            "b.jsonl",
            "all.csv",
            "test.csv",
        ];
        let all = |part, split| chosen(Some(readme), part, split, &names);
        assert_eq!(all(Some("a"), "test"), [names[0], names[1], names[3]]);
        assert_eq!(all(None, "train"), ["all.csv"]);
        for (part, split) in [(None, "test"), (Some("a"), "train"), (Some("c"), "test")] {
            assert!(all(part, split).is_empty(), "{part:?} {split}");
        }
        // A part that it does not name, and a README that says nothing, leave the names.
        assert_eq!(all(Some("d"), "test"), ["test.csv"]);
        assert_eq!(chosen(Some("# Title"), None, "test", &names), ["test.csv"]);
    }

    #[test]
    fn names_count_their_files() {
        let count = |name: &str| shards(Path::new(name));
        assert_eq!(count("a/train-00000-of-00012.parquet"), Some(12));
        assert_eq!(count("train-00000-of-00002-ab12.parquet"), Some(2));
        assert_eq!(count("train.parquet"), None);
    }
}
