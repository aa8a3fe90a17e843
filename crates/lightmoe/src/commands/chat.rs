//! `chat`: a conversation in the terminal, or one turn a line from elsewhere.

use crate::cli::ChatArgs;
use crate::device;
use crate::pipeline::load_model;
use crate::preflight::Refused;
use crate::progress;
use crate::source::open_model;
use crate::speak::{Answer, Speaker};
use anyhow::{Context, Result, ensure};
use lightmoe_models::{ChatMessage, ModelTokenizer};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::fs;
use std::io::{self, IsTerminal, Stdin, Write};

/// What may be said to the program itself.
const HELP: &str = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer";

/// `chat`
///
/// # Errors
/// [`Refused`] if the model has no chat template, or it does not work; what the model brings.
pub fn run_chat(args: ChatArgs) -> Result<String> {
    let checkpoint = open_model(&args.model)?;
    let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
    let tokenizer = match &args.chat_template {
        Some(path) => {
            let template = fs::read_to_string(path);
            let unread = |e| Refused(format!("cannot read `{}` ({e})", path.display()));
            tokenizer.with_template(template.map_err(unread)?)
        }
        None => tokenizer,
    };
    if tokenizer.template().is_none() {
        let message = format!(
            "`{}` has no chat template, as models have that are trained on text alone; give one with \
             `--chat-template FILE.jinja`, or let `lightmoe generate` continue a text",
            args.model
        );
        return Err(Refused(message).into());
    }
    let system = args.system.map(|text| message("system", text));
    let mut conversation: Vec<ChatMessage> = system.into_iter().collect();
    let begin = conversation.len();
    // Before anything is said, so that a template without a system role is told of at once.
    let question = [conversation.clone(), vec![message("user", "?".into())]].concat();
    tokenizer.chat(&question).map_err(Refused::of)?;

    device::choose(&args.place.device, &args.place.dtype)?;
    let model = load_model(&checkpoint)?;
    let mut speaker = Speaker::new(&*model, &tokenizer, args.speak);
    let mut input = Input::open()?;
    progress::end_when_terminated()?;
    ensure!(!progress::stopped(), "interrupted while the model was read");
    while let Some(line) = input.line()? {
        match line.trim() {
            "" => {}
            "/quit" => break,
            "/reset" => conversation.truncate(begin),
            command if command.starts_with('/') => {
                progress::say(&format!("`{command}` is no command; {HELP}"));
            }
            question => {
                conversation.push(message("user", question.to_owned()));
                match answer(&mut speaker, &tokenizer, &conversation) {
                    Ok(answer) => {
                        progress::say(&answer.to_string());
                        conversation.push(message("assistant", answer.text));
                    }
                    // Whoever is there can go on without the question.
                    Err(error) if input.is_terminal() => {
                        progress::say(&format!("error: {error:#}; {HELP}"));
                        conversation.pop();
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(String::new())
}

fn answer(
    speaker: &mut Speaker<'_>,
    tokenizer: &ModelTokenizer,
    conversation: &[ChatMessage],
) -> Result<Answer> {
    // A Ctrl-C of before is not meant for this answer.
    progress::forget_interrupt();
    let prompt = tokenizer.chat(conversation)?;
    let mut out = io::stdout().lock();
    let answer = speaker.answer(&prompt, &mut out)?;
    writeln!(out).context("cannot write the answer")?;
    Ok(answer)
}

fn message(role: &str, content: String) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content,
    }
}

/// Where the turns come from.
enum Input {
    /// A person.
    Terminal(Box<DefaultEditor>),
    /// A pipe or a file: one turn a line.
    Lines(Stdin),
}

impl Input {
    fn open() -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Lines(io::stdin()));
        }
        progress::say(HELP);
        let editor = DefaultEditor::new().context("cannot use the terminal")?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line; none at the end.
    fn line(&mut self) -> Result<Option<String>> {
        // An answer that was cut off comes back here; the terminal is not to be changed any more.
        progress::rest_when_terminated();
        match self {
            Self::Lines(input) => {
                let mut line = String::new();
                let read = input
                    .read_line(&mut line)
                    .context("cannot read the input")?;
                Ok((read > 0).then_some(line))
            }
            Self::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        editor.add_history_entry(&line)?;
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    // Drops the line.
                    Err(ReadlineError::Interrupted) => progress::say(HELP),
                    Err(error) => return Err(error).context("cannot read from the terminal"),
                }
            },
        }
    }
}
