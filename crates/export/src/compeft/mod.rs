//! What recovery changed, in a small file (ComPEFT, arXiv 2311.13171): of the difference between the
//! recovered model and the built one, only the largest entries are kept, and of those only the sign,
//! coded in a few bits each; one number is the size of all of them.
//!
//! Neither side is ever held: packing goes through both checkpoints several times, tensor by tensor,
//! and unpacking adds to a piece of a tensor what falls into it. In memory lie the coded signs.

mod delta;
mod golomb;
mod ternary;
mod update;

#[cfg(test)]
mod tests;

pub use delta::Delta;
pub use update::{Header, SCHEMA_VERSION, Update};

use crate::{Error, Result, target};
use lightmoe_models::{Checkpoint, CheckpointWriter, Format, Manifest};
use std::path::Path;

/// The file in the folder of an export.
pub const FILE: &str = "update.compeft";

/// Writes the model that `update` makes of `base` as a folder at `target`: every tensor in the element
/// type and the packing of `base`, with its configuration and side files. `target` as for
/// [`crate::export`]. `progress` sees how many layers are done, of how many; its `false` stops the
/// work.
///
/// # Errors
/// [`Error::Target`], [`Error::Interrupted`] and [`Error::Model`] as for [`crate::export`];
/// [`Error::Invalid`] if the update was made from another checkpoint.
pub fn unpack(
    base: Checkpoint,
    update: &Update,
    target: &Path,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<()> {
    target::check(base.dir(), target)?;
    let model = update.apply(base)?;
    let mut manifest = Manifest::of(model.config(), model.layout())?;
    model.keep_types(&mut manifest)?;
    let extras = model.extras()?;
    let format = Format::new(model.dtype(), model.scheme());
    let mut writer = CheckpointWriter::new(target, &format, &manifest, &extras)?;
    writer.copy_extras(&model, &extras)?;
    let (ends, layers) = manifest.parts();
    writer.copy(&model, ends)?;
    for (done, layer) in layers.iter().enumerate() {
        writer.copy(&model, layer)?;
        if !progress(done + 1, layers.len()) {
            return Err(Error::Interrupted);
        }
    }
    writer.copy_side_files(model.dir())?;
    Ok(writer.finish(&model.config().raw)?)
}
