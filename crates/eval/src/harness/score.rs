//! What the results of a document's requests say of it.

use super::filters::Filters;
use super::metrics::{Kind, Metric, Unit, Value};
use super::work::{Found, Place, RowScore};
use crate::{Error, Result};
use lightmoe_data::harness::{Item, NO_FILTER, OutputType, TaskConfig, python};
use serde_json::Value as Json;

/// One document under one chain of filters.
pub(super) struct Scored {
    /// Number of the document.
    pub(super) number: usize,
    /// What the model gave to each request, as the harness writes it.
    pub(super) responses: Vec<Json>,
    /// The same filtered.
    pub(super) filtered: Vec<Json>,
    /// By metric.
    pub(super) values: Vec<Value>,
}

/// How the documents of a task are scored.
pub(super) struct Scorer<'a> {
    pub(super) task: &'a TaskConfig,
    pub(super) metrics: &'a [Metric],
    pub(super) filters: &'a Filters,
}

impl Scorer<'_> {
    /// The names of the chains of filters.
    pub(super) fn chains(&self) -> Vec<&str> {
        match self.task.output_type() {
            OutputType::GenerateUntil => self.filters.names().collect(),
            // Likelihoods are not filtered.
            _ => vec![NO_FILTER],
        }
    }

    /// Scores a document under chain `chain`; nothing if a request was not done.
    ///
    /// # Errors
    /// If the document names no choice, or a pattern takes too many steps.
    pub(super) fn score(
        &self,
        (number, item): (usize, &Item),
        places: &[Place],
        found: &Found,
        chain: usize,
    ) -> Result<Option<Scored>> {
        if self.task.output_type() == OutputType::GenerateUntil {
            let answers = places.iter().map(|place| found.answer(place));
            let Some(answers) = answers.collect::<Option<Vec<&str>>>() else {
                return Ok(None);
            };
            let answer = answers.first().copied().unwrap_or_default();
            let filtered = self.filters.apply(chain, answer)?;
            let values = self.metrics.iter().map(|metric| self.answer_value(metric, item, &filtered));
            return Ok(Some(Scored {
                number,
                responses: vec![Json::from(vec![answer])],
                values: values.collect::<Result<_>>()?,
                filtered: vec![filtered.into()],
            }));
        }
        let scores = places.iter().map(|place| found.score(place));
        let Some(scores) = scores.collect::<Option<Vec<RowScore>>>() else {
            return Ok(None);
        };
        let values = self.metrics.iter().map(|metric| self.likelihood_value(metric, item, &scores));
        let values = values.collect::<Result<Vec<Value>>>()?;
        // As Python writes them.
        let written = |score: &RowScore| match self.task.output_type() {
            OutputType::LoglikelihoodRolling => Json::from(score.log_likelihood.to_string()),
            _ => Json::from(vec![
                score.log_likelihood.to_string(),
                python::text_of(&Json::from(score.greedy)),
            ]),
        };
        Ok(Some(Scored {
            number,
            responses: scores.iter().map(|score| Json::from(vec![written(score)])).collect(),
            filtered: scores.iter().map(written).collect(),
            values,
        }))
    }

    fn answer_value(&self, metric: &Metric, item: &Item, answer: &str) -> Result<Value> {
        let Kind::ExactMatch(cleaning) = &metric.kind else {
            return Err(Error::Invalid(format!("metric `{}` needs likelihoods", metric.name)));
        };
        let targets = match (&item.target, self.right(item)?) {
            (_, Some(right)) => vec![item.choices[right].clone()],
            (Json::Array(list), None) => list.iter().map(python::text_of).collect(),
            (other, None) => vec![python::text_of(other)],
        };
        for target in targets {
            if cleaning.is_same(answer, &target)? {
                return Ok(Value::One(1.0));
            }
        }
        Ok(Value::One(0.0))
    }

    fn likelihood_value(&self, metric: &Metric, item: &Item, scores: &[RowScore]) -> Result<Value> {
        let share = |is_right: bool| Value::One(f64::from(u8::from(is_right)));
        let first = scores.first().copied().ok_or(Error::Empty)?;
        let is_choice = self.task.output_type() == OutputType::MultipleChoice;
        Ok(match &metric.kind {
            Kind::Accuracy if !is_choice => share(first.greedy),
            Kind::Accuracy => share(self.is_right(item, highest(scores.iter().map(likelihood)))?),
            Kind::AccuracyByLength => {
                // In characters, as the harness has it, whatever its documents say of bytes.
                let lengths = item.choices.iter().map(|choice| choice.chars().count() as f64);
                let per_length = scores.iter().zip(lengths).map(|(s, n)| likelihood(s) / n);
                share(self.is_right(item, highest(per_length))?)
            }
            Kind::Likelihood => Value::One(first.log_likelihood),
            Kind::PerUnit(unit) => Value::Of(first.log_likelihood, match unit {
                Unit::Words => words(&item.counted) as f64,
                Unit::Bytes => item.counted.len() as f64,
                Unit::Tokens => first.tokens as f64,
            }),
            Kind::ExactMatch(_) => {
                return Err(Error::Invalid(format!("metric `{}` needs an answer", metric.name)));
            }
        })
    }

    /// Whether choice `chosen` is right: one of several, if the target is a list.
    fn is_right(&self, item: &Item, chosen: Option<usize>) -> Result<bool> {
        if let Json::Array(list) = &item.target
            && item.right_prompt.is_none()
        {
            let numbers = list.iter().map(|target| number_of(target, &item.choices));
            return Ok(numbers.flatten().any(|right| Some(right) == chosen));
        }
        Ok(chosen.is_some() && chosen == self.right(item)?)
    }

    /// The right choice, where there are choices.
    fn right(&self, item: &Item) -> Result<Option<usize>> {
        if item.choices.is_empty() {
            return Ok(None);
        }
        let right = match item.right_prompt {
            Some(right) => Some(right).filter(|right| *right < item.choices.len()),
            None => number_of(&item.target, &item.choices),
        };
        right.map(Some).ok_or_else(|| Error::Document {
            path: item.doc.path.clone(),
            line: item.doc.line,
            message: format!(
                "the right choice is {}, which is none of {} choices; correct the row, or \
                 `doc_to_target` in the task",
                item.target,
                item.choices.len()
            ),
        })
    }
}

