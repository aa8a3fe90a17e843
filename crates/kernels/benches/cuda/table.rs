//! What was measured, as Markdown.

use serde_json::Value;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The tables of `bench.json`, with those of `peers.json` if it is there.
pub fn print(folder: &Path) -> Outcome<()> {
    let read = |name: &str| -> Outcome<Value> {
        Ok(serde_json::from_str(&fs::read_to_string(
            folder.join(name),
        )?)?)
    };
    let bench = read("bench.json")?;
    let peers = read("peers.json").unwrap_or_default();
    let machine = read("machine.json").unwrap_or_default();
    let table = Table {
        bench: &bench,
        peers: &peers,
        machine: &machine,
    };
    for part in [
        table.head()?,
        table.layers()?,
        table.stages()?,
        table.backward()?,
        table.others()?,
    ] {
        print!("{part}");
    }
    Ok(())
}

struct Table<'a> {
    bench: &'a Value,
    peers: &'a Value,
    /// Where and when the run was.
    machine: &'a Value,
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or("?")
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Three digits, and no more than whole microseconds.
fn micros(us: f64) -> String {
    match us {
        us if us.is_nan() => "–".to_owned(),
        us if us < 10.0 => format!("{us:.2}"),
        us if us < 100.0 => format!("{us:.1}"),
        us => format!("{us:.0}"),
    }
}

impl Table<'_> {
    fn head(&self) -> Outcome<String> {
        let (copy, dense) = (self.copy(), self.dense());
        Ok(format!(
            "{}; GPU: {}; driver {}, which has CUDA {}; copy rate {:.2} TB/s (bytes read and written); dense product of \
             8192³ in bf16 by cuBLAS {:.0} TFLOP/s.\n",
            text(self.machine, "date"),
            text(self.bench, "gpu"),
            text(self.machine, "driver"),
            self.bench["driver"],
            copy / 1e12,
            dense / 1e12
        ))
    }

    fn copy(&self) -> f64 {
        number(self.bench, "copy_bytes_per_second")
    }

    fn dense(&self) -> f64 {
        number(self.bench, "dense_operations_per_second")
    }

    fn cases(&self) -> impl Iterator<Item = &Value> {
        list(&self.bench["cases"])
    }

    /// The case with the same key but for what is replaced.
    fn same(&self, case: &Value, replaced: u64) -> Option<&Value> {
        self.cases().find(|other| {
            ["model", "tokens", "routing"]
                .iter()
                .all(|key| other[*key] == case[*key])
                && other["replaced"] == replaced
        })
    }

    /// Microseconds of the layer, the shares of rates, and how much faster compressed layers are.
    fn layers(&self) -> Outcome<String> {
        let mut out = "\n## Layers\n\n| model | tokens | routing | original µs | of copy rate | of dense rate \
                       | 30 % replaced | 50 % replaced | of copy rate | of dense rate | 75 % replaced |\n\
                       | :--- | ---: | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            .to_owned();
        for case in self.cases().filter(|case| case["replaced"] == 0) {
            let before = number(case, "us");
            let faster = |replaced| {
                let us = self
                    .same(case, replaced)
                    .map_or(f64::NAN, |c| number(c, "us"));
                format!("{} ({:.2}×)", micros(us), before / us)
            };
            let half = self.same(case, 50).unwrap_or(&Value::Null);
            writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                text(case, "model"),
                case["tokens"],
                text(case, "routing"),
                micros(before),
                self.shares(case),
                faster(30),
                faster(50),
                self.shares(half),
                faster(75),
            )?;
        }
        Ok(out)
    }

    /// Two cells: the rates that the least bytes and operations in this time are, as shares.
    fn shares(&self, case: &Value) -> String {
        let us = number(case, "us") * 1e-6;
        let bytes = number(case, "bytes") / us / self.copy();
        let operations = number(case, "operations") / us / self.dense();
        format!("{:.0} % | {:.0} %", bytes * 100.0, operations * 100.0)
    }

    /// Microseconds of the stages of large batches.
    fn stages(&self) -> Outcome<String> {
        const NAMES: [&str; 5] = ["route", "dense", "bases", "adapters", "combine"];
        let mut out = format!(
            "\n## Stages\n\n| model | tokens | routing | replaced | {} |\n",
            NAMES.join(" µs | ") + " µs"
        );
        out += "| :--- | ---: | :--- | ---: | ---: | ---: | ---: | ---: | ---: |\n";
        for case in self.cases().filter(|case| case["stages"].is_object()) {
            let total: f64 = NAMES.iter().map(|name| number(&case["stages"], name)).sum();
            let stage = |name: &&str| {
                let us = number(&case["stages"], name);
                format!("{} ({:.0} %)", micros(us), us / total * 100.0)
            };
            writeln!(
                out,
                "| {} | {} | {} | {} % | {} |",
                text(case, "model"),
                case["tokens"],
                text(case, "routing"),
                case["replaced"],
                NAMES.iter().map(stage).collect::<Vec<_>>().join(" | ")
            )?;
        }
        Ok(out)
    }

    /// Microseconds of forward and backward passes.
    fn backward(&self) -> Outcome<String> {
        let mut out = "\n## Backward, adapters and bases trained\n\n| model | tokens | routing | replaced | forward µs \
                       | backward µs |\n| :--- | ---: | :--- | ---: | ---: | ---: |\n"
            .to_owned();
        for case in self.cases().filter(|case| !case["backward_us"].is_null()) {
            let (forward, backward) = (number(case, "us"), number(case, "backward_us"));
            writeln!(
                out,
                "| {} | {} | {} | {} % | {} | {} ({:.2}×) |",
                text(case, "model"),
                case["tokens"],
                text(case, "routing"),
                case["replaced"],
                micros(forward),
                micros(backward),
                backward / forward
            )?;
        }
        Ok(out)
    }

    /// The original layer by others' kernels.
    fn others(&self) -> Outcome<String> {
        let mut names: Vec<&str> = Vec::new();
        for case in list(&self.peers["cases"]) {
            for name in case["peers"]
                .as_object()
                .into_iter()
                .flat_map(|peers| peers.keys())
            {
                if !names.contains(&name.as_str()) {
                    names.push(name);
                }
            }
        }
        let mut out = format!(
            "\n## Others, the original layer, uniform routing, µs\n\n| model | tokens | ours | ours, 50 % replaced | cuBLAS per \
             expert, products alone | {} |\n|{}\n",
            names.join(" | "),
            " ---: |".repeat(5 + names.len())
        );
        for case in self.cases().filter(|case| !case["cublas_us"].is_null()) {
            let ours = number(case, "us");
            let half = self.same(case, 50).map_or(f64::NAN, |c| number(c, "us"));
            let name = format!("{} {}", text(case, "model"), case["tokens"]);
            let peer = list(&self.peers["cases"]).find(|peer| peer["name"] == name.as_str());
            let peer = peer.unwrap_or(&Value::Null);
            let times = |us: f64| match us {
                us if us.is_nan() => micros(us),
                us => format!("{} ({:.2}×)", micros(us), us / ours),
            };
            let of_peer = |name: &&str| times(number(&peer["peers"][*name], "microseconds"));
            writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} |",
                text(case, "model"),
                case["tokens"],
                micros(ours),
                micros(half),
                times(number(case, "cublas_us")),
                names.iter().map(of_peer).collect::<Vec<_>>().join(" | ")
            )?;
        }
        Ok(out)
    }
}
