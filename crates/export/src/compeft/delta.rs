//! The difference that recovery made to a checkpoint.

use super::ternary::{Statistics, signs};
use super::update::{Header, SCHEMA_VERSION, Update};
use crate::{Error, Result};
use lightmoe_models::{Checkpoint, Manifest, NamedShape};
use sha2::{Digest, Sha256};

/// `tau = recovered − start` over the tensors that differ, as one vector: by tensor name in byte
/// order, each row-major. It is read from the checkpoints whenever it is needed.
pub struct Delta<'a> {
    start: &'a Checkpoint,
    recovered: &'a Checkpoint,
    fingerprint: String,
    tensors: Vec<NamedShape>,
    statistics: Statistics,
}

impl<'a> Delta<'a> {
    /// Finds the tensors that differ. `progress` sees how many tensors are done, of how many, in each
    /// of the passes; its `false` stops the work.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the checkpoints are not of one layout, have factored bases, or nothing differs;
    /// [`Error::Interrupted`]; [`Error::Model`] if one cannot be read.
    pub fn between(
        start: &'a Checkpoint,
        recovered: &'a Checkpoint,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Self> {
        let tensors = sorted(start)?;
        if tensors != sorted(recovered)? || start.layout() != recovered.layout() {
            return Err(Error::Invalid(format!(
                "`{}` and `{}` do not have the same tensors; give the model as it was built and as \
                 recovery left it",
                start.dir().display(),
                recovered.dir().display()
            )));
        }
        if start
            .layout()
            .layers
            .values()
            .any(|layer| layer.factored.is_some())
        {
            return Err(Error::Invalid(
                "recovery decides which rows the factored bases of this model keep, which is no \
                 difference of numbers; export it as `compact`"
                    .to_owned(),
            ));
        }
        let mut changed = Vec::new();
        for (done, tensor) in tensors.iter().enumerate() {
            let mut differs = false;
            difference(start, recovered, tensor, &mut |tau| {
                differs |= tau.iter().any(|&t| t != 0.0);
            })?;
            if differs {
                changed.push(tensor.clone());
            }
            go_on(progress(done + 1, tensors.len()))?;
        }
        if changed.is_empty() {
            return Err(Error::Invalid(format!(
                "`{}` does not differ from `{}`: there is nothing to pack",
                recovered.dir().display(),
                start.dir().display()
            )));
        }
        let statistics = Statistics::of(&mut |f| pass((start, recovered), &changed, f, progress))?;
        Ok(Self {
            start,
            recovered,
            fingerprint: fingerprint(start)?,
            tensors: changed,
            statistics,
        })
    }

    /// Numbers in the tensors that differ.
    pub fn parameters(&self) -> u64 {
        self.statistics.n()
    }

    /// Keeps the share `density` of the entries, those of largest magnitude, each as its sign times
    /// `alpha` standard deviations of `tau` (ComPEFT, algorithm 1). The coded entries are held in
    /// memory; `progress` as for [`Delta::between`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if density or alpha cannot work; [`Error::Interrupted`]; [`Error::Model`].
    pub fn pack(
        &self,
        density: f64,
        alpha: f64,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Update> {
        let pair = (self.start, self.recovered);
        let mut through = |f: &mut dyn FnMut(&[f32])| pass(pair, &self.tensors, f, progress);
        let signs = signs(&mut through, &self.statistics, density)?;
        let header = Header {
            schema_version: SCHEMA_VERSION,
            fingerprint: self.fingerprint.clone(),
            density,
            alpha,
            sigma: self.statistics.deviation(),
            n: signs.n(),
            kept: signs.kept(),
            rice_parameter: signs.rice(),
            tensors: self.tensors.clone(),
        };
        Update::new(header, signs).map_err(Error::Invalid)
    }

    /// The model that an update of this difference leaves, as [`Update::apply`] gives it.
    ///
    /// # Errors
    /// [`Error::Model`] if the start cannot be opened again.
    pub fn preview(&self, update: &Update) -> Result<Checkpoint> {
        Ok(update.add_to(Checkpoint::open(self.start.dir())?))
    }
}

/// One pass through the difference of `tensors`.
fn pass(
    (start, recovered): (&Checkpoint, &Checkpoint),
    tensors: &[NamedShape],
    f: &mut dyn FnMut(&[f32]),
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<()> {
    for (done, tensor) in tensors.iter().enumerate() {
        difference(start, recovered, tensor, f)?;
        go_on(progress(done + 1, tensors.len()))?;
    }
    Ok(())
}

/// Shows `f` the difference of one tensor, in pieces; one of its two sides is held.
fn difference(
    start: &Checkpoint,
    recovered: &Checkpoint,
    (name, shape): &NamedShape,
    f: &mut dyn FnMut(&[f32]),
) -> Result<()> {
    let before = start.tensor(name, shape)?.flatten_all()?.to_vec1::<f32>()?;
    let mut left = before.as_slice();
    let mut tau = Vec::new();
    Ok(recovered.pieces(name, shape, &mut |after| {
        let (before, rest) = left.split_at(after.len());
        left = rest;
        tau.clear();
        tau.extend(
            after
                .iter()
                .zip(before)
                .map(|(after, before)| after - before),
        );
        f(&tau);
        Ok(())
    })?)
}

fn go_on(go_on: bool) -> Result<()> {
    match go_on {
        true => Ok(()),
        false => Err(Error::Interrupted),
    }
}

/// The tensors of a checkpoint by name.
fn sorted(checkpoint: &Checkpoint) -> Result<Vec<NamedShape>> {
    let mut tensors = Manifest::of(checkpoint.config(), checkpoint.layout())?.tensors;
    tensors.sort_unstable();
    Ok(tensors)
}

/// SHA-256 of what a checkpoint holds, whatever its shards and packing: its `config.json`, and of
/// every tensor, by name, the name, the shape, the element type and the numbers as f32.
pub(crate) fn fingerprint(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(checkpoint.config().raw.to_string());
    let mut manifest = Manifest::of(checkpoint.config(), checkpoint.layout())?;
    checkpoint.keep_types(&mut manifest)?;
    let most = checkpoint.dtype();
    for (name, shape) in sorted(checkpoint)? {
        let dtype = manifest.types.get(&name).unwrap_or(&most);
        hash.update(format!("\n{name} {shape:?} {}\n", dtype.as_str()));
        checkpoint.pieces(&name, &shape, &mut |values| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            hash.update(bytes);
            Ok(())
        })?;
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
