//! The model card: `README.md` with YAML front matter, as the Hugging Face Hub reads it.

use crate::{ExportKind, ExportReport};
use std::fmt::Write as _;

/// Stands in every card, so that an earlier export is known again.
pub(crate) const MARKER: &str = "<!-- lightmoe export:";

/// What a card says besides what the export itself knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Card {
    /// The original model: `org/name`, optionally `@revision`, or a folder, of which the card names
    /// only the last part.
    pub base_model: String,
    /// How the model was made smaller, in a few words.
    pub method: String,
    /// The resolved recipe; left out if empty.
    pub recipe_toml: String,
    /// Scores before and after as a Markdown table; left out if empty.
    pub table_markdown: String,
}

impl Card {
    /// The text of the card. `what` says what the export is; `license` holds the lines about the
    /// licence in the source's own card.
    pub(crate) fn render(&self, report: &ExportReport, what: &str, license: &[String]) -> String {
        let mut text = String::from("---\n");
        for line in license {
            text += &format!("{line}\n");
        }
        let hub = self.hub_name();
        if let Some(name) = hub {
            text += &format!("base_model: {name}\n");
        }
        let library = match report.kind {
            ExportKind::Dense => "transformers",
            ExportKind::Compact => "lightmoe",
        };
        text += &format!(
            "library_name: {library}\npipeline_tag: text-generation\n\
             tags:\n- lightmoe\n- mixture-of-experts\n---\n\
             {MARKER} {kind} -->\n\n# {title}, lightmoe {kind} export\n\n{what}\n\n\
             | | |\n|---|---|\n| Original model | {origin} |\n| Method | {method} |\n\
             | Parameters | {parameters} |\n| Weights on disk | {size} |\n",
            kind = report.kind,
            title = self.title(),
            origin = match hub {
                Some(name) => format!("[{name}](https://huggingface.co/{name})"),
                None => self.title().to_owned(),
            },
            method = one_line(&self.method),
            parameters = grouped(report.parameters),
            size = size(report.bytes),
        );
        if !self.table_markdown.trim().is_empty() {
            text += &format!("\n## Before and after\n\n{}\n", self.table_markdown.trim());
        }
        text += "\n## What loads it\n\n| engine | |\n|---|---|\n";
        for (engine, statement) in &report.loads_in {
            text += &format!("| {engine} | {statement} |\n");
        }
        if !self.recipe_toml.trim().is_empty() {
            let fence = fence(&self.recipe_toml);
            let recipe = self.recipe_toml.trim();
            text += &format!("\n## Recipe\n\n{fence}toml\n{recipe}\n{fence}\n");
        }
        text
    }

    /// `org/name`, if that is what the base model is.
    fn hub_name(&self) -> Option<&str> {
        let name = self.base_model.split('@').next().unwrap_or_default();
        let (org, model) = name.split_once('/')?;
        let is_part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        (is_part(org) && is_part(model)).then_some(name)
    }

    /// The base model without its organisation, revision and folders.
    fn title(&self) -> &str {
        let name = self.hub_name().unwrap_or(&self.base_model);
        let name = name.trim_end_matches('/').rsplit('/').next();
        name.filter(|name| !name.is_empty()).unwrap_or("A model")
    }
}

/// The lines about the licence in the front matter of a card.
pub(crate) fn license_lines(card: &str) -> Vec<String> {
    let mut lines = card.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Vec::new();
    }
    let is_license = |line: &&str| {
        ["license:", "license_name:", "license_link:"]
            .iter()
            .any(|key| line.len() > key.len() && line.starts_with(key))
    };
    lines
        .take_while(|line| line.trim_end() != "---")
        .filter(is_license)
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// A run of backticks that the text does not hold.
fn fence(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    "`".repeat(3.max(longest + 1))
}

/// Fit for a cell of a table.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace('|', "\\|")
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in GiB, or in MiB below a tenth of one.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = match mib < 102.4 {
        true => write!(text, "{mib:.2} MiB"),
        false => write!(text, "{:.2} GiB", mib / 1024.0),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(base_model: &str) -> Card {
        Card {
            base_model: base_model.into(),
            ..Card::default()
        }
    }

    #[test]
    fn only_a_hub_name_is_linked_and_no_folder_is_told() {
        let card = named("allenai/OLMoE-1B-7B-0924@main");
        assert_eq!(card.hub_name(), Some("allenai/OLMoE-1B-7B-0924"));
        assert_eq!(card.title(), "OLMoE-1B-7B-0924");
        for (folder, title) in [
            ("/home/me/models/base/", "base"),
            ("./base", "base"),
            ("../base", "base"),
            ("a/b/c", "c"),
            ("", "A model"),
        ] {
            assert_eq!(named(folder).hub_name(), None, "{folder}");
            assert_eq!(named(folder).title(), title);
        }
    }

    #[test]
    fn the_licence_is_found_in_front_matter_only() {
        let card = "---\nlanguage: en\nlicense: other\nlicense_link: LICENSE\n---\nlicense: no\n";
        assert_eq!(
            license_lines(card),
            ["license: other", "license_link: LICENSE"]
        );
        assert!(license_lines("# Title\nlicense: mit\n").is_empty());
        assert!(license_lines("").is_empty());
    }

    #[test]
    fn numbers_and_fences_are_readable() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(123_456), "123,456");
        assert_eq!(grouped(6_919_161_856), "6,919,161,856");
        assert_eq!(size(3 << 20), "3.00 MiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
        assert_eq!(fence("a ```` b"), "`````");
        assert_eq!(fence("rank = 8"), "```");
    }
}
