//! Small Python-like programs, run by an interpreter of our own.
//!
//! Two kinds of item: predict what a program prints (70%), or fill in what is
//! missing from a program whose output is given (30%). All numbers are from 0 to 99.

mod generate;
mod run;
mod syntax;

pub(crate) use generate::draw;
pub use run::run;

/// What stands for the missing part of a program.
pub(crate) const HOLE: &str = "___";

/// Whether `completion` answers `prompt`, a prompt of [`crate::Task::Code`].
///
/// Without a hole it must equal the program's output; with one, the program with
/// `completion` put in must print the required output. A missing line may do so in any
/// way but by numbers of its own: writing down the output is no answer. White space
/// around `completion` is ignored.
pub fn check(prompt: &str, completion: &str) -> bool {
    let completion = completion.trim();
    let Some((program, rest)) = prompt
        .strip_prefix("Program:\n")
        .and_then(|rest| rest.split_once("\nOutput:"))
    else {
        return false;
    };
    if !program.contains(HOLE) {
        return run(program).is_some_and(|output| output == completion);
    }
    let whole_line = program.lines().any(|line| line.trim() == HOLE);
    if whole_line && completion.contains(|c: char| c.is_ascii_digit()) {
        return false;
    }
    let required = rest.lines().next().unwrap_or_default().trim();
    run(&program.replacen(HOLE, completion, 1)).is_some_and(|output| output == required)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream;

    #[test]
    fn output_must_be_equal() {
        let prompt = "Program:\nx = 3\nprint(x + 4)\nOutput:";
        assert!(check(prompt, " 7"));
        assert!(!check(prompt, " 8"));
        assert!(!check(prompt, ""));
    }

    #[test]
    fn a_completion_that_computes_the_output_counts() {
        let prompt = "Program:\nx = 3\ny = 4\n___\nOutput: 7\nMissing:";
        assert!(check(prompt, " print(x + y)"));
        assert!(check(prompt, " print(y + x)"));
        assert!(!check(prompt, " print(x)"));
        assert!(!check(prompt, " x + y"));
        assert!(!check(prompt, " print(7)"));
        assert!(!check(prompt, " print(x + 4)"));
        assert!(!check("Question: 3", "3"));
    }

    #[test]
    fn every_reference_passes_and_another_number_does_not() {
        let mut rng = stream(9, "code", 0, 0);
        let mut completions = 0;
        for _ in 0..2_000 {
            let example = draw(&mut rng).example;
            assert!(
                check(&example.prompt, &example.completion),
                "{}{}",
                example.prompt,
                example.completion
            );
            if let Ok(number) = example.completion.parse::<u32>() {
                assert!(number <= 99);
                assert!(!check(&example.prompt, &(number + 1).to_string()));
            }
            completions += usize::from(example.prompt.contains(HOLE));
        }
        assert!((500..700).contains(&completions), "{completions}");
    }
}
