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
        "layers" => layers(rest),
        "quality" | "usage" | "scale" | "methods" => binary::run(&["bench", which], rest),
        _ => Err(format!(
            "no bench `{which}`; use `kernels`, `layers`, `quality`, `usage`, `scale` or `methods`"
        )),
    }
}

/// Times layers of experts on the CPU, of all models or of those that are named, beside PyTorch and transformers where there are.
fn layers(arguments: &[String]) -> Outcome {
    let benches = ["bench", "--workspace", "--bench", "layers", "--"];
    let mut bench = shell::cargo(&benches);
    bench.arg("--out").arg(shell::target().join("layers"));
    match shell::python("torch, transformers", "torch and transformers") {
        Ok(python) => {
            let script = shell::root().join("xtask/src/cpu_peers.py");
            bench.arg("--peers").arg(python).arg(script);
        }
        Err(reason) => eprintln!("SKIPPED the comparison with others: {reason}"),
    }
    bench.args(arguments);
    shell::replace(bench)
}
