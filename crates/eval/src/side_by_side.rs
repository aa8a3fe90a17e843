//! Batches side by side: what one of them does on one core alone leaves the others to the other.

use crate::Result;
use lightmoe_models::LanguageModel;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Does the jobs `0..count`, two at a time where the model allows it, in about their order. After an
/// error no other job begins.
pub(crate) fn side_by_side(
    model: &dyn LanguageModel,
    count: usize,
    job: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            job(number).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
        }
    };
    match model.runs_side_by_side() {
        true => {
            let (a, b) = rayon::join(work, work);
            a.and(b)
        }
        false => work(),
    }
}

/// What both have in common, for as long as one of them needs it.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use lightmoe_models::{Decoder, ModelConfig};
    use std::path::Path;

    #[test]
    fn every_job_is_done_once_and_none_after_an_error() {
        let raw = serde_json::json!({
            "model_type": "olmoe", "vocab_size": 4, "hidden_size": 16, "intermediate_size": 8,
            "num_attention_heads": 2, "num_hidden_layers": 1, "num_experts": 4,
            "num_experts_per_tok": 2,
        });
        let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
        let model = Decoder::random(&config, 3).unwrap();
        let done = Mutex::new(Vec::new());
        side_by_side(&model, 50, &|job| {
            lock(&done).push(job);
            Ok(())
        })
        .unwrap();
        let mut all = done.into_inner().unwrap();
        all.sort_unstable();
        assert_eq!(all, (0..50).collect::<Vec<_>>());
        let begun = AtomicUsize::new(0);
        let failed = side_by_side(&model, 1_000_000, &|job| {
            begun.fetch_add(1, Ordering::Relaxed);
            match job {
                7 => Err(Error::Interrupted),
                _ => Ok(()),
            }
        });
        assert!(matches!(failed, Err(Error::Interrupted)));
        assert!(begun.into_inner() < 1_000_000);
    }
}
