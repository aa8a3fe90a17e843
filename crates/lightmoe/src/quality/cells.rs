//! The cells of the quality bench.

use crate::settings::Settings;
use lightmoe_compress::size::equal_trainable_rank;
use lightmoe_data::Task;
use lightmoe_models::ModelConfig;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// The learning rates to choose from.
pub(super) const RATES: [f64; 3] = [2e-3, 4e-3, 8e-3];
/// The ratios.
pub(super) const RATIOS: [f64; 2] = [0.3, 0.5];
/// The ratio of the rate search and of the controls: the one that tells methods apart.
pub(super) const TELLING: f64 = 0.5;
/// Translation is trained this many times as long as the rest: its words are learned in jumps, kind
/// by kind, and a bench that stops before the last of them tells the jumps of the seeds, not methods.
pub(super) const TRANSLATION_STEPS: usize = 3;
/// LightMoE's bases per layer.
const GROUPS: usize = 3;

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Method {
    /// Adapters on the uncompressed model.
    Lora,
    /// Replaced by adapters alone.
    ReplaceNone,
    /// Replaced by adapters on one base.
    ReplaceOne,
    /// The method.
    Lightmoe,
    /// Control: random bases of the same scale.
    RandomBase,
    /// Control: replaced at once.
    NoAnnealing,
}

impl Method {
    /// The methods that are compared.
    pub(super) const COMPARED: [Self; 4] = [
        Self::Lora,
        Self::ReplaceNone,
        Self::ReplaceOne,
        Self::Lightmoe,
    ];
    /// The controls.
    pub(super) const CONTROLS: [Self; 2] = [Self::RandomBase, Self::NoAnnealing];

    /// The name in the table.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Lora => "LoRA on the original",
            Self::ReplaceNone => "replace, no base",
            Self::ReplaceOne => "replace, one base",
            Self::Lightmoe => "**LightMoE**",
            Self::RandomBase => "LightMoE, random bases",
            Self::NoAnnealing => "LightMoE, no annealing",
        }
    }

    fn id(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::ReplaceNone => "replace-none",
            Self::ReplaceOne => "replace-one",
            Self::Lightmoe => "lightmoe",
            Self::RandomBase => "random-base",
            Self::NoAnnealing => "no-annealing",
        }
    }

    fn groups(self) -> usize {
        match self {
            Self::Lora | Self::ReplaceNone => 0,
            Self::ReplaceOne => 1,
            _ => GROUPS,
        }
    }
}

/// What is held equal between methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Rule {
    /// The number of trained parameters.
    EqualTrainable,
    /// The rank of the adapters.
    EqualRank,
}

/// One compression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Cell {
    pub(super) method: Method,
    pub(super) rule: Rule,
    pub(super) task: Task,
    /// `None` for LoRA, which saves nothing.
    pub(super) ratio: Option<f64>,
    pub(super) seed: u64,
    /// Index into the rates while choosing one; `None` for the chosen one.
    pub(super) rate: Option<usize>,
}

impl Cell {
    pub(super) fn id(&self) -> String {
        let ratio = self.ratio.map_or(String::new(), |r| format!("-{r}"));
        let rule = match self.rule {
            Rule::EqualTrainable => "",
            Rule::EqualRank => "-rank",
        };
        let rate = self.rate.map_or(String::new(), |r| format!("-rate{r}"));
        format!(
            "{}-{}{ratio}{rule}-{}{rate}",
            self.task,
            self.method.id(),
            self.seed
        )
    }

    /// The training steps of the cell where most cells have `steps`.
    pub(super) fn steps(&self, steps: usize) -> usize {
        match self.task {
            Task::Translation => TRANSLATION_STEPS * steps,
            _ => steps,
        }
    }

    pub(super) fn settings(&self, config: &ModelConfig) -> Settings {
        let groups = self.method.groups();
        let rank = lightmoe_rank(config);
        let smaller = config.hidden_size.min(config.moe.intermediate_size);
        let rank = match (self.rule, groups) {
            (Rule::EqualTrainable, 0 | 1) => {
                equal_trainable_rank(config, rank, GROUPS, groups).min(smaller)
            }
            _ => rank,
        };
        let text = |s: &str| Some(s.to_owned());
        Settings {
            task: Some(self.task.to_string()),
            method: text(match self.method {
                Method::Lora => "lora",
                Method::ReplaceNone | Method::ReplaceOne => "replace",
                _ => "lightmoe",
            }),
            ratio: self.ratio,
            groups: Some(groups),
            rank: Some(rank),
            base: (self.method == Method::RandomBase).then(|| "random".to_owned()),
            annealing: (self.method == Method::NoAnnealing).then(|| "none".to_owned()),
            seed: Some(self.seed),
            // The folder of a cell goes, and its report with it.
            contrast_tokens: Some(0),
            ..Settings::default()
        }
    }
}

/// The rank that LightMoE has by default.
pub(super) fn lightmoe_rank(config: &ModelConfig) -> usize {
    (config.hidden_size.min(config.moe.intermediate_size) / 16).clamp(1, 16)
}

fn ratio_of(method: Method, ratio: f64) -> Option<f64> {
    (method != Method::Lora).then_some(ratio)
}

/// Every method and task at every rate: seed 0, equal trainable parameters.
pub(super) fn rate_search() -> Vec<Cell> {
    let mut cells = Vec::new();
    for task in Task::ALL {
        for method in Method::COMPARED {
            cells.extend((0..RATES.len()).map(|rate| Cell {
                method,
                rule: Rule::EqualTrainable,
                task,
                ratio: ratio_of(method, TELLING),
                seed: 0,
                rate: Some(rate),
            }));
        }
    }
    cells
}

/// All cells, the most telling first: seed by seed, 50% before 30%, equal trainables before the rest.
pub(super) fn grid(seeds: u64) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    let mut add = |method, rule, ratio: f64, seed| {
        for task in Task::ALL {
            let cell = Cell {
                method,
                rule,
                task,
                ratio: ratio_of(method, ratio),
                seed,
                rate: None,
            };
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
    };
    let ratios = || RATIOS.into_iter().rev();
    for seed in 0..seeds {
        for ratio in ratios() {
            for method in Method::COMPARED {
                add(method, Rule::EqualTrainable, ratio, seed);
            }
        }
    }
    for seed in 0..seeds {
        for method in Method::CONTROLS {
            add(method, Rule::EqualTrainable, TELLING, seed);
        }
        for ratio in ratios() {
            for method in [Method::Lora, Method::ReplaceNone, Method::ReplaceOne] {
                add(method, Rule::EqualRank, ratio, seed);
            }
        }
    }
    cells
}

/// The method whose learning rate a method uses: the controls use LightMoE's.
pub(super) fn rate_of(
    rates: &HashMap<(Method, Task), f64>,
    method: Method,
    task: Task,
) -> Option<f64> {
    let method = if Method::CONTROLS.contains(&method) {
        Method::Lightmoe
    } else {
        method
    };
    rates.get(&(method, task)).copied()
}
