//! What the values of a recipe must be, whatever the model.

use super::Recipe;
use crate::device;
use anyhow::{Result, ensure};
use lightmoe_compress::Sensitivity;
use lightmoe_compress::methods::{AdapterInit, MethodName};
use lightmoe_compress::ranks::RankRule;

impl Recipe {
    /// Refuses values that cannot work, each with what to give instead.
    pub(super) fn check(&self) -> Result<()> {
        device::dtype(&self.dtype, self.device.parse()?)?;
        let counts = [
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("train_examples", self.train_examples),
            ("eval_examples", self.eval_examples),
            ("max_length", self.max_length),
            ("calibration_tokens", self.calibration_tokens),
            ("contrast_tokens", self.contrast_tokens),
        ];
        for (key, value) in counts {
            let none = ["steps", "contrast_tokens"].contains(&key);
            ensure!(value > 0 || none, "`{key}` is 0; give at least 1");
            ensure!(
                u32::try_from(value).is_ok(),
                "`{key}` is {value}; give a number below 2^32"
            );
        }
        let shares = [
            ("warmup", self.warmup),
            ("end_ratio", self.end_ratio),
            ("max_delta", self.max_delta),
        ];
        for (key, value) in shares {
            ensure!(
                (0.0..=1.0).contains(&value),
                "`{key}` is {value}; give a share from 0 to 1"
            );
        }
        for (key, value) in [
            ("lr", self.lr),
            ("clip_norm", self.clip_norm),
            ("gamma", self.gamma),
            ("distill_temperature", self.distill_temperature),
        ] {
            ensure!(
                value > 0.0 && value.is_finite(),
                "`{key}` is {value}; give a number above 0"
            );
        }
        for (key, value) in [("ratio", self.ratio), ("threshold", self.threshold)] {
            ensure!(
                value.is_none_or(|v| (key == "ratio" && v == 0.0) || (v > 0.0 && v < 1.0)),
                "`{key}` is {}; give a number between 0 and 1",
                value.unwrap_or_default()
            );
        }
        ensure!(
            self.eval_text.is_none() || self.task.is_none(),
            "`eval_text` tests what `train` trains, and a task brings its own test; give `eval_text` \
             with `train` and without `task`"
        );
        self.bytes()?;
        self.calibrate()?;
        self.also()?;
        self.verdict.check()?;
        ensure!(
            self.fit_steps != Some(0),
            "`fit_steps` is 0; give at least 1"
        );
        let by_damage = self.method == MethodName::Budget
            && self.ranks == RankRule::Budget
            && self.sensitivity == Sensitivity::Fisher;
        ensure!(
            self.max_damage.is_none() || by_damage,
            "`max_damage` is for the method `budget` with the `ranks` budget and the `sensitivity` \
             fisher, which alone know it; give `ratio` or `bytes`"
        );
        ensure!(
            self.threshold.is_none() || self.method != MethodName::Budget,
            "`budget` has no threshold; give `ratio`, `bytes` or `max_damage`"
        );
        ensure!(
            self.distill_top_k == 0 || self.distill > 0.0,
            "`distill_top_k` keeps predictions to learn from, and `distill` is 0; give it a weight"
        );
        ensure!(
            self.method != MethodName::Lora || self.rank > 0 || self.train_router,
            "`rank` is 0, so `lora` has nothing to train; give at least 1"
        );
        let fades = self.steps == 0 || self.annealing().beta(0, self.steps) > 0.0;
        ensure!(
            self.method != MethodName::Replace
                || self.groups > 0
                || self.adapters != AdapterInit::Fresh
                || fades,
            "`replace` without a base cannot begin at β = 0: adapters that start at zero, with \
             nothing beside them, get no gradient; use `annealing` linear or exponential with \
             `end_ratio` above 0, or `groups` 1"
        );
        for (key, value) in [
            ("weight_decay", self.weight_decay),
            ("alpha", self.alpha),
            ("distill", self.distill),
            ("max_damage", self.max_damage.unwrap_or(0.0)),
        ] {
            ensure!(
                value >= 0.0 && value.is_finite(),
                "`{key}` is {value}; give a number from 0"
            );
        }
        ensure!(
            i64::try_from(self.seed).is_ok(),
            "`seed` is {}, which a recipe file cannot hold; give a number below 2^63",
            self.seed
        );
        Ok(())
    }
}
