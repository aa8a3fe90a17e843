//! A compressed checkpoint as a folder for others: weights, side files and a model card that says
//! what loads it.
//!
//! Invariant: never more than one layer in memory. Invariant: the target appears whole or not at
//! all.

mod card;
mod error;
mod kind;
mod target;

pub use card::Card;
pub use error::{Error, Result};
pub use kind::ExportKind;

use candle_core::{DType, Tensor};
use lightmoe_models::{
    BankLayout, Checkpoint, CheckpointWriter, Ends, ExpertPacking, Format, Layer, Manifest, Scheme,
    names,
};
use serde::Serialize;
use serde_json::Value;
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
    /// Bytes of all tensors.
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
    push_all(&mut writer, Ends::load(source)?.tensors()?)?;
    for number in 0..layers {
        let layer = Layer::load(source, number)?;
        match options.kind {
            ExportKind::Compact => push_all(&mut writer, layer.tensors(number)?)?,
            ExportKind::Dense => push_dense(&mut writer, &layer, number)?,
        }
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
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = raw.get_mut(key).filter(|value| !value.is_null()) {
            *value = name.into();
        }
    }
    Ok(raw)
}

fn push_all(writer: &mut CheckpointWriter, tensors: Vec<(String, Tensor)>) -> Result<()> {
    tensors
        .into_iter()
        .try_for_each(|(name, tensor)| Ok(writer.push(name, &tensor)?))
}

/// One layer in the tensors of the original architecture.
fn push_dense(writer: &mut CheckpointWriter, layer: &Layer, number: usize) -> Result<()> {
    push_all(writer, layer.tensors_beside_bank(number)?)?;
    let Some(bank) = layer.bank() else {
        return Ok(());
    };
    let experts = bank.materialise()?;
    for expert in 0..bank.len() {
        for (projection, stack) in experts.named() {
            let name = names::expert(number, expert, projection);
            writer.push(name, &stack.get(expert)?)?;
        }
    }
    Ok(())
}
