//! How well a model predicts text.

use crate::items::check;
use crate::{Error, Progress, Result, Sample, Score, Scores, likelihood};
use lightmoe_data::Encoded;
use lightmoe_models::{LanguageModel, ModelTokenizer};
use std::f64::consts::LN_2;

/// Scores `model` on windows of text, whose tokens from `answer_start` on are predicted; the samples come
/// in the order of the windows.
///
/// | score | what it is |
/// |---|---|
/// | `nll` | mean negative log-likelihood in nats a predicted token |
/// | `perplexity` | its exponential; error by the delta method |
/// | `bits_per_byte` | negative log-likelihood in bits by the UTF-8 bytes of the predicted tokens; a character that two windows share counts in both |
///
/// Standard errors are those between windows. A batch has at most `batch_tokens` tokens, or one window.
/// `progress` sees how many windows are done, of how many; its `false` stops the work.
///
/// # Errors
/// [`Error::Empty`] without windows; [`Error::Example`] for one that is longer than
/// `max_position_embeddings` or has no token before the predicted ones; [`Error::NotFinite`] if the model
/// gives no numbers; [`Error::Interrupted`].
pub fn evaluate_text(
    model: &dyn LanguageModel,
    tokenizer: &ModelTokenizer,
    windows: &[Encoded],
    batch_tokens: usize,
    progress: &mut (dyn FnMut(usize, usize) -> bool + Send),
) -> Result<(Scores, Vec<Sample>)> {
    if windows.is_empty() {
        return Err(Error::Empty);
    }
    let context = model.config().max_position_embeddings;
    for (index, window) in windows.iter().enumerate() {
        check(window, context).map_err(|message| Error::Example { index, message })?;
    }
    let mut progress = Progress {
        done: 0,
        total: windows.len(),
        report: progress,
    };
    progress.advance(0)?;
    let answers = likelihood::score(model, windows, batch_tokens, &mut |n| progress.advance(n))?;
    let sample = |(index, (window, answer)): (usize, (&Encoded, &likelihood::Answer))| {
        let nll = answer.nll.iter().sum::<f64>() / answer.nll.len() as f64;
        if !nll.is_finite() {
            return Err(Error::NotFinite { index });
        }
        Ok(Sample {
            index,
            prompt: String::new(),
            target: tokenizer.decode(&window.tokens[window.answer_start..])?,
            prediction: None,
            exact_match: answer.greedy,
            nll,
            answer_tokens: answer.nll.len(),
            choice: None,
            choice_norm: None,
            right_choice: None,
            choice_nll: Vec::new(),
        })
    };
    let samples = windows.iter().zip(&answers).enumerate().map(sample);
    let samples = samples.collect::<Result<Vec<_>>>()?;
    let scores = scores(&samples);
    match scores.values().all(|score| score.value.is_finite()) {
        true => Ok((scores, samples)),
        // So unlikely a text has no perplexity that can be written.
        false => Err(Error::NotFinite {
            index: least_likely(&samples),
        }),
    }
}

/// The window whose tokens are the least likely in the mean.
fn least_likely(samples: &[Sample]) -> usize {
    let least = samples.iter().max_by(|a, b| a.nll.total_cmp(&b.nll));
    least.map_or(0, |sample| sample.index)
}

fn scores(samples: &[Sample]) -> Scores {
    let rows = |row: &dyn Fn(&Sample) -> (f64, f64)| samples.iter().map(row).collect::<Vec<_>>();
    let total = |sample: &Sample| sample.nll * sample.answer_tokens as f64;
    let nll = Score::per_unit(&rows(&|s| (total(s), s.answer_tokens as f64)));
    let perplexity = Score {
        value: nll.value.exp(),
        stderr: nll.value.exp() * nll.stderr,
        ..nll
    };
    let bits = Score::per_unit(&rows(&|s| (total(s) / LN_2, s.target.len() as f64)));
    Scores::from([
        ("nll".to_owned(), nll),
        ("perplexity".to_owned(), perplexity),
        ("bits_per_byte".to_owned(), bits),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_likely_window_is_to_blame() {
        let sample = |(index, nll): (usize, f64)| Sample {
            index,
            prompt: String::new(),
            target: "text".to_owned(),
            prediction: None,
            exact_match: false,
            nll,
            answer_tokens: 1,
            choice: None,
            choice_norm: None,
            right_choice: None,
            choice_nll: Vec::new(),
        };
        let samples: Vec<Sample> = [3.0, 2e3, 1e3]
            .into_iter()
            .enumerate()
            .map(sample)
            .collect();
        assert_eq!(scores(&samples)["perplexity"].value, f64::INFINITY);
        assert_eq!(least_likely(&samples), 1);
    }
}
