//! From documents to what the model is asked, as lm-evaluation-harness does it.

use super::config::{OutputType, TaskConfig};
use super::docs::{Doc, read_docs};
use super::fewshot::Examples;
use super::find::Finder;
use super::python::text_of;
use super::repository::Repository;
use super::template::Engine;
use super::texts::{Text, Texts, chosen, right_choices};
use crate::records::Message;
use crate::{Error, Result};
use serde_json::Value;
use std::path::PathBuf;

/// How prompts are made.
#[derive(Clone, Copy, Default)]
pub struct PromptOptions<'a> {
    /// Few-shot examples, instead of the task's own number; a task that says 0 keeps it.
    pub num_fewshot: Option<usize>,
    /// Only the first documents.
    pub limit: Option<usize>,
    /// Seed of the choice of few-shot examples, for each task anew.
    pub seed: u32,
    /// Text before the task's description.
    pub system_instruction: Option<&'a str>,
    /// Prompts become conversations.
    pub chat: Option<Chat<'a>>,
    /// The task's data set, where no folder has its files; under several names, one after the other.
    pub repositories: &'a [Repository],
}

/// How prompts become conversations.
#[derive(Clone, Copy)]
pub struct Chat<'a> {
    /// Renders a conversation up to where the assistant is to speak.
    pub render: &'a dyn Fn(&[Message]) -> Result<String, String>,
    /// Where few-shot examples stand.
    pub turns: Turns,
}

/// Where few-shot examples stand in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turns {
    /// All in the user's one turn, before the question.
    One,
    /// Each in turns of user and assistant.
    Each,
}

/// A document with its requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// The document.
    pub doc: Doc,
    /// What the task says of the answer: a number of a choice, a text, or a list of texts.
    pub target: Value,
    /// Numbers of the right choices, of which there is mostly one; none where there are no choices.
    pub right: Vec<usize>,
    /// The choices.
    pub choices: Vec<String>,
    /// What the model is asked: one request a choice, or one.
    pub requests: Vec<Request>,
    /// The text whose words and bytes perplexities are per.
    pub counted: String,
}

/// What the model is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The likelihood of a continuation.
    Loglikelihood {
        /// What stands before it.
        context: String,
        /// The text whose likelihood is wanted.
        continuation: String,
    },
    /// The likelihood of a text.
    Rolling {
        /// The text.
        text: String,
    },
    /// An answer.
    Generate {
        /// What stands before it.
        context: String,
    },
}

impl Request {
    /// The first argument of the request.
    pub fn context(&self) -> &str {
        match self {
            Self::Loglikelihood { context, .. } | Self::Generate { context } => context,
            Self::Rolling { text } => text,
        }
    }
}

/// The items of a task.
pub struct Prompts {
    /// The items, in the order of the documents.
    pub items: Vec<Item>,
    /// Documents of the split, without the limit.
    pub documents: usize,
    /// Few-shot examples of each prompt.
    pub num_fewshot: usize,
}

/// Reads the documents of a task and makes its requests. `folders` are where data may lie.
///
/// # Errors
/// What [`read_docs`] brings; [`Error::Row`] for a document that the templates cannot be filled
/// from; [`Error::Unusable`] if there are not enough few-shot examples.
pub fn build_prompts(
    task: &TaskConfig,
    folders: &[PathBuf],
    options: &PromptOptions<'_>,
) -> Result<Prompts> {
    let engine = Engine::default();
    let builder = Builder {
        task,
        texts: Texts {
            task,
            engine: &engine,
        },
        options,
    };
    let num_fewshot = match (task.num_fewshot, options.num_fewshot) {
        // Nothing stands before a text that is scored whole.
        _ if task.output_type() == OutputType::LoglikelihoodRolling => 0,
        (Some(0), _) => 0,
        (own, given) => given.or(own).unwrap_or(0),
    };
    let split = task.eval_split().unwrap_or_default();
    let read = |split: &str| {
        read_docs(&Finder {
            task,
            split,
            folders,
            repositories: options.repositories,
            engine: &engine,
        })
    };
    let docs = read(split)?;
    let mut examples = match (num_fewshot, task.examples_split()) {
        (0, _) | (_, None) => None,
        (_, Some(split)) => Some(Examples::new(task, read(split)?, num_fewshot, options.seed)),
    };
    let documents = docs.len();
    if options.limit == Some(0) {
        return Err(Error::Unusable {
            task: task.name().to_owned(),
            problem: "a limit of 0 documents leaves none; use 1 or more".into(),
        });
    }
    let items = docs
        .into_iter()
        .take(options.limit.unwrap_or(usize::MAX))
        .map(|doc| builder.item(doc, examples.as_mut()))
        .collect::<Result<_>>()?;
    Ok(Prompts {
        items,
        documents,
        num_fewshot,
    })
}

struct Builder<'a> {
    task: &'a TaskConfig,
    texts: Texts<'a>,
    options: &'a PromptOptions<'a>,
}

