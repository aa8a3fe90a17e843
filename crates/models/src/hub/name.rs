//! Names on the Hub.

use hf_hub::{Repo, RepoType};
use std::fmt;

const DEFAULT_REVISION: &str = "main";

/// A model or data set on the Hub: `org/name`, or `org/name@revision` for a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    kind: Kind,
    id: String,
    revision: String,
}

/// What a name names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    DataSet,
}

impl HubName {
    /// Reads the name of a model; none if the text breaks the Hub's rules for names.
    pub fn parse(text: &str) -> Option<Self> {
        let name = Self::read(Kind::Model, text)?;
        name.id.contains('/').then_some(name)
    }

    /// Reads the name of a data set. Some old ones have no organisation before them.
    pub fn data_set(text: &str) -> Option<Self> {
        Self::read(Kind::DataSet, text)
    }

    fn parts(text: &str) -> (&str, &str) {
        text.split_once('@').unwrap_or((text, DEFAULT_REVISION))
    }

    fn read(kind: Kind, text: &str) -> Option<Self> {
        let (id, revision) = Self::parts(text);
        let valid = id.split('/').count() <= 2
            && id.split('/').all(is_word)
            && !id.contains("--")
            && !id.contains("..")
            && !id.ends_with(".git")
            && !revision.contains("..")
            && revision.split('/').all(is_word);
        valid.then(|| Self {
            kind,
            id: id.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// `org/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    pub(super) fn repo(&self) -> Repo {
        let kind = match self.kind {
            Kind::Model => RepoType::Model,
            Kind::DataSet => RepoType::Dataset,
        };
        Repo::with_revision(self.id.clone(), kind, self.revision.clone())
    }

    /// What it names, in words.
    pub(super) fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Model => "model",
            Kind::DataSet => "data set",
        }
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        match self.revision == DEFAULT_REVISION {
            true => Ok(()),
            false => write!(f, "@{}", self.revision),
        }
    }
}

/// Letters, digits and `_`, and between them `-` and `.`.
fn is_word(text: &str) -> bool {
    let inner = |c: char| c == '_' || c.is_ascii_alphanumeric();
    text.len() <= 96
        && text.starts_with(inner)
        && text.ends_with(inner)
        && text.chars().all(|c| inner(c) || c == '-' || c == '.')
}

#[cfg(test)]
mod tests {
    use super::HubName;

    #[test]
    fn names_are_told_from_paths() {
        for text in [
            "allenai/OLMoE-1B-7B-0924",
            "a/b",
            "Qwen/Qwen1.5-MoE-A2.7B@refs/pr/3",
            "org/name@v1.0",
            "org/name@a-b_c",
        ] {
            assert_eq!(HubName::parse(text).unwrap().to_string(), text);
        }
        let name = HubName::parse("org/name@main").unwrap();
        assert_eq!((name.id(), name.revision()), ("org/name", "main"));
        for text in [
            "",
            "name",
            "a/b/c",
            "./a",
            "../a",
            "/a",
            "a/",
            "~/a",
            "a b/c",
            "a/b--c",
            "a/b..c",
            "a/b.git",
            "a/b@",
            "a/b@../c",
            "a/b@x/../y",
            "a/b@/x",
            "a/b@x@y",
            "a/b@x?y",
            "a/ü",
        ] {
            assert_eq!(HubName::parse(text), None, "{text}");
        }
        assert_eq!(HubName::parse(&format!("a/{}", "b".repeat(97))), None);
        let data = HubName::data_set("gsm8k").unwrap();
        assert_eq!(data.repo().folder_name(), "datasets--gsm8k");
        let data = HubName::data_set("org/name@v1").unwrap();
        assert_eq!((data.id(), data.revision()), ("org/name", "v1"));
        for text in ["", "a/b/c", "../a", "json@"] {
            assert_eq!(HubName::data_set(text), None, "{text}");
        }
    }
}
