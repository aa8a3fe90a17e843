//! The rotary entry of a `config.json`: its base, and how it is stretched beyond the context that
//! the model was first trained with.

use serde_json::Value;

use super::keys::Keys;
use crate::Result;
use crate::rotary::{LongRope, RopeScaling, Yarn};

impl Keys<'_> {
    /// Base and scaling of the rotary embedding, from either spelling; `default` where the file
    /// names no base. Of the kinds of scaling, those in `allowed` pass.
    pub(super) fn rope(
        &self,
        default: f64,
        allowed: &[&str],
        positions: usize,
    ) -> Result<(f64, RopeScaling)> {
        let outer = self.optional_size("original_max_position_embeddings")?;
        let mut inner_theta = None;
        let mut scaling = None;
        for key in ["rope_parameters", "rope_scaling"] {
            let Some(inner) = self.inner(key)? else {
                continue;
            };
            let kind = inner.text("rope_type", Some(inner.text("type", Some("default"))?))?;
            if kind != "default" && !allowed.contains(&kind) {
                return Err(self.error(format!(
                    "`{key}` asks for `{kind}`, which is not supported for this family; \
                     use a model with plain rotary embeddings"
                )));
            }
            if inner.positive("partial_rotary_factor", Some(1.0))? != 1.0 {
                return Err(self.error(format!(
                    "`{key}` has a `partial_rotary_factor` other than 1, which is not \
                     supported; use a model that rotates whole heads"
                )));
            }
            if let Some(theta) = inner.get("rope_theta") {
                inner_theta = Some(inner.positive("rope_theta", theta.as_f64())?);
            }
            let original = outer.unwrap_or(positions);
            let original = inner.size("original_max_position_embeddings", Some(original))?;
            if outer.is_some_and(|outer| outer != original) {
                let message = "`original_max_position_embeddings` differs from the one beside the \
                               scaling; remove one of them";
                return Err(self.error(message));
            }
            let found = match kind {
                "yarn" => inner.yarn(original, positions)?,
                "longrope" => inner.long_rope(original, positions)?,
                _ => RopeScaling::None,
            };
            inner.all_known()?;
            if scaling.as_ref().is_some_and(|other| *other != found) {
                let message = "`rope_scaling` differs from `rope_parameters`; remove one of them";
                return Err(self.error(message));
            }
            scaling = Some(found);
        }
        let theta = self.positive("rope_theta", Some(inner_theta.unwrap_or(default)))?;
        if inner_theta.is_some_and(|inner| inner != theta) {
            let message = "`rope_theta` differs from the one in `rope_parameters`; remove one";
            return Err(self.error(message));
        }
        Ok((theta, scaling.unwrap_or(RopeScaling::None)))
    }

    fn yarn(&self, original: usize, positions: usize) -> Result<RopeScaling> {
        let factor = self.positive("factor", Some(positions as f64 / original as f64))?;
        let mscale = self.non_negative("mscale", Some(0.0))?;
        let mscale_all_dim = self.non_negative("mscale_all_dim", Some(0.0))?;
        let attention_factor = match (mscale > 0.0, mscale_all_dim > 0.0) {
            (true, true) => Yarn::mscale(factor, mscale) / Yarn::mscale(factor, mscale_all_dim),
            _ => Yarn::mscale(factor, 1.0),
        };
        Ok(RopeScaling::Yarn(Yarn {
            factor,
            original,
            beta_fast: self.positive("beta_fast", Some(32.0))?,
            beta_slow: self.positive("beta_slow", Some(1.0))?,
            truncate: self.flag("truncate", true)?,
            attention_factor: self.positive("attention_factor", Some(attention_factor))?,
            mscale_all_dim,
        }))
    }

    fn long_rope(&self, original: usize, positions: usize) -> Result<RopeScaling> {
        let factors = |key: &str| {
            self.read(key, "a list of positive numbers", None, |value| {
                let each = value.as_array()?.iter().map(Value::as_f64);
                let all: Vec<f64> = each.collect::<Option<_>>()?;
                all.iter().all(|&f| f > 0.0).then_some(all)
            })
        };
        // The models come with their own factors; else LongRoPE's rule.
        let factor = self.positive("factor", Some(positions as f64 / original as f64))?;
        let rule = (1.0 + factor.max(1.0).ln() / (original as f64).ln()).sqrt();
        let rule = self.positive("attention_factor", Some(rule))?;
        Ok(RopeScaling::Long(LongRope {
            short: factors("short_factor")?,
            long: factors("long_factor")?,
            short_scale: self.positive("short_mscale", Some(rule))?,
            long_scale: self.positive("long_mscale", Some(rule))?,
            original,
        }))
    }
}
