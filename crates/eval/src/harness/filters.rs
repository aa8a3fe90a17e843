//! What is taken from a generated answer.

use crate::{Error, Result};
use fancy_regex::Regex;
use lightmoe_data::harness::{
    Engine, Fields, FilterChain, FilterStep, NO_FILTER, TaskConfig, latex, python,
};

/// The filters of a task, ready to use.
pub(super) struct Filters(Vec<(String, Vec<Filter>)>);

enum Filter {
    Regex {
        regex: Regex,
        group_select: i64,
        fallback: String,
    },
    Template {
        engine: Engine,
        template: String,
    },
    Plain(FilterStep),
}

impl Filters {
    /// # Errors
    /// [`Error::Invalid`] for a pattern that is none.
    pub(super) fn new(task: &TaskConfig) -> Result<Self> {
        let chains = match &task.filter_list {
            Some(chains) => chains.clone(),
            None => vec![FilterChain {
                name: NO_FILTER.into(),
                filter: vec![FilterStep::TakeFirst],
            }],
        };
        let chains = chains.into_iter().map(|chain| {
            let steps = chain.filter.into_iter().map(|step| Filter::new(task, step));
            Ok((chain.name, steps.collect::<Result<_>>()?))
        });
        Ok(Self(chains.collect::<Result<_>>()?))
    }

    /// The names of the chains.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Whether chain `number` leaves one of several answers.
    pub(super) fn takes_first(&self, number: usize) -> bool {
        let mut steps = self.0[number].1.iter();
        steps.any(|step| matches!(step, Filter::Plain(FilterStep::TakeFirst)))
    }

    /// What chain `number` takes from an answer to a document.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a pattern takes too many steps, or a template cannot be filled.
    pub(super) fn apply(&self, number: usize, answer: &str, doc: &Fields) -> Result<String> {
        let steps = &self.0[number].1;
        steps
            .iter()
            .try_fold(answer.to_owned(), |text, step| step.apply(&text, doc))
    }
}

impl Filter {
    fn new(task: &TaskConfig, step: FilterStep) -> Result<Self> {
        Ok(match step {
            FilterStep::Regex {
                regex_pattern,
                group_select,
                fallback,
            } => Self::Regex {
                regex: python::regex(&regex_pattern).map_err(|problem| {
                    Error::Invalid(format!("task `{}`, `filter_list`: {problem}", task.name()))
                })?,
                group_select,
                fallback,
            },
            FilterStep::Template { template } => Self::Template {
                engine: Engine::default(),
                template,
            },
            plain => Self::Plain(plain),
        })
    }

    fn apply(&self, text: &str, doc: &Fields) -> Result<String> {
        Ok(match self {
            Self::Regex {
                regex,
                group_select,
                fallback,
            } => selected(regex, *group_select, text)?.unwrap_or_else(|| fallback.clone()),
            Self::Template { engine, template } => {
                let mut fields = doc.clone();
                fields.insert("response".into(), text.into());
                engine.text(template, &fields).map_err(Error::Invalid)?
            }
            Self::Plain(FilterStep::LastBoxed { fallback }) => {
                latex::last_boxed(text).unwrap_or(fallback).to_owned()
            }
            Self::Plain(FilterStep::InsideDollars) => latex::inside_dollars(text).to_owned(),
            Self::Plain(FilterStep::RemoveWhitespace) => text.trim_start().to_owned(),
            Self::Plain(FilterStep::Lowercase) => text.to_lowercase(),
            Self::Plain(FilterStep::Uppercase) => text.to_uppercase(),
            Self::Plain(FilterStep::Map {
                mapping_dict,
                default_value,
            }) => match mapping_dict.get(text) {
                Some(value) => python::text_of(value),
                None => default_value.clone().unwrap_or_else(|| "None".into()),
            },
            Self::Plain(_) => text.to_owned(),
        })
    }
}

/// Of all matches the chosen one: whole, or its first group that is not empty.
fn selected(regex: &Regex, select: i64, text: &str) -> Result<Option<String>> {
    let mut found = Vec::new();
    for captures in regex.captures_iter(text) {
        let captures =
            captures.map_err(|e| Error::Invalid(format!("a filter's pattern fails: {e}")))?;
        let groups = captures
            .iter()
            .skip(1)
            .flatten()
            .map(|group| group.as_str());
        found.push(match captures.len() {
            1 => captures.get(0).map(|whole| whole.as_str().to_owned()),
            // A pattern with one group gives the group, though it be empty.
            2 => Some(
                captures
                    .get(1)
                    .map_or(String::new(), |group| group.as_str().to_owned()),
            ),
            _ => groups
                .filter(|group| !group.is_empty())
                .map(str::to_owned)
                .next(),
        });
    }
    let place = match usize::try_from(select) {
        Ok(place) => Some(place),
        Err(_) => found.len().checked_sub(select.unsigned_abs() as usize),
    };
    let chosen = place
        .and_then(|place| found.into_iter().nth(place))
        .flatten();
    Ok(chosen.map(|text| text.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_select_as_the_harness_does() {
        let select =
            |pattern: &str, n, text| selected(&python::regex(pattern).unwrap(), n, text).unwrap();
        let number = r"#### (\-?[0-9\.\,]+)";
        assert_eq!(
            select(number, 0, "so #### 1,2 #### 3").as_deref(),
            Some("1,2")
        );
        assert_eq!(select(number, 0, "so 12"), None);
        let any = r"(-?[$0-9.,]{2,})|(-?[0-9]+)";
        assert_eq!(select(any, -1, "first 12, then 7").as_deref(), Some("7"));
        assert_eq!(
            select(any, 0, "first $12.50, then 7").as_deref(),
            Some("$12.50,")
        );
        assert_eq!(select("(a)|(b)|c", 0, "c"), None);
        assert_eq!(select("a ?", -1, "a a ").as_deref(), Some("a"));
        assert_eq!(select("a", 5, "a"), None);
    }
}
