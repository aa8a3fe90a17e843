//! Names on the Hub.

use hf_hub::{Repo, RepoType};
use std::fmt;

const DEFAULT_REVISION: &str = "main";

/// A model on the Hub: `org/name`, or `org/name@revision` for a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    id: String,
    revision: String,
}

impl HubName {
    /// Reads a name; none if the text breaks the Hub's rules for names.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (org, name) = id.split_once('/')?;
        let valid = is_word(org)
            && is_word(name)
            && !id.contains("--")
            && !id.contains("..")
            && !id.ends_with(".git")
            && !revision.contains("..")
            && revision.split('/').all(is_word);
        valid.then(|| Self {
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
        Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone())
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
    }
}
