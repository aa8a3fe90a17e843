//! What the results of a document's requests say of it.

use super::filters::Filters;
use super::found::{Found, Place, RowScore};
use super::metrics::{Kind, Metric, Unit, Value};
use super::programs::{Verdicts, pass_at_k, program};
use super::sample::Response;
use crate::{Error, Result};
use lightmoe_data::harness::{Item, NO_FILTER, OutputType, TaskConfig, python};
use serde_json::Value as Json;

/// One document under one chain of filters.
pub(super) struct Scored {
    /// Number of the document.
    pub(super) number: usize,
    /// What the model gave to each request, as the harness writes it.
    pub(super) responses: Vec<Vec<Response>>,
    /// The same filtered.
    pub(super) filtered: Vec<Response>,
    /// By metric.
    pub(super) values: Vec<Value>,
}

/// How the documents of a task are scored.
pub(super) struct Scorer<'a> {
    pub(super) task: &'a TaskConfig,
    pub(super) metrics: &'a [Metric],
    pub(super) filters: &'a Filters,
    pub(super) verdicts: &'a Verdicts,
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
            let Some(answers) = places.first().and_then(|place| found.answers(place)) else {
                return Ok(None);
            };
            let filtered = self.filtered(item, &answers, chain)?;
            let values = self
                .metrics
                .iter()
                .map(|metric| self.answer_value(metric, item, &filtered));
            let values: Option<Vec<Value>> = values.collect::<Result<_>>()?;
            let one = |answer: &&str| Response::One((*answer).to_owned());
            return Ok(values.map(|values| Scored {
                number,
                responses: vec![answers.iter().map(one).collect()],
                values,
                filtered: vec![match self.filters.takes_first(chain) {
                    true => Response::One(filtered.into_iter().next().unwrap_or_default()),
                    false => Response::Several(filtered),
                }],
            }));
        }
        let scores = places.iter().map(|place| found.score(place));
        let Some(scores) = scores.collect::<Option<Vec<RowScore>>>() else {
            return Ok(None);
        };
        let values = self
            .metrics
            .iter()
            .map(|metric| self.likelihood_value(metric, item, &scores));
        let values = values.collect::<Result<Vec<Value>>>()?;
        // As Python writes them.
        let written = |score: &RowScore| match self.task.output_type() {
            OutputType::LoglikelihoodRolling => Response::One(score.log_likelihood.to_string()),
            _ => Response::Several(vec![
                score.log_likelihood.to_string(),
                python::text_of(&Json::from(score.greedy)),
            ]),
        };
        Ok(Some(Scored {
            number,
            responses: scores.iter().map(|score| vec![written(score)]).collect(),
            filtered: scores.iter().map(written).collect(),
            values,
        }))
    }

    /// What chain `chain` takes from each of a document's answers.
    fn filtered(&self, item: &Item, answers: &[&str], chain: usize) -> Result<Vec<String>> {
        let filtered = answers
            .iter()
            .map(|answer| self.filters.apply(chain, answer, item));
        filtered.collect()
    }

    /// The programs that verdicts are needed for: of all chains, if a metric asks for them.
    pub(super) fn programs(
        &self,
        item: &Item,
        places: &[Place],
        found: &Found,
    ) -> Result<Vec<String>> {
        let answers = places.first().and_then(|place| found.answers(place));
        let mut programs = Vec::new();
        if let Some(answers) = answers.filter(|_| self.metrics.iter().any(super::runs_programs)) {
            let tests = python::text_of(&item.target);
            for chain in 0..self.chains().len() {
                let filtered = self.filtered(item, &answers, chain)?;
                programs.extend(filtered.iter().map(|answer| program(answer, &tests)));
            }
        }
        Ok(programs)
    }

    /// A metric of a document's answers, of which most need the first only; nothing if a program was
    /// not run.
    fn answer_value(
        &self,
        metric: &Metric,
        item: &Item,
        answers: &[String],
    ) -> Result<Option<Value>> {
        let answer = answers.first().map_or("", String::as_str);
        let targets = targets(item);
        let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
        if targets.is_empty() {
            return Err(Error::Document {
                path: item.doc.path.clone(),
                line: item.doc.line,
                message: "the target is an empty list; give it one text or more".into(),
            });
        }
        Ok(Some(match &metric.kind {
            Kind::ExactMatch(cleaning) => {
                let mut is_right = false;
                for target in targets {
                    is_right |= cleaning.is_same(answer, target)?;
                }
                Value::One(f64::from(u8::from(is_right)))
            }
            Kind::Rouge(rouge) => Value::One(rouge.score(answer, &targets)),
            Kind::Corpus(metric) => Value::Counts(metric.counts(answer, &targets)),
            Kind::Passes(k) => {
                let tests = python::text_of(&item.target);
                let verdicts = answers
                    .iter()
                    .map(|answer| self.verdicts.of(&program(answer, &tests)));
                let Some(verdicts) = verdicts.collect::<Option<Vec<bool>>>() else {
                    return Ok(None);
                };
                let passed = verdicts.iter().filter(|passed| **passed).count();
                Value::One(pass_at_k(verdicts.len(), passed, *k))
            }
            _ => {
                return Err(Error::Invalid(format!(
                    "metric `{}` needs likelihoods",
                    metric.name
                )));
            }
        }))
    }

    fn likelihood_value(&self, metric: &Metric, item: &Item, scores: &[RowScore]) -> Result<Value> {
        let share = |is_right: bool| Value::One(f64::from(u8::from(is_right)));
        let is_right =
            |chosen: Option<usize>| share(chosen.is_some_and(|n| item.right.contains(&n)));
        let first = scores.first().copied().ok_or(Error::Empty)?;
        let is_choice = self.task.output_type() == OutputType::MultipleChoice;
        Ok(match &metric.kind {
            Kind::Accuracy if !is_choice => share(first.greedy),
            Kind::Accuracy => is_right(highest(scores.iter().map(likelihood))),
            Kind::AccuracyByLength => {
                // In characters, as the harness has it, whatever its documents say of bytes.
                let lengths = item
                    .choices
                    .iter()
                    .map(|choice| choice.chars().count() as f64);
                let per_length = scores.iter().zip(lengths).map(|(s, n)| likelihood(s) / n);
                is_right(highest(per_length))
            }
            Kind::Likelihood => Value::One(first.log_likelihood),
            Kind::PerUnit(unit) => Value::Of(
                first.log_likelihood,
                match unit {
                    Unit::Words => words(&item.counted) as f64,
                    Unit::Bytes => item.counted.len() as f64,
                    Unit::Tokens => first.tokens as f64,
                },
            ),
            Kind::ExactMatch(_) | Kind::Rouge(_) | Kind::Corpus(_) | Kind::Passes(_) => {
                return Err(Error::Invalid(format!(
                    "metric `{}` needs an answer",
                    metric.name
                )));
            }
        })
    }
}

/// The texts that are right answers to a document.
pub(super) fn targets(item: &Item) -> Vec<String> {
    match (&item.target, item.right.as_slice()) {
        (Json::Array(list), []) => list.iter().map(python::text_of).collect(),
        (other, []) => vec![python::text_of(other)],
        (_, right) => right.iter().map(|&n| item.choices[n].clone()).collect(),
    }
}

fn likelihood(score: &RowScore) -> f64 {
    score.log_likelihood
}

/// The first of the highest.
fn highest(values: impl Iterator<Item = f64>) -> Option<usize> {
    let best = values
        .enumerate()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
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
