//! When two texts count as the same.

use crate::{Error, Result};
use fancy_regex::Regex;
use lightmoe_data::harness::{MetricConfig, latex, python};

/// What does not matter when texts are compared.
pub(super) struct Cleaning {
    regexes: Vec<Regex>,
    case: bool,
    punctuation: bool,
    numbers: bool,
    comparison: Comparison,
}

enum Comparison {
    Text,
    Latex,
}

impl Cleaning {
    /// # Errors
    /// What is wrong with a pattern.
    pub(super) fn new(config: &MetricConfig) -> std::result::Result<Self, String> {
        let regexes = config
            .regexes_to_ignore
            .iter()
            .map(|pattern| python::regex(pattern));
        Ok(Self {
            regexes: regexes.collect::<std::result::Result<_, _>>()?,
            case: config.ignore_case,
            punctuation: config.ignore_punctuation,
            numbers: config.ignore_numbers,
            comparison: match config.math_equivalence {
                true => Comparison::Latex,
                false => Comparison::Text,
            },
        })
    }

    /// Whether two texts are the same once cleaned.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a pattern takes too many steps.
    pub(super) fn is_same(&self, a: &str, b: &str) -> Result<bool> {
        let (a, b) = (self.cleaned(a)?, self.cleaned(b)?);
        Ok(match self.comparison {
            Comparison::Text => a == b,
            Comparison::Latex => latex::is_equivalent(&a, &b),
        })
    }

    fn cleaned(&self, text: &str) -> Result<String> {
        let mut text = text.to_owned();
        for regex in &self.regexes {
            text = python::substitute(regex, "", &text)
                .map_err(Error::Invalid)?
                .into_owned();
        }
        if self.case {
            text = text.to_lowercase();
        }
        text.retain(|c| {
            !(self.punctuation && c.is_ascii_punctuation() || self.numbers && c.is_ascii_digit())
        });
        Ok(text)
    }
}
