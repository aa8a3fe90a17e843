//! What the distances of all tokens come to.
//!
//! Tokens of one row (a window of a text, the answer to an item) are no independent draws: see
//! [`Score::per_unit`].

use super::distance::TokenDistance;
use crate::Score;
use crate::paired::quantile;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A mean over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error, from the spread between rows; null of a single row.
    pub stderr: Option<f64>,
}

/// How far one model is from another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Distance {
    /// KL divergence KL(original ‖ compressed) of the distributions over the next token, nats a token.
    pub kl: Estimate,
    /// Share of tokens where both models have the same likeliest next token.
    pub top1_agreement: Estimate,
    /// How much less likely the text became, nats a token: the logarithm of the ratio of the
    /// perplexities.
    pub nll_increase: Estimate,
}

/// The distance that one layer makes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerDistance {
    /// Its number, from 0.
    pub layer: usize,
    /// Of the original with this layer of the compressed model.
    #[serde(flatten)]
    pub distance: Distance,
}

/// How KL divergences spread over tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Quantiles {
    /// The median: half of the tokens are above.
    pub median: f64,
    /// One token of a hundred is above.
    pub p99: f64,
    /// The highest.
    pub max: f64,
}

/// Perplexity a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Perplexity {
    /// Of the original.
    pub original: f64,
    /// Of the compressed model.
    pub compressed: f64,
    /// The latter by the former.
    pub ratio: f64,
    /// Standard error of the ratio: the ratio times that of its logarithm, `nll_increase`.
    pub ratio_stderr: Option<f64>,
}

/// Sums over the tokens of a row.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    tokens: f64,
    kl: f64,
    agreeing: f64,
    original_nll: f64,
    nll: f64,
}

/// The distances of one model, row by row.
#[derive(Debug, Clone)]
pub(super) struct Tally(Vec<Row>);

impl Tally {
    /// Of so many rows.
    pub(super) fn new(rows: usize) -> Self {
        Self(vec![Row::default(); rows])
    }

    /// Adds tokens of rows.
    pub(super) fn add(&mut self, of_row: &[usize], tokens: &[TokenDistance]) {
        for (&row, token) in of_row.iter().zip(tokens) {
            let sums = &mut self.0[row];
            sums.tokens += 1.0;
            sums.kl += token.kl;
            sums.agreeing += f64::from(u8::from(token.agrees));
            sums.original_nll += token.original_nll;
            sums.nll += token.nll;
        }
    }

    pub(super) fn distance(&self) -> Distance {
        Distance {
            kl: self.estimate(|row| row.kl),
            top1_agreement: self.estimate(|row| row.agreeing),
            nll_increase: self.nll_increase(),
        }
    }

    pub(super) fn perplexity(&self) -> Perplexity {
        let increase = self.nll_increase();
        let ratio = increase.value.exp();
        Perplexity {
            original: self.estimate(|row| row.original_nll).value.exp(),
            compressed: self.estimate(|row| row.nll).value.exp(),
            ratio,
            ratio_stderr: increase.stderr.map(|stderr| ratio * stderr),
        }
    }

    fn nll_increase(&self) -> Estimate {
        self.estimate(|row| row.nll - row.original_nll)
    }

    fn estimate(&self, sum: impl Fn(&Row) -> f64) -> Estimate {
        let rows: Vec<(f64, f64)> = self.0.iter().map(|row| (sum(row), row.tokens)).collect();
        let score = Score::per_unit(&rows);
        Estimate {
            value: score.value,
            stderr: (score.n > 1).then_some(score.stderr),
        }
    }
}

impl Quantiles {
    /// Of values in any order, of which there is at least one.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            median: quantile(&values, 0.5),
            p99: quantile(&values, 0.99),
            max: quantile(&values, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(kl: f64, nll: f64) -> TokenDistance {
        TokenDistance {
            kl,
            agrees: kl < 0.5,
            original_nll: 1.0,
            nll,
        }
    }

    #[test]
    fn rows_are_the_draws() {
        let mut tally = Tally::new(3);
        let all = [(0, 0.1, 1.5), (1, 0.3, 1.0), (1, 0.7, 2.0), (2, 0.9, 1.5)];
        for (row, kl, nll) in all {
            tally.add(&[row], &[token(kl, nll)]);
        }
        let distance = tally.distance();
        // Sums .1, 1, .9 of 1, 2, 1 tokens: mean .5, residuals -.4, 0, .4.
        let stderr = (0.32f64 * 3.0 / 2.0).sqrt() / 4.0;
        assert!((distance.kl.value - 0.5).abs() < 1e-12);
        assert!((distance.kl.stderr.unwrap() - stderr).abs() < 1e-12);
        assert_eq!(distance.top1_agreement.value, 0.5);
        assert!((distance.nll_increase.value - 0.5).abs() < 1e-12);
        // Every row has .5 a token more.
        assert!(distance.nll_increase.stderr.unwrap() < 1e-12);
        let perplexity = tally.perplexity();
        assert!((perplexity.original - 1f64.exp()).abs() < 1e-12);
        assert!((perplexity.ratio - perplexity.compressed / perplexity.original).abs() < 1e-12);
    }

    #[test]
    fn rows_of_one_token_have_the_error_of_a_mean() {
        let values = [0.1, 0.4, 0.2, 0.9, 0.3];
        let mut tally = Tally::new(5);
        for (row, kl) in values.into_iter().enumerate() {
            tally.add(&[row], &[token(kl, 1.0)]);
        }
        let score = crate::Score::mean(&values);
        let kl = tally.distance().kl;
        assert!((kl.value - score.value).abs() < 1e-12);
        assert!((kl.stderr.unwrap() - score.stderr).abs() < 1e-12);
    }

    #[test]
    fn one_row_has_no_error() {
        let mut tally = Tally::new(1);
        tally.add(&[0, 0], &[token(0.1, 1.0), token(0.3, 1.0)]);
        assert_eq!(tally.distance().kl.stderr, None);
        assert_eq!(tally.perplexity().ratio_stderr, None);
    }

    /// Values of `numpy.quantile`, see `fixtures/paired`.
    #[test]
    fn quantiles_are_numpys() {
        let text = include_str!("../../../../fixtures/paired/paired.json");
        let all: serde_json::Value = serde_json::from_str(text).unwrap();
        let case = &all["quantiles"];
        let found = Quantiles::of(serde_json::from_value(case["values"].clone()).unwrap());
        for (got, share) in [
            (found.median, "0.5"),
            (found.p99, "0.99"),
            (found.max, "1.0"),
        ] {
            assert!((got - case["of"][share].as_f64().unwrap()).abs() < 1e-12);
        }
        assert_eq!(Quantiles::of(vec![3.0]).p99, 3.0);
    }
}
