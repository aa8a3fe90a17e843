//! The page of `bench scale`, and what its rates mean for models that were not run.

use super::{Cost, Measured};
use crate::machine::{processor, today};
use crate::recipe::Recipe;
use crate::report::table::thousands;
use crate::settings::Settings;
use anyhow::Result;
use lightmoe_compress::methods::MethodName;
use lightmoe_compress::{estimate, layer_bytes};
use lightmoe_models::ModelConfig;
use std::fmt::Write;
use std::path::Path;

/// Models to tell of by arithmetic.
const OTHERS: [(&str, &str); 2] = [
    ("Mixtral-8x7B", "mixtral-8x7b-v0.1.json"),
    ("DeepSeek-V3", "deepseek-v3.json"),
];

pub(super) fn gib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 30))
}

fn gb(bytes: f64) -> String {
    format!("{:.2}", bytes / 1e9)
}

impl Measured {
    /// Floating-point operations of observe: two for each parameter that works on a token, but for
    /// the head, which observe does not run. The scores of the attention are left out.
    fn observe_flops(&self, config: &ModelConfig) -> f64 {
        let table = config.vocab_size as u64 * config.hidden_size as u64;
        let working = config.active_parameters().saturating_sub(table);
        2.0 * working as f64 * self.tokens as f64
    }

    fn compute_rate(&self) -> f64 {
        self.observe_flops(&self.config) / self.compute_seconds
    }

    fn read_rate(&self) -> f64 {
        self.bytes[0] as f64 / self.read_seconds
    }

    /// Bytes read and written a second.
    fn copy_rate(&self) -> f64 {
        2.0 * self.bytes[0] as f64 / self.copy.seconds
    }

    fn build_rate(&self) -> f64 {
        (self.bytes[0] + self.bytes[1]) as f64 / self.build.seconds
    }
}

pub(super) fn render(m: &Measured) -> Result<String> {
    let mut page = format!(
        "# Full size\n\nWritten by `cargo xtask bench scale` on {}, {}. A model of the true shape \
         of `{}` with random bf16 weights ({} parameters, {} GiB) is observed on {} tokens, \
         planned for half of its parameters and built, with at most {} GiB of memory; before each \
         step the model leaves the page cache.\n\n",
        today(),
        processor(),
        m.config.family,
        thousands(m.parameters[0]),
        gib(m.bytes[0]),
        m.tokens,
        gib(m.memory)
    );
    steps(&mut page, m)?;
    rates(&mut page, m)?;
    others(&mut page, m)?;
    Ok(page)
}

fn steps(page: &mut String, m: &Measured) -> Result<()> {
    writeln!(
        page,
        "| step | seconds | peak resident memory, GiB |\n| :--- | ---: | ---: |"
    )?;
    let synthesize = m.synthesize.map(|cost| ("synthesize".to_owned(), cost));
    let generate = "generate, a token, layer by layer".to_owned();
    let rows = synthesize.into_iter().chain([
        ("observe".to_owned(), m.observe),
        ("plan".to_owned(), m.plan),
        ("copy of the model".to_owned(), m.copy),
        ("build".to_owned(), m.build),
        (generate, m.generate),
    ]);
    for (name, Cost { seconds, peak }) in rows {
        writeln!(page, "| {name} | {seconds:.1} | {} |", gib(peak))?;
    }
    writeln!(
        page,
        "\nThe result has {} parameters and {} GiB. Peaks do not count the page cache.\n",
        thousands(m.parameters[1]),
        gib(m.bytes[1])
    )?;
    Ok(())
}

fn rates(page: &mut String, m: &Measured) -> Result<()> {
    let share = |ours: f64, best: f64| format!("{:.0}%", 100.0 * ours / best);
    writeln!(
        page,
        "| rate | ours | the machine's | share |\n| :--- | ---: | ---: | ---: |"
    )?;
    writeln!(
        page,
        "| compute of observe against candle's dense product of 4096 x 4096 x 4096 in f32, one after \
         the other for 6 s before and 6 s after it, GFLOP/s | {:.0} | {:.0} | {} |",
        m.compute_rate() / 1e9,
        m.dense_flops / 1e9,
        share(m.compute_rate(), m.dense_flops)
    )?;
    writeln!(
        page,
        "| build against a copy, GB read and written a second | {} | {} | {} |\n",
        gb(m.build_rate()),
        gb(m.copy_rate()),
        share(m.build_rate(), m.copy_rate())
    )?;
    writeln!(
        page,
        "Observe spent {:.1} s reading and converting weights ({} GB/s) and {:.1} s with the layers once \
         they were read, sums over tokens and the files of hidden states included.\n",
        m.read_seconds,
        gb(m.read_rate()),
        m.compute_seconds
    )?;
    Ok(())
}

fn others(page: &mut String, m: &Measured) -> Result<()> {
    writeln!(
        page,
        "## By arithmetic from these rates\n\nNot run. The same tokens, half of the parameters, the \
         default settings; bf16 on disk, one layer in f32 in memory, beside it a batch and 128 MiB.\n\n\
         | model | parameters | original and result, GB on disk | a layer, GiB | observe, hours | build, hours |\n\
         | :--- | ---: | ---: | ---: | ---: | ---: |"
    )?;
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/configs");
    for (name, file) in OTHERS {
        let config = ModelConfig::from_file(&configs.join(file))?;
        let options = Recipe::resolve(Settings::default(), &config)?.plan_options();
        let forecast = estimate(&config, 0.5, MethodName::Lightmoe, &options)?;
        let (before, after) = (
            2.0 * forecast.parameters_before as f64,
            2.0 * forecast.parameters_after as f64,
        );
        let observe = m.observe_flops(&config) / m.compute_rate() + before / m.read_rate();
        let build = (before + after) / m.build_rate();
        writeln!(
            page,
            "| {name} | {} | {:.0} + {:.0} | {} | {:.2} | {:.2} |",
            thousands(forecast.parameters_before),
            before / 1e9,
            after / 1e9,
            gib(layer_bytes(&config)),
            observe / 3600.0,
            build / 3600.0
        )?;
    }
    Ok(())
}
