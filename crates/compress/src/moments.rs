//! Second moments of what the matrices of each expert were given: `Σ x·xᵀ` over the tokens that chose
//! it, for the inputs of gate and up, and `Σ h·hᵀ` for those of down. They say which directions of a
//! matrix matter, and so how to factorise it (whitened SVD; D²-MoE, arXiv 2502.17298).
//!
//! A folder beside the observations, one file a layer: `moments-<l>.safetensors` with
//! `input.<expert>` `[H, H]` and `hidden.<expert>` `[F, F]`, f32. The metadata `fingerprint` is that of
//! the observations. An expert that no token chose has zeros.

use crate::Result;
use crate::beside::{self, Block};
use crate::factor::Gram;
use candle_core::Tensor;
use lightmoe_models::{ExpertRows, ModelConfig, TensorFile};
use std::path::{Path, PathBuf};

/// The moments of a model.
#[derive(Debug, Clone)]
pub struct Moments {
    folder: PathBuf,
    fingerprint: String,
}

impl Moments {
    /// Those of the observations of this fingerprint.
    pub(crate) fn of(folder: &Path, fingerprint: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            fingerprint: fingerprint.to_owned(),
        }
    }

    /// Opens those of one layer.
    ///
    /// # Errors
    /// If the file is missing or damaged, or belongs to other observations.
    pub fn layer(&self, layer: usize) -> Result<LayerMoments> {
        let file = beside::open(file(&self.folder, layer), &self.fingerprint)?;
        Ok(LayerMoments { file })
    }
}

fn file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("moments-{layer}.safetensors"))
}

/// The moments of one layer, read expert by expert.
pub struct LayerMoments {
    file: TensorFile,
}

impl LayerMoments {
    /// The sums of an expert as they were written: `[H, H]` of what gate and up were given, `[F, F]` of
    /// what down was given, row-major.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn sums(&self, config: &ModelConfig, expert: usize) -> Result<[Vec<f32>; 2]> {
        let read = |what: &str, n: usize| self.file.values(&format!("{what}.{expert}"), &[n, n]);
        Ok([
            read("input", config.hidden_size)?,
            read("hidden", config.moe.intermediate_size)?,
        ])
    }

    /// The same, ready to whiten with.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn expert(&self, config: &ModelConfig, expert: usize) -> Result<[Gram; 2]> {
        let [input, hidden] = self.sums(config, expert)?;
        Ok([
            Gram::new(config.hidden_size, &input),
            Gram::new(config.moe.intermediate_size, &hidden),
        ])
    }
}

/// The sums of one layer while it is observed.
pub(crate) struct MomentSums {
    /// By expert: `[H, H]` and `[F, F]`; `None` before the first token.
    sums: Vec<Option<[Tensor; 2]>>,
    widths: [usize; 2],
}

impl MomentSums {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self {
            sums: vec![None; config.moe.num_experts],
            widths: [config.hidden_size, config.moe.intermediate_size],
        }
    }

    /// Adds the rows `seen` (places among them) of an expert.
    pub(crate) fn add(&mut self, rows: &ExpertRows<'_>, seen: &Tensor) -> candle_core::Result<()> {
        let gram = |t: &Tensor| -> candle_core::Result<Tensor> {
            let t = t.index_select(seen, 0)?;
            t.t()?.matmul(&t)
        };
        let more = [gram(rows.x)?, gram(rows.h)?];
        let sum = &mut self.sums[rows.expert];
        *sum = Some(match sum.take() {
            Some([input, hidden]) => [(input + &more[0])?, (hidden + &more[1])?],
            None => more,
        });
        Ok(())
    }

    /// The moments of an expert.
    pub(crate) fn expert(&self, expert: usize) -> Result<[Gram; 2]> {
        let [h, f] = self.widths;
        Ok(match &self.sums[expert] {
            Some([input, hidden]) => [
                Gram::new(h, &input.flatten_all()?.to_vec1()?),
                Gram::new(f, &hidden.flatten_all()?.to_vec1()?),
            ],
            None => [Gram::identity(), Gram::identity()],
        })
    }

    /// Writes the file of the layer into `folder`, whole or not at all.
    pub(crate) fn save(&self, folder: &Path, layer: usize, fingerprint: &str) -> Result<()> {
        let mut tensors = Vec::new();
        for (expert, sums) in self.sums.iter().enumerate() {
            for (i, (what, &width)) in ["input", "hidden"].iter().zip(&self.widths).enumerate() {
                let values = sums.as_ref().map(|sums| sums[i].clone());
                let shape = vec![width, width];
                tensors.push((format!("{what}.{expert}"), Block { values, shape }));
            }
        }
        beside::save(file(folder, layer), tensors, fingerprint)
    }
}
