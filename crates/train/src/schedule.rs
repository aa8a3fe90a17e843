//! The learning rate and the annealing factor as functions of the step.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// Straight to the final share.
    Linear,
    /// Half a cosine to the final share.
    Cosine,
}

/// Learning rate: linear warm-up, a flat part, decay.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRate {
    /// The highest rate.
    pub peak: f64,
    /// Share of the steps that warm up.
    pub warmup: f64,
    /// Share of the steps after which the decay begins.
    pub flat_until: f64,
    /// The form of the decay.
    pub decay: Decay,
    /// The last rate as a share of the highest.
    pub final_share: f64,
}

impl LearningRate {
    /// The rate at `step` of `total`, counted from zero.
    pub fn at(&self, step: usize, total: usize) -> f64 {
        let warmup = (self.warmup * total as f64).ceil();
        let step = step as f64;
        if step < warmup {
            return self.peak * (step + 1.0) / warmup;
        }
        let start = warmup.max(self.flat_until * total as f64);
        let progress = ((step - start) / (total as f64 - start).max(1.0)).clamp(0.0, 1.0);
        let share = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * (self.final_share + (1.0 - self.final_share) * share)
    }
}

/// How β falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AnnealingShape {
    /// β = max(1 − τ, 0) (eq. 7)
    Linear,
    /// β = max((e^(−γτ) − e^(−γ)) / (1 − e^(−γ)), 0) (eq. 9)
    Exponential,
    /// β = 0 from the first step: the originals are replaced at once.
    None,
}

/// The annealing factor β: the share of the original weights in a replaced expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annealing {
    /// The form of the fall.
    pub shape: AnnealingShape,
    /// ε: the share of the steps after which β is zero.
    pub end_ratio: f64,
    /// γ of the exponential form.
    pub gamma: f64,
}

impl Default for Annealing {
    fn default() -> Self {
        Self {
            shape: AnnealingShape::Linear,
            end_ratio: 0.2,
            gamma: 3.0,
        }
    }
}

impl Annealing {
    /// β at `step` of `total`, counted from zero. With ε = 0 it is zero from the first step.
    pub fn beta(&self, step: usize, total: usize) -> f64 {
        let end = self.end_ratio * total as f64;
        if self.shape == AnnealingShape::None || end <= 0.0 || step as f64 >= end {
            return 0.0;
        }
        let tau = step as f64 / end;
        match self.shape {
            AnnealingShape::None => 0.0,
            AnnealingShape::Linear => (1.0 - tau).max(0.0),
            AnnealingShape::Exponential => {
                let floor = (-self.gamma).exp();
                (((-self.gamma * tau).exp() - floor) / (1.0 - floor)).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_falls_from_one_to_zero_and_never_divides_by_zero() {
        for shape in [AnnealingShape::Linear, AnnealingShape::Exponential] {
            let annealing = Annealing {
                shape,
                end_ratio: 0.2,
                gamma: 3.0,
            };
            assert_eq!(annealing.beta(0, 100), 1.0);
            let betas: Vec<f64> = (0..100).map(|s| annealing.beta(s, 100)).collect();
            assert!(betas.windows(2).all(|w| w[1] <= w[0]));
            assert!(
                betas[19] > 0.0 && betas[20..].iter().all(|&b| b == 0.0),
                "{shape:?}"
            );
            assert_eq!(
                Annealing {
                    end_ratio: 0.0,
                    ..annealing
                }
                .beta(0, 100),
                0.0
            );
        }
        let linear = Annealing {
            shape: AnnealingShape::Linear,
            end_ratio: 0.5,
            gamma: 0.0,
        };
        assert!((linear.beta(25, 100) - 0.5).abs() < 1e-12);
        let curved = Annealing {
            shape: AnnealingShape::Exponential,
            end_ratio: 0.5,
            gamma: 3.0,
        };
        let expected = ((-1.5f64).exp() - (-3f64).exp()) / (1.0 - (-3f64).exp());
        assert!((curved.beta(25, 100) - expected).abs() < 1e-12);
        let none = Annealing {
            shape: AnnealingShape::None,
            ..curved
        };
        assert_eq!(none.beta(0, 100), 0.0);
    }

    #[test]
    fn the_rate_warms_up_stays_and_decays() {
        let rate = LearningRate {
            peak: 2.0,
            warmup: 0.1,
            flat_until: 0.5,
            decay: Decay::Linear,
            final_share: 0.02,
        };
        assert!((rate.at(0, 100) - 0.2).abs() < 1e-12);
        assert_eq!(rate.at(9, 100), 2.0);
        assert_eq!(rate.at(50, 100), 2.0);
        assert!((rate.at(75, 100) - 2.0 * (0.02 + 0.98 * 0.5)).abs() < 1e-12);
        assert!(rate.at(99, 100) < 0.1);
        let cosine = LearningRate {
            decay: Decay::Cosine,
            ..rate
        };
        assert!((cosine.at(75, 100) - rate.at(75, 100)).abs() < 1e-12);
        assert_eq!(
            LearningRate {
                decay: Decay::Constant,
                ..rate
            }
            .at(99, 100),
            2.0
        );
    }
}
