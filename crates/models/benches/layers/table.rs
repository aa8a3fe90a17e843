//! What was measured, as Markdown.

use super::shapes::REPLACED;
use serde_json::Value;
use std::fmt::Write;

pub fn page(results: &Value) -> String {
    let mut page = String::new();
    rates(&mut page, results);
    layers(&mut page, results);
    others(&mut page, results);
    page
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Milliseconds of three digits.
fn millis(seconds: f64) -> String {
    let ms = seconds * 1e3;
    match ms {
        ..10.0 => format!("{ms:.2}"),
        10.0..100.0 => format!("{ms:.1}"),
        _ => format!("{ms:.0}"),
    }
}

fn rates(page: &mut String, results: &Value) {
    let rate = |dtype: &str, of: &str| number(&results["dense"][dtype][of]) / 1e9;
    let _ = writeln!(
        page,
        "Copy rate {:.1} GB/s (bytes read and written). A dense product of 4096³, in GFLOP/s: {:.0} in f32 \
         and {:.0} in bf16 by our linear layer, {:.0} and {:.0} by candle; shares are of the faster. Threads: \
         {} ours, {} PyTorch's.\n",
        number(&results["copy_bytes_per_second"]) / 1e9,
        rate("f32", "ours"),
        rate("bf16", "ours"),
        rate("f32", "candle"),
        rate("bf16", "candle"),
        results["threads"],
        results["peers"]["threads"],
    );
}

fn layers(page: &mut String, results: &Value) {
    page.push_str(
        "## Layers\n\n\
         | model | matrices | tokens | routing | original ms | of copy rate | of dense rate | 30 % replaced | \
         50 % replaced | of copy rate | of dense rate | 75 % replaced |\n\
         | :--- | :--- | ---: | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    let copy = number(&results["copy_bytes_per_second"]);
    for case in list(&results["cases"]) {
        let dtype = text(&case["dtype"]);
        let dense = number(&results["dense"][dtype]["faster"]);
        let original = number(&case["layers"]["0"]["seconds"]);
        let _ = write!(
            page,
            "| {} | {dtype} | {} | {} |",
            text(&case["model"]),
            case["tokens"],
            text(&case["routing"])
        );
        for replaced in REPLACED {
            let layer = &case["layers"][replaced.to_string()];
            let seconds = number(&layer["seconds"]);
            let _ = match replaced {
                0 => write!(page, " {} |", millis(seconds)),
                _ => write!(page, " {} ({:.2}×) |", millis(seconds), original / seconds),
            };
            if [0, 50].contains(&replaced) {
                for (amount, rate) in [("bytes", copy), ("operations", dense)] {
                    let share = number(&layer[amount]) / seconds / rate;
                    let _ = write!(page, " {:.0} % |", 100.0 * share);
                }
            }
        }
        page.push('\n');
    }
}

/// The times of others for the original layer, and how much faster than theirs ours is.
fn others(page: &mut String, results: &Value) {
    let peers = list(&results["peers"]["cases"]).collect::<Vec<_>>();
    let mut names: Vec<(&str, &str)> = Vec::new();
    for peer in peers.iter().flat_map(|case| list(&case["peers"])) {
        let name = (text(&peer["dtype"]), text(&peer["name"]));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for dtype in ["f32", "bf16"] {
        let names = names.iter().filter(|(of, _)| *of == dtype);
        let names: Vec<&str> = names.map(|(_, name)| *name).collect();
        let candle = ["candle_loop"].into_iter().filter(|_| dtype == "f32");
        let columns: Vec<&str> = candle.chain(names).collect();
        let _ = write!(
            page,
            "\n## Others, the original layer in {dtype}, uniform routing, ms\n\n\
             | model | tokens | ours | ours, 50 % replaced |"
        );
        columns.iter().for_each(|name| {
            let _ = write!(page, " {name} |");
        });
        page.push_str("\n| :--- | ---: | ---: | ---: |");
        columns.iter().for_each(|_| page.push_str(" ---: |"));
        page.push('\n');
        let cases = list(&results["cases"])
            .filter(|case| text(&case["dtype"]) == dtype && text(&case["routing"]) == "uniform");
        for case in cases {
            let name = format!("{} {}", text(&case["model"]), case["tokens"]);
            let Some(peer) = peers.iter().find(|peer| text(&peer["name"]) == name) else {
                continue;
            };
            let layer = |replaced: &str| number(&case["layers"][replaced]["seconds"]);
            let (ours, half) = (layer("0"), layer("50"));
            let _ = write!(
                page,
                "| {} | {} | {} | {} |",
                text(&case["model"]),
                case["tokens"],
                millis(ours),
                millis(half)
            );
            for column in &columns {
                let of_peer = list(&peer["peers"])
                    .find(|p| text(&p["dtype"]) == dtype && text(&p["name"]) == *column)
                    .map(|p| number(&p["seconds"]));
                let seconds = match *column {
                    "candle_loop" => number(&case["candle_loop"]),
                    _ => of_peer.unwrap_or(f64::NAN),
                };
                let _ = match seconds.is_nan() {
                    true => write!(page, " – |"),
                    false => write!(page, " {} ({:.2}×) |", millis(seconds), seconds / ours),
                };
            }
            page.push('\n');
        }
    }
}