/// The number of a choice that is given by number or by text.
fn number_of(target: &Json, choices: &[String]) -> Option<usize> {
    match target {
        Json::Number(number) => number.as_u64().map(|n| n as usize).filter(|n| *n < choices.len()),
        Json::Bool(number) => Some(usize::from(*number)).filter(|n| *n < choices.len()),
        other => choices.iter().position(|choice| *choice == python::text_of(other)),
    }
}

fn likelihood(score: &RowScore) -> f64 {
    score.log_likelihood
}

/// The first of the highest.
fn highest(values: impl Iterator<Item = f64>) -> Option<usize> {
    let best = values.enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map(|(number, _)| number)
}

/// Pieces between white space, as Python's `re.split(r"\s+", text)` counts them: a text that begins or
/// ends with white space has an empty piece there.
fn words(text: &str) -> usize {
    let mut words = 1;
    let mut was_space = false;
    for c in text.chars() {
        words += usize::from(c.is_whitespace() && !was_space);
        was_space = c.is_whitespace();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_python_splits() {
        for (text, count) in [("", 1), ("a", 1), (" a  b\n", 4), ("a \n b", 2), ("\n", 2)] {
            assert_eq!(words(text), count, "{text:?}");
        }
    }

    #[test]
    fn the_first_of_equals_is_the_highest() {
        assert_eq!(highest([-2.0, -1.0, -1.0].into_iter()), Some(1));
        assert_eq!(highest([f64::NEG_INFINITY].into_iter()), Some(0));
        assert_eq!(highest(std::iter::empty()), None);
    }
}
