//! `generate` and `chat`.

use crate::support::{Outcome, base, command, model_copy};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};

fn generate(arguments: &[&str]) -> Command {
    let mut call = command("generate");
    call.args(["--prompt", "Compute 3 + 4.\n"]).args(arguments);
    call
}

/// A conversation with these turns; standard output and error.
fn chat(arguments: &[&str], turns: &str) -> (String, String) {
    let mut call = Command::new(env!("CARGO_BIN_EXE_lightmoe"));
    call.arg("chat").args(arguments).stdin(Stdio::piped());
    let mut child = call
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(turns.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    (String::from_utf8(output.stdout).unwrap(), error)
}

#[test]
fn the_options_of_sampling_count() {
    let text = |arguments: &[&str]| generate(&[&["--max-tokens", "24"], arguments].concat()).ok();
    let greedy = text(&[]);
    let drawn = ["--temperature", "3", "--seed", "1"];
    let with = |more: &[&str]| text(&[&drawn[..], more].concat());
    assert_eq!(with(&[]), with(&[]));
    assert_ne!(with(&[]), greedy);
    assert_ne!(with(&[]), text(&["--temperature", "3", "--seed", "2"]));
    // The likeliest token alone is what greedy decoding takes.
    assert_eq!(with(&["--top-k", "1"]), greedy);
    assert_eq!(with(&["--top-p", "1e-6"]), greedy);
    assert_eq!(with(&["--top-k", "8", "--top-p", "1e-6"]), greedy);
    assert_ne!(with(&["--top-k", "2"]), with(&["--top-k", "200"]));
    for wrong in [
        ["--top-k", "0"],
        ["--top-p", "1.5"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--stop", ""],
    ] {
        let message = generate(&[]).args(wrong).fails(2);
        assert!(message.contains(wrong[0]), "{message}");
    }
    let message = command("generate").args(["--prompt", ""]).fails(2);
    assert!(message.contains("--prompt"), "{message}");
}

#[test]
fn a_text_ends_where_it_should_and_its_speed_is_told() {
    let text = generate(&["--max-tokens", "40"]).ok();
    let word = text.split_whitespace().nth(1).unwrap();
    let cut = generate(&["--max-tokens", "40", "--stop", word, "--stop", "never"]).ok();
    assert_eq!(cut.trim_end(), text.split(word).next().unwrap().trim_end());
    let mut loud = Command::new(env!("CARGO_BIN_EXE_lightmoe"));
    loud.args([
        "generate",
        "--prompt",
        "Compute 3 + 4.\n",
        "--max-tokens",
        "5",
    ]);
    let output = loud.output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("tokens/s") && told.contains("prompt read in"),
        "{told}"
    );
}

#[test]
fn a_conversation_goes_on_and_begins_anew() {
    let turns = "Compute 3 + 4.\n\n  \nCompute 5 + 4.\n/nothing\n/reset\nCompute 3 + 4.\n/quit\nnever read\n";
    let (said, told) = chat(&["--max-tokens", "12"], turns);
    let alone = chat(&["--max-tokens", "12"], "Compute 3 + 4.\n").0;
    assert!(said.starts_with(alone.trim_end()), "{said}");
    assert!(said.trim_end().ends_with(alone.trim()), "{said}");
    let speeds: Vec<&str> = told
        .lines()
        .filter(|line| line.contains("tokens/s"))
        .collect();
    assert_eq!(speeds.len(), 3, "{told}");
    // The second turn reads only what is new.
    assert!(!speeds[0].contains("known"), "{told}");
    assert!(speeds[1].contains("known before"), "{told}");
    assert!(
        told.contains("`/nothing`") && told.contains("/reset"),
        "{told}"
    );
    // What was said before matters, and so does the system.
    assert_ne!(chat(&["--max-tokens", "12"], "Compute 5 + 4.\n").0, said);
    let system = chat(
        &["--system", "Once upon a time", "--max-tokens", "12"],
        "Compute 3 + 4.\n",
    );
    assert_ne!(system.0, alone);
    // A compressed model speaks as well.
    let model = base().join("model");
    let model = ["--model", model.to_str().unwrap(), "--max-tokens", "4"];
    assert!(!chat(&model, "hello\n").0.trim().is_empty());
}

#[test]
fn what_cannot_speak_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_copy(&folder.path().join("model"));
    fs::write(
        model.join("tokenizer_config.json"),
        r#"{"eos_token": "<|endoftext|>"}"#,
    )
    .unwrap();
    let refused = |arguments: &[&str], said: &[&str]| {
        let mut call = command("chat");
        let message = call.arg("--model").arg(&model).args(arguments).fails(2);
        for part in said {
            assert!(message.contains(part), "{part}: {message}");
        }
    };
    refused(&[], &["no chat template", "--chat-template", "generate"]);
    refused(&["--chat-template", "nowhere.jinja"], &["nowhere.jinja"]);
    let template = |text: &str| {
        let path = folder.path().join("template.jinja");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let picky = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}\
                 {% endif %}{{ m.content }}\n{% endfor %}";
    let path = template(picky);
    refused(&["--chat-template", &path, "--system", "x"], &["no system"]);
    let model = model.to_str().unwrap();
    let own = [
        "--model",
        model,
        "--chat-template",
        &path,
        "--max-tokens",
        "3",
    ];
    assert!(!chat(&own, "Compute 3 + 4.\n").0.is_empty());
    // From a pipe, what cannot be answered ends it.
    let mut call = command("chat");
    let mut child = call
        .args(own)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let long = "many words ".repeat(2000);
    let _ = child.stdin.take().unwrap().write_all(long.as_bytes());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("context of 1024"), "{message}");
}

