//! `bench`: how fast the kernels are, and how good the methods are.

use crate::{Outcome, binary, shell};

/// Runs the bench that the first argument names.
pub fn run(arguments: &[String]) -> Outcome {
    let (which, rest) = match arguments.split_first() {
        Some((which, rest)) => (which.as_str(), rest),
        None => ("", arguments),
    };
    match which {
        "kernels" => {
            // The whole workspace, so that dependencies keep the features they are built with.
            let benches = [
                "bench",
                "--workspace",
                "--bench",
                "experts",
                "--bench",
                "decoder",
            ];
            let mut bench = shell::cargo(&benches);
            bench.args(rest);
            shell::replace(bench)
        }
        "quality" | "usage" | "scale" | "methods" => binary::run(&["bench", which], rest),
        _ => Err(format!(
            "no bench `{which}`; use `kernels`, `quality`, `usage`, `scale` or `methods`"
        )),
    }
}
