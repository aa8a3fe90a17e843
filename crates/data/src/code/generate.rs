//! Draws programs of the toy language, and items from them.

use std::fmt::Write as _;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::HOLE;
use super::run::{execute, run};
use super::syntax::parse;
use crate::Example;
use crate::rng::pick;
use crate::task::Draft;

const VARIABLES: [&str; 6] = ["a", "b", "c", "x", "y", "z"];
const COMPARISONS: [&str; 4] = ["<", ">", "==", "!="];

/// A program under construction.
struct Program {
    /// All lines but the last, without a line break at the end.
    body: String,
    /// Variables that hold a value at the end.
    variables: Vec<&'static str>,
    /// The last line: what is printed.
    last: String,
}

impl Program {
    fn source(&self) -> String {
        format!("{}\n{}", self.body, self.last)
    }
}

/// One item. Its key is the complete program.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Draft {
    let hole = rng.random_range(0..10) < 3;
    loop {
        let program = program(rng);
        let source = program.source();
        let Some(output) = run(&source).filter(|output| is_small(output)) else {
            continue;
        };
        let example = match hole {
            false => Some(Example::new(format!("Program:\n{source}\nOutput:"), output)),
            true if rng.random_range(0..2) == 0 => cut_line(&program, &output),
            true => cut_number(rng, &program, &output),
        };
        if let Some(example) = example {
            return Draft {
                worked: worked(&program),
                key: source,
                example,
            };
        }
    }
}

/// The program with the value of every variable before the last line, and its output.
fn worked(program: &Program) -> Option<String> {
    let mut text = format!("Program:\n{}", program.body);
    for variable in &program.variables {
        let value = run(&format!("{}\nprint({variable})", program.body))?;
        let _ = write!(text, "\n# {variable} = {value}");
    }
    let output = run(&program.source())?;
    Some(format!("{text}\n{}\nOutput: {output}", program.last))
}

/// Whether an output is one number from 0 to 99.
fn is_small(output: &str) -> bool {
    output.len() <= 2 && output.parse::<u32>().is_ok()
}

fn completion(source: &str, output: &str, missing: String) -> Example {
    Example::new(
        format!("Program:\n{source}\nOutput: {output}\nMissing:"),
        missing,
    )
}

/// Leaves out the last line, if no other simple last line prints the same.
fn cut_line(program: &Program, output: &str) -> Option<Example> {
    let prints = |last: &str| {
        run(&format!("{}\n{last}", program.body)).is_some_and(|printed| printed == output)
    };
    let [first, .., second] = program.variables.as_slice() else {
        return None;
    };
    let candidates = [
        format!("print({first})"),
        format!("print({second})"),
        format!("print({first} + {second})"),
        format!("print({first} - {second})"),
        format!("print({second} - {first})"),
        format!("print({first} * {second})"),
    ];
    let mut fitting = candidates.into_iter().filter(|last| prints(last));
    let only = fitting.next().filter(|_| fitting.next().is_none())?;
    Some(completion(
        &format!("{}\n{HOLE}", program.body),
        output,
        only,
    ))
}

/// Leaves out one number, if no other number up to 99 prints the same.
fn cut_number(rng: &mut ChaCha8Rng, program: &Program, output: &str) -> Option<Example> {
    let source = program.source();
    let starts: Vec<usize> = source
        .match_indices(|c: char| c.is_ascii_digit())
        .map(|(at, _)| at)
        .filter(|&at| at == 0 || !source.as_bytes()[at - 1].is_ascii_digit())
        .collect();
    if starts.is_empty() {
        return None;
    }
    let start = *pick(rng, &starts);
    let length = source[start..]
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(source.len() - start);
    let (before, after) = (&source[..start], &source[start + length..]);
    let holed = format!("{before}{HOLE}{after}");
    let parsed = parse(&holed)?;
    let wanted = output.parse().ok();
    let prints = |number: &i64| match execute(&parsed, Some(*number)).as_deref() {
        Some([printed]) => Some(*printed) == wanted,
        _ => false,
    };
    let is_unique = (0..=99).filter(prints).nth(1).is_none();
    is_unique.then(|| {
        let missing = source[start..start + length].to_string();
        completion(&holed, output, missing)
    })
}