/// Options of a long answer.
const LONG: [&str; 4] = ["--temperature", "9", "--max-tokens", "900"];

/// A conversation that is still going on.
struct Talk {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    told: BufReader<ChildStderr>,
}

impl Talk {
    fn new() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lightmoe"))
            .arg("chat")
            .args(LONG)
            // Read layer by layer it takes its time.
            .args(["--max-memory", "1MB"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take().unwrap(),
            output: child.stdout.take().unwrap(),
            told: BufReader::new(child.stderr.take().unwrap()),
            child,
        }
    }

    /// Asks and waits for the beginning of the answer, of which much is still to come.
    fn ask(&mut self) {
        self.input.write_all(b"go on\n").unwrap();
        self.output.read_exact(&mut [0]).unwrap();
        assert!(self.child.try_wait().unwrap().is_none());
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let kill = Command::new("kill").args([name, &id]).status();
        assert!(kill.unwrap().success());
    }

    /// Waits for the end of an answer; how many tokens it has.
    fn tokens(&mut self) -> usize {
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        line.split(' ').next().unwrap().parse().unwrap()
    }
}

#[test]
fn an_interrupt_stops_the_answer_and_not_the_program() {
    let mut talk = Talk::new();
    talk.ask();
    talk.signal("-INT");
    let stopped = talk.tokens();
    // The whole answer to the same question.
    let whole = chat(&LONG, "go on\n").1;
    let whole: usize = whole.split(' ').next().unwrap().parse().unwrap();
    assert!(stopped < whole, "{stopped} {whole}");
    talk.ask();
    talk.signal("-INT");
    talk.tokens();
    drop(talk.input);
    assert!(talk.child.wait().unwrap().success());
}

#[test]
fn a_conversation_ends_at_once_when_it_is_told_to() {
    let mut talk = Talk::new();
    talk.ask();
    talk.signal("-TERM");
    assert_eq!(talk.child.wait().unwrap().code(), Some(128 + 15));
    // While it waits, too.
    let mut talk = Talk::new();
    talk.ask();
    talk.signal("-INT");
    talk.tokens();
    talk.signal("-TERM");
    assert_eq!(talk.child.wait().unwrap().code(), Some(128 + 15));
}

/// The editor of lines takes the terminal for itself; its user gets it back as it was.
#[test]
fn the_terminal_is_left_as_it_was() {
    for (name, number) in [("-TERM", 15), ("-HUP", 1)] {
        let pair = openpty(None, None).unwrap();
        let of_lines = || {
            let flags = tcgetattr(&pair.slave).unwrap().local_flags;
            flags.contains(LocalFlags::ECHO | LocalFlags::ICANON)
        };
        assert!(of_lines());
        let end = || Stdio::from(pair.slave.try_clone().unwrap());
        let mut child = Command::new(env!("CARGO_BIN_EXE_lightmoe"))
            .arg("chat")
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let mut screen = File::from(pair.master.try_clone().unwrap());
        let (mut shown, mut piece) = (String::new(), [0; 256]);
        while !shown.contains("> ") {
            let read = screen.read(&mut piece).unwrap();
            shown += &String::from_utf8_lossy(&piece[..read]);
        }
        assert!(!of_lines(), "{shown}");
        let id = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &id])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.wait().unwrap().code(), Some(128 + number));
        assert!(of_lines());
    }
}

#[test]
fn speed_is_measured_by_prompts_at_a_time() {
    let speed = |arguments: &[&str]| {
        let mut call = command("bench");
        call.args(["speed", "--model", "olmoe-nano", "--prompt-tokens", "12"]);
        call.args(["--runs", "1", "--prompts", "1,3"])
            .args(arguments);
        call
    };
    let told = speed(&["--new-tokens", "4", "--json"]).ok();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let cases = told["cases"].as_array().unwrap();
    let prompts: Vec<_> = cases.iter().map(|case| case["prompts"].as_u64()).collect();
    assert_eq!(prompts, [Some(1), Some(3)]);
    for case in cases {
        let number = |key: &str| case[key].as_f64().unwrap();
        let all = number("prompts") / number("milliseconds_per_step") * 1e3;
        assert!((number("new_tokens_per_second") / all - 1.0).abs() < 1e-9);
        assert!(number("prompt_tokens_per_second") > 0.0);
    }
    assert!(speed(&["--new-tokens", "2"]).ok().contains("ms/step"));
    let message = speed(&["--new-tokens", "1"]).fails(2);
    assert!(message.contains("--new-tokens"), "{message}");
}
