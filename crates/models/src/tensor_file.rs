//! One safetensors file, read piece by piece: its header, and numbers of any of its element types.

use crate::{Error, Result};
use candle_core::DType;
use float8::F8E4M3;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Elements that are read and converted at a time.
const READ_ELEMENTS: usize = 1 << 18;
/// A header larger than this is damage, not data.
const MAX_HEADER: u64 = 100 << 20;

/// What is done to the numbers of a tensor as they are read: our name for it, the place of the first
/// number in it, the numbers.
pub(crate) type Change = dyn Fn(&str, usize, &mut [f32]) + Send + Sync;

/// An open file and its header.
pub struct TensorFile {
    pub(crate) path: PathBuf,
    pub(crate) metadata: Metadata,
    /// Of the whole file.
    pub(crate) bytes: u64,
    file: File,
    data_start: u64,
}

/// Bytes that the header of a file of `size` bytes takes, from its first 8.
///
/// # Errors
/// What is wrong with it, as part of a sentence.
pub fn header_length(prefix: [u8; 8], size: u64) -> std::result::Result<u64, String> {
    let header = u64::from_le_bytes(prefix);
    match header.checked_add(8) {
        Some(end) if header <= MAX_HEADER && end <= size => Ok(header),
        _ => Err(format!("a header of {header} bytes in a file of {size}")),
    }
}

/// The header `bytes` of a file with `data` bytes of tensors behind it.
///
/// # Errors
/// What is wrong with it, as part of a sentence.
pub fn parse_header(bytes: &[u8], data: u64) -> std::result::Result<Metadata, String> {
    // `SafeTensors::read_metadata` wants the whole file in memory; the header is plain JSON.
    let metadata: Metadata =
        serde_json::from_slice(bytes).map_err(|e| format!("not safetensors: {e}"))?;
    let described = metadata.data_len() as u64;
    match described == data {
        true => Ok(metadata),
        false => Err(format!(
            "{data} bytes of tensors, but its header describes {described}"
        )),
    }
}

/// How many numbers of each element type a file holds, from its header.
pub fn count_numbers(header: &Metadata) -> BTreeMap<Dtype, u64> {
    let mut counts = BTreeMap::new();
    for info in header.tensors().values() {
        let numbers: usize = info.shape.iter().product();
        *counts.entry(info.dtype).or_insert(0) += numbers as u64;
    }
    counts
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn open(path: PathBuf) -> Result<Self> {
        let fail = |message: &str| {
            Error::tensor(
                &path,
                "(header)",
                format!("{message}; the file is damaged or incomplete, copy or download it again"),
            )
        };
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let size = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        let mut prefix = [0u8; 8];
        file.read_exact_at(&mut prefix, 0)
            .map_err(|_| fail("shorter than 8 bytes"))?;
        let header = header_length(prefix, size).map_err(|message| fail(&message))?;
        let mut bytes = vec![0u8; header as usize];
        file.read_exact_at(&mut bytes, 8)
            .map_err(|e| Error::io(&path, e))?;
        let metadata = parse_header(&bytes, size - 8 - header).map_err(|message| fail(&message))?;
        Ok(Self {
            path,
            file,
            metadata,
            bytes: size,
            data_start: header + 8,
        })
    }

    /// Reads the f32 tensor `name` of this shape, row-major.
    ///
    /// # Errors
    /// Naming the tensor, if it is missing, of another type or shape, truncated or not finite.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let info = self.metadata.info(name);
        let fits = |info: &&safetensors::tensor::TensorInfo| {
            info.dtype == Dtype::F32 && info.shape == shape
        };
        let info = info.filter(fits).ok_or_else(|| {
            let message = format!("no f32 tensor of shape {shape:?} of this name; make it again");
            Error::tensor(&self.path, name, message)
        })?;
        let stored = Stored {
            file: self,
            name: name.to_owned(),
            dtype: Dtype::F32,
            start: info.data_offsets.0 as u64,
            count: shape.iter().product(),
            scales: None,
            change: None,
        };
        let mut values = vec![0f32; stored.count];
        stored.read(&mut values)?;
        Ok(values)
    }

    /// The shape of a tensor, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| &info.shape[..])
    }

    /// An entry of the metadata.
    pub fn entry(&self, key: &str) -> Option<&str> {
        let entries = self.metadata.metadata().as_ref()?;
        entries.get(key).map(String::as_str)
    }
}