impl Builder<'_> {
    fn item(&self, doc: Doc, examples: Option<&mut Examples>) -> Result<Item> {
        let (texts, fields) = (&self.texts, &doc.fields);
        let fails = |problem| doc.fails(problem);
        let target = texts.target(fields).map_err(fails)?;
        let choices = texts.choices(fields).map_err(fails)?;
        let counted = match &self.task.doc_to_count {
            Some(template) => texts.written(template, fields).map_err(fails)?,
            None => text_of(&target),
        };
        let (mut right, mut requests) = (Vec::new(), Vec::new());
        if self.task.output_type() == OutputType::LoglikelihoodRolling {
            let text = text_of(&target);
            requests.push(Request::Rolling { text });
        } else {
            let text = texts.prompt(fields).map_err(fails)?;
            right = right_choices(&text, &target, &choices).map_err(fails)?;
            let context = self.context(&doc, &text, &self.examples(&doc, examples)?)?;
            requests = self
                .requests(&text, &target, &choices, context)
                .map_err(fails)?;
        }
        Ok(Item {
            doc,
            target,
            right,
            choices,
            requests,
            counted,
        })
    }

    fn examples(&self, doc: &Doc, examples: Option<&mut Examples>) -> Result<Vec<Doc>> {
        let Some(examples) = examples else {
            return Ok(Vec::new());
        };
        // In one turn the harness draws twice and uses the second.
        if self
            .options
            .chat
            .is_some_and(|chat| chat.turns == Turns::One)
        {
            examples.choose(self.task, doc)?;
        }
        examples.choose(self.task, doc)
    }

    fn requests(
        &self,
        text: &Text,
        target: &Value,
        choices: &[String],
        context: String,
    ) -> Result<Vec<Request>, String> {
        let delimiter = match self.options.chat {
            Some(_) => "",
            None => self.task.target_delimiter(),
        };
        let target = text_of(target);
        let pair = |choice: &String| {
            let (context, continuation) = match text {
                Text::Words(_) => (context.clone(), choice.as_str()),
                Text::Choice(_) => (format!("{context}{}", self.turn(choice)?), target.as_str()),
            };
            Ok(Request::Loglikelihood {
                context,
                continuation: format!("{delimiter}{continuation}"),
            })
        };
        match self.task.output_type() {
            OutputType::MultipleChoice => choices.iter().map(pair).collect(),
            OutputType::GenerateUntil => Ok(vec![Request::Generate { context }]),
            OutputType::Loglikelihood | OutputType::LoglikelihoodRolling => {
                Ok(vec![Request::Loglikelihood {
                    context,
                    continuation: target,
                }])
            }
        }
    }

    /// A choice that is a prompt, as a conversation where they are asked for.
    fn turn(&self, choice: &str) -> Result<String, String> {
        match self.options.chat {
            Some(chat) => (chat.render)(&[message("user", choice.to_owned())]),
            None => Ok(choice.to_owned()),
        }
    }

    /// All that stands before the answer.
    fn context(&self, doc: &Doc, text: &Text, examples: &[Doc]) -> Result<String> {
        let fails = |problem| doc.fails(problem);
        let description = self.task.description.as_deref().unwrap_or_default();
        let description = self
            .texts
            .engine
            .text(description, &doc.fields)
            .map_err(fails)?;
        let system = match (self.options.system_instruction, description.is_empty()) {
            (Some(given), false) => {
                format!("{given}{}{description}", self.task.fewshot_delimiter())
            }
            (Some(given), true) => given.to_owned(),
            (None, _) => description,
        };
        let question = match text {
            Text::Words(words) => words.as_str(),
            // The choices themselves follow.
            Text::Choice(_) => "",
        };
        let Some(chat) = self.options.chat else {
            return Ok(format!("{system}{}{question}", self.shots(examples)?));
        };
        let mut messages = Vec::new();
        if !system.is_empty() {
            messages.push(message("system", system));
        }
        match chat.turns {
            Turns::One => {
                let content = self.shots(examples)? + question;
                if !content.is_empty() {
                    messages.push(message("user", content));
                }
            }
            Turns::Each => {
                for example in examples {
                    let (question, answer) = self.shot(example)?;
                    messages.push(message("user", question));
                    messages.push(message("assistant", answer));
                }
                if matches!(text, Text::Words(_)) {
                    messages.push(message("user", question.to_owned()));
                }
            }
        }
        if messages.is_empty() {
            return Ok(String::new());
        }
        (chat.render)(&messages)
            .or_else(|problem| {
                // Some templates know no system role; the harness then leaves it out.
                let others: Vec<Message> = messages
                    .iter()
                    .filter(|m| m.role != "system")
                    .cloned()
                    .collect();
                match others.len() == messages.len() {
                    true => Err(problem),
                    false => (chat.render)(&others),
                }
            })
            .map_err(fails)
    }

    /// Few-shot examples as one text.
    fn shots(&self, examples: &[Doc]) -> Result<String> {
        let mut text = String::new();
        for example in examples {
            let (question, answer) = self.shot(example)?;
            text.push_str(&question);
            if !answer.is_empty() {
                text.push_str(self.task.target_delimiter());
                text.push_str(&answer);
                text.push_str(self.task.fewshot_delimiter());
            }
        }
        Ok(text)
    }

    /// Question and answer of an example.
    fn shot(&self, example: &Doc) -> Result<(String, String)> {
        let build = || {
            let choices = self.texts.choices(&example.fields)?;
            let question = match self.texts.prompt(&example.fields)? {
                Text::Words(words) => words,
                Text::Choice(right) => chosen(&choices, right as i64)?,
            };
            let answer = match self.texts.target(&example.fields)? {
                Value::Array(list) => list.first().map(text_of).unwrap_or_default(),
                Value::Number(n) if self.task.doc_to_choice.is_some() => {
                    chosen(&choices, n.as_i64().unwrap_or(-1))?
                }
                other => text_of(&other),
            };
            Ok((question, answer))
        };
        build().map_err(|problem: String| example.fails(problem))
    }
}

fn message(role: &str, content: String) -> Message {
    Message {
        role: role.to_owned(),
        content,
    }
}
