//! A checkpoint of the true shape with random weights, written piece by piece: to measure size,
//! memory and speed of a model without having it.

use crate::Result;
use crate::config::{ModelConfig, torch_dtype};
use crate::layout::BankLayout;
use crate::manifest::Manifest;
use crate::names::{Scheme, layer_of};
use crate::random::{scale, stream};
use crate::writer::{CheckpointWriter, Format};
use candle_core::DType;
use rand::Rng;
use rand_distr::StandardNormal;
use std::path::Path;

/// Numbers that are drawn from one stream.
const PIECE: usize = 1 << 18;

/// Writes a random model `config` to the folder `target`, in `dtype`: matrices Gaussian with
/// standard deviation `1/sqrt(fan in)`, norms one, biases zero. The same seed gives the same bytes.
/// `progress(done, total)` counts layers and may stop the work by `false`; the answer is whether it
/// was finished.
///
/// # Errors
/// What writing brings, too little room on the disk included.
pub fn synthesize(
    config: &ModelConfig,
    dtype: DType,
    seed: u64,
    target: &Path,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<bool> {
    let layout = BankLayout::dense(config);
    let manifest = Manifest::of(config, &layout)?;
    let format = Format::new(dtype, Scheme::published(config.family));
    let writer = CheckpointWriter::new(target, &format, &manifest, &[])?;
    let mut layer = None;
    for (name, shape) in &manifest.tensors {
        let here = layer_of(name);
        if here != layer && !progress(here.unwrap_or(0), config.num_layers) {
            return Ok(false);
        }
        layer = here;
        let std = scale(name.trim_end_matches(".weight"), shape, config) as f32;
        let ones = shape.len() == 1 && std > 0.0;
        writer.fill(name, PIECE, &|piece, values| {
            if ones {
                return values.fill(1.0);
            }
            let mut rng = stream(seed, &format!("synthesize/{name}/{piece}"));
            values.fill_with(|| rng.sample::<f32, _>(StandardNormal) * std);
        })?;
    }
    progress(config.num_layers, config.num_layers);
    let mut raw = layout.annotate(config)?;
    raw["torch_dtype"] = torch_dtype(dtype).into();
    writer.finish(&raw)?;
    Ok(true)
}
