//! A compressed checkpoint as a folder for others: weights, side files and a model card that says
//! what loads it.
//!
//! Invariant: never more in memory than one expert's matrix a thread. Invariant: the target appears
//! whole or not at all.

pub mod compeft;

mod card;
mod error;
mod kind;
mod target;

pub use card::Card;
pub use error::{Error, Result};
pub use kind::ExportKind;

use candle_core::DType;
use lightmoe_models::{
    BankLayout, Checkpoint, CheckpointWriter, ExpertPacking, Format, LayerLayout, Manifest,
    NamedShape, Scheme, SlotLayout, multiplied_out, names, torch_dtype,
};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What to write, and in which element type.
#[derive(Debug, Clone, Copy)]
pub struct ExportOptions {
    /// The kind of export.
    pub kind: ExportKind,
    /// f32, bf16 or f16; `None` keeps that of the source. In 16 bits, base plus adapter are rounded
    /// once more than in the compressed model; f32 keeps its outputs to f32 rounding.
    pub dtype: Option<DType>,
    /// How the experts are packed; `None` keeps that of the source.
    pub packing: Option<ExpertPacking>,
}

impl ExportOptions {
    /// `kind` in the element type of the source.
    pub fn new(kind: ExportKind) -> Self {
        Self {
            kind,
            dtype: None,
            packing: None,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// The kind of export.
    pub kind: ExportKind,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Bytes of the files of weights, headers included.
    pub bytes: u64,
    /// Engine, and whether it loads the result.
    pub loads_in: Vec<(String, String)>,
}

/// Writes `source` as a folder at `target`, layer by layer, with the side files of the source and
/// `card` as its `README.md` (the source's own card is replaced; its licence entry is kept).
///
/// `target` may be new, empty, or an earlier export, which is then replaced as a whole with
/// everything in it. `progress` sees how many layers are done, of how many; its `false` stops the
/// work.
///
/// # Errors
/// [`Error::Target`] if something else stands at `target`, or the source itself;
/// [`Error::Interrupted`]; [`Error::Model`] if the source cannot be read, the result does not fit
/// the element type, or the folder cannot be written. After an error `target` is as it was.
pub fn export(
    source: &Checkpoint,
    target: &Path,
    options: &ExportOptions,
    card: &Card,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<ExportReport> {
    target::check(source.dir(), target)?;
    let scaled = |layout: &LayerLayout| layout.main.is_some();
    if options.kind == ExportKind::Dense && source.layout().layers.values().any(scaled) {
        return Err(Error::Invalid(
            "experts of this model only scale the inputs of others, which no other architecture has; \
             export it as `compact`"
                .to_owned(),
        ));
    }
    let dtype = options.dtype.unwrap_or_else(|| source.dtype());
    let scheme = Scheme {
        packing: options.packing.unwrap_or(source.scheme().packing),
        ..source.scheme()
    };
    let layout = match options.kind {
        ExportKind::Dense => BankLayout::dense(source.config()),
        ExportKind::Compact => source.layout().clone(),
    };
    let mut manifest = Manifest::of(source.config(), &layout)?;
    if options.dtype.is_none() {
        source.keep_types(&mut manifest)?;
    }
    let extras = source.extras()?;
    let format = Format::new(dtype, scheme);
    let mut writer = CheckpointWriter::new(target, &format, &manifest, &extras)?;
    let layers = source.config().num_layers;
    let mut report_progress = |done| match progress(done, layers) {
        true => Ok(()),
        false => Err(Error::Interrupted),
    };
    report_progress(0)?;
    writer.copy_extras(source, &extras)?;
    let (ends, parts) = manifest.parts();
    writer.copy(source, ends)?;
    for (number, tensors) in parts.into_iter().enumerate() {
        write_layer(&writer, source, number, tensors, options.kind)?;
        report_progress(number + 1)?;
    }
    let extra = extras
        .iter()
        .map(|e| e.shape.iter().product::<usize>() as u64);
    let parameters = manifest.parameters() + extra.sum::<u64>();
    let report = ExportReport {
        kind: options.kind,
        parameters,
        bytes: writer.bytes(),
        loads_in: options.kind.loads_in(source),
    };
    let config = config(source, &layout, dtype)?;
    writer.copy_side_files(source.dir())?;
    let old_card = fs::read_to_string(source.dir().join("README.md")).unwrap_or_default();
    let what = options.kind.description(source);
    let text = card.render(&report, what, &card::license_lines(&old_card));
    writer.side_file("README.md", text.as_bytes())?;
    writer.finish(&config)?;
    Ok(report)
}

/// `config.json` of the export: the source's, without the compressed layout if that is gone, and
/// with the element type where the source names one.
fn config(source: &Checkpoint, layout: &BankLayout, dtype: DType) -> Result<Value> {
    let mut raw = layout.annotate(source.config())?;
    let name = torch_dtype(dtype);
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = raw.get_mut(key).filter(|value| !value.is_null()) {
            *value = name.into();
        }
    }
    Ok(raw)
}

/// Writes one layer: what stays is copied, and for a dense export the others are multiplied out.
fn write_layer(
    writer: &CheckpointWriter,
    source: &Checkpoint,
    number: usize,
    tensors: &[NamedShape],
    kind: ExportKind,
) -> Result<()> {
    let slots = source.layout().layers.get(&number);
    let replaced: Vec<usize> = match (kind, slots) {
        (ExportKind::Dense, Some(layout)) => {
            let slots = layout.slots.iter().enumerate();
            let gone = slots.filter(|(_, slot)| **slot != SlotLayout::Dense);
            gone.map(|(expert, _)| expert).collect()
        }
        _ => Vec::new(),
    };
    let (config, mut made) = (source.config(), BTreeMap::new());
    let (h, f) = (config.hidden_size, config.moe.intermediate_size);
    for &expert in &replaced {
        for (projection, shape) in names::PROJECTIONS.into_iter().zip([[f, h], [f, h], [h, f]]) {
            made.insert(
                names::expert(number, expert, projection),
                (expert, projection, shape),
            );
        }
    }
    let kept = tensors.iter().filter(|(name, _)| !made.contains_key(name));
    writer.copy(source, &kept.cloned().collect::<Vec<_>>())?;
    for (name, (expert, projection, shape)) in made {
        let matrix = multiplied_out(source, (number, expert), projection, shape)?;
        writer.push(name, &matrix)?;
    }
    Ok(())
}