fn program(rng: &mut ChaCha8Rng) -> Program {
    match rng.random_range(0..4) {
        0 => straight(rng),
        1 => branch(rng),
        2 => accumulate(rng),
        _ => function(rng),
    }
}

/// Two distinct variables.
fn two(rng: &mut ChaCha8Rng) -> (&'static str, &'static str) {
    let index = rand::seq::index::sample(rng, VARIABLES.len(), 2);
    (VARIABLES[index.index(0)], VARIABLES[index.index(1)])
}

/// `operand op operand`, the first one a variable.
fn operation(rng: &mut ChaCha8Rng, left: &str, other: &str) -> String {
    match rng.random_range(0..6) {
        0 | 1 => format!("{left} + {}", rng.random_range(1..=5)),
        2 => format!("{left} - {}", rng.random_range(1..=5)),
        3 => format!("{left} * {}", rng.random_range(2..=3)),
        _ if left == other => format!("{left} + {left}"),
        4 => format!("{left} + {other}"),
        _ => format!("{left} - {other}"),
    }
}

fn print_of(rng: &mut ChaCha8Rng, first: &str, second: &str) -> String {
    match rng.random_range(0..5) {
        0 | 1 => format!("print({first})"),
        2 => format!("print({second})"),
        3 => format!("print({first} + {second})"),
        _ => format!("print({second} - {first})"),
    }
}

/// Assignments only.
fn straight(rng: &mut ChaCha8Rng) -> Program {
    let (p, q) = two(rng);
    let mut body = format!("{p} = {}", rng.random_range(1..=9));
    let second = operation(rng, p, p);
    let _ = write!(body, "\n{q} = {second}");
    for _ in 0..rng.random_range(1..=2) {
        let (target, other) = if rng.random_range(0..2) == 0 {
            (p, q)
        } else {
            (q, p)
        };
        let _ = write!(body, "\n{target} = {}", operation(rng, target, other));
    }
    Program {
        body,
        variables: vec![p, q],
        last: print_of(rng, p, q),
    }
}

/// A comparison and two branches.
fn branch(rng: &mut ChaCha8Rng) -> Program {
    let (p, q) = two(rng);
    let (first, second) = (rng.random_range(0..=9), rng.random_range(0..=9));
    let comparison = pick(rng, &COMPARISONS);
    let right = match rng.random_range(0..2) {
        0 => q.to_string(),
        _ => rng.random_range(0..=9).to_string(),
    };
    let (then, otherwise) = (operation(rng, p, q), operation(rng, p, q));
    Program {
        body: format!(
            "{p} = {first}\n{q} = {second}\nif {p} {comparison} {right}:\n    {p} = {then}\nelse:\n    {p} = {otherwise}"
        ),
        variables: vec![p, q],
        last: print_of(rng, p, q),
    }
}

/// A loop that sums.
fn accumulate(rng: &mut ChaCha8Rng) -> Program {
    let (p, q) = two(rng);
    let (start, step) = (rng.random_range(0..=9), rng.random_range(1..=5));
    let added = match rng.random_range(0..3) {
        0 => format!("{p} + i"),
        1 => format!("{p} + {q}"),
        _ => format!("{p} + {}", rng.random_range(1..=5)),
    };
    Program {
        body: format!(
            "{p} = {start}\n{q} = {step}\nfor i in range({}):\n    {p} = {added}",
            rng.random_range(2..=3)
        ),
        variables: vec![p, q],
        last: print_of(rng, p, q),
    }
}

/// A function and a call of it.
fn function(rng: &mut ChaCha8Rng) -> Program {
    let (p, q) = two(rng);
    let name = *pick(rng, &["f", "g", "h"]);
    let argument = rng.random_range(0..=9);
    let inner = operation(rng, p, p);
    let (body, last) = match rng.random_range(0..3) {
        0 => (
            format!("def {name}({p}):\n    return {inner}\n{q} = {name}({argument})"),
            format!("print({q} + {})", rng.random_range(1..=5)),
        ),
        1 => (
            format!("def {name}({p}):\n    {p} = {inner}\n    return {p} + 1\n{q} = {argument}"),
            format!("print({name}({q}))"),
        ),
        _ => (
            format!("def {name}({p}, {q}):\n    return {}", operation(rng, p, q)),
            format!("print({name}({argument}, {}))", rng.random_range(0..=9)),
        ),
    };
    Program {
        body,
        variables: Vec::new(),
        last,
    }
}