/// Numbers of a file: a tensor, or a run of its rows.
pub(crate) struct Stored<'a> {
    pub(crate) file: &'a TensorFile,
    /// The name that errors give.
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Where they begin among the file's data.
    pub(crate) start: u64,
    pub(crate) count: usize,
    /// What FP8 numbers are multiplied by.
    pub(crate) scales: Option<BlockScales>,
    /// Our name for the tensor, and what is done to its numbers.
    pub(crate) change: Option<(String, &'a Change)>,
}

/// One factor for each block of a matrix (DeepSeek-V3, section 3.3.2).
pub(crate) struct BlockScales {
    /// Columns of the matrix.
    pub(crate) columns: usize,
    /// `[rows, columns]` of a block.
    pub(crate) block: [usize; 2],
    /// Row-major, as many as there are blocks.
    pub(crate) values: Vec<f32>,
}

impl BlockScales {
    fn apply(&self, values: &mut [f32], first: usize) {
        let blocks = self.columns.div_ceil(self.block[1]);
        for (i, value) in values.iter_mut().enumerate() {
            let (row, column) = ((first + i) / self.columns, (first + i) % self.columns);
            *value *= self.values[row / self.block[0] * blocks + column / self.block[1]];
        }
    }
}

impl Stored<'_> {
    fn width(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// The element type, where the bytes are the numbers themselves.
    pub(crate) fn plain_dtype(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::BF16 => Some(DType::BF16),
            Dtype::F16 => Some(DType::F16),
            Dtype::U32 => Some(DType::U32),
            _ => None,
        }
    }

    /// Reads all numbers as f32.
    pub(crate) fn read(&self, values: &mut [f32]) -> Result<()> {
        let mut at = 0;
        self.pieces(&mut |piece| {
            values[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
            Ok(())
        })
    }

    /// Reads all numbers as f32, a piece at a time.
    pub(crate) fn pieces(&self, f: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let mut values = vec![0f32; READ_ELEMENTS.min(self.count)];
        self.bytes(&mut |first, bytes| {
            let values = &mut values[..bytes.len() / self.width()];
            match self.dtype {
                Dtype::BF16 => decode(bytes, values, |b| half::bf16::from_le_bytes(b).to_f32()),
                Dtype::F16 => decode(bytes, values, |b| half::f16::from_le_bytes(b).to_f32()),
                // Exact for the places of rows; a damaged one beyond is rounded, and too large.
                Dtype::U32 => decode(bytes, values, |b| u32::from_le_bytes(b) as f32),
                Dtype::F8_E4M3 => {
                    decode(bytes, values, |[b]: [u8; 1]| F8E4M3::from_bits(b).to_f32());
                }
                _ => decode(bytes, values, f32::from_le_bytes),
            }
            if let Some(scales) = &self.scales {
                scales.apply(values, first);
            }
            if let Some((name, change)) = &self.change {
                change(name, first, values);
                round(self.dtype, values);
            }
            // Without an early end, so that the check is vectorised.
            if !values.iter().fold(true, |ok, v| ok & v.is_finite()) {
                let at = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
                return Err(self.not_finite(first + at, values[at]));
            }
            f(values)
        })
    }

    /// The complaint about element `at`.
    pub(crate) fn not_finite(&self, at: usize, value: f32) -> Error {
        let message = format!(
            "element {at} is {value}, not a finite number; the checkpoint is damaged, download or \
             build it again"
        );
        Error::tensor(&self.file.path, &self.name, message)
    }

    /// Reads the bytes of all numbers, a piece at a time: the first element of the piece, its bytes.
    pub(crate) fn bytes(&self, f: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
        let width = self.width();
        let mut buffer = vec![0u8; width * READ_ELEMENTS.min(self.count)];
        for first in (0..self.count).step_by(READ_ELEMENTS) {
            let bytes = &mut buffer[..width * READ_ELEMENTS.min(self.count - first)];
            let at = self.file.data_start + self.start + (first * width) as u64;
            self.file
                .file
                .read_exact_at(bytes, at)
                .map_err(|e| Error::io(&self.file.path, e))?;
            f(first, bytes)?;
        }
        Ok(())
    }
}

/// Rounds numbers to what a file of this element type can hold; FP8 is copied as bf16.
fn round(dtype: Dtype, values: &mut [f32]) {
    let rounded: fn(f32) -> f32 = match dtype {
        Dtype::BF16 | Dtype::F8_E4M3 => |v| half::bf16::from_f32(v).to_f32(),
        Dtype::F16 => |v| half::f16::from_f32(v).to_f32(),
        _ => return,
    };
    values.iter_mut().for_each(|v| *v = rounded(*v));
}

fn decode<const N: usize>(bytes: &[u8], values: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = decode(bytes);
    }
}
