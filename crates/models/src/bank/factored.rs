//! Shared bases as a product of low rank and a few rows (MC-SMoE, arXiv 2310.01334, section 3.3, after
//! LoSparse): `B = L·R + S`, where `S` is zero but for the rows that are kept.
//!
//! While training, `S` is a whole matrix, more and more rows of which are set to zero, and stands where
//! an ordinary base does; `L·R` stands beside it as a base's adapter.

use super::{Adapters, Bank, Pick, Projections};
use crate::checkpoint::Checkpoint;
use crate::layout::FactoredBases;
use crate::{Error, Result, names};
use candle_core::{Device, Tensor};
use lightmoe_kernels::{Segment, grouped_linear, spread_columns};
use std::sync::Arc;

/// The factored bases of a layer.
#[derive(Debug, Clone)]
pub struct Factored {
    /// `R` as `lora_A` and `L` as `lora_B`.
    pub factors: Adapters,
    /// The rows of `S` that are kept: gate and up `[n, rows, H]`, down `[n, rows, F]`.
    pub rows: Projections,
    /// Where they stand, u32, ascending for each base: `[n, rows]`.
    pub places: Projections,
}

impl Factored {
    /// Reads the first `count` bases of a layer, which have this `shape`.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        count: usize,
        shape: &FactoredBases,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        // Of a projection, with the numbers of its rows and columns.
        type Make<'a> = dyn Fn(&str, [usize; 2]) -> Result<Tensor> + 'a;
        let each = |make: &Make<'_>| {
            Ok::<_, Error>(Projections {
                gate: make("gate_proj", [f, h])?,
                up: make("up_proj", [f, h])?,
                down: make("down_proj", [h, f])?,
            })
        };
        let stack = |part: &str, projection: &str, shape: [usize; 2]| {
            let name = |base| names::base(layer, base, &format!("{projection}.{part}"));
            checkpoint.stack(&(0..count).map(name).collect::<Vec<_>>(), &shape)
        };
        let places = |projection: &str, out: usize| {
            let name = |base| names::base(layer, base, &format!("{projection}.index"));
            let kept = shape.rows(projection);
            let all = (0..count).map(|base| checkpoint.index(&name(base), kept, out));
            let all = all.collect::<Result<Vec<_>>>()?.concat();
            Ok(Tensor::from_vec(all, (count, kept), &Device::Cpu)?)
        };
        Ok(Self {
            factors: Adapters {
                a: each(&|p, [_, width]| stack("lora_A", p, [shape.rank, width]))?,
                b: each(&|p, [out, _]| stack("lora_B", p, [out, shape.rank]))?,
            },
            rows: each(&|p, [_, width]| stack("rows", p, [shape.rows(p), width]))?,
            places: each(&|p, [out, _]| places(p, out))?,
        })
    }

    /// The tensors of all bases under the names of the checkpoint.
    pub(crate) fn tensors(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        for (part, stacks) in [
            ("lora_A", &self.factors.a),
            ("lora_B", &self.factors.b),
            ("rows", &self.rows),
            ("index", &self.places),
        ] {
            for (projection, stack) in stacks.named() {
                for base in 0..stack.dim(0)? {
                    let name = names::base(layer, base, &format!("{projection}.{part}"));
                    out.push((name, stack.get(base)?));
                }
            }
        }
        Ok(out)
    }

    /// One matrix of base `base` of a layer, multiplied out.
    pub(crate) fn base(
        checkpoint: &Checkpoint,
        (layer, base): (usize, usize),
        projection: &str,
        (shape, [out, width]): (&FactoredBases, [usize; 2]),
    ) -> Result<Tensor> {
        let name = |part: &str| names::base(layer, base, &format!("{projection}.{part}"));
        let kept = shape.rows(projection);
        let a = checkpoint.tensor(&name("lora_A"), &[shape.rank, width])?;
        let b = checkpoint.tensor(&name("lora_B"), &[out, shape.rank])?;
        let rows = checkpoint.tensor(&name("rows"), &[kept, width])?;
        let places = super::index(&checkpoint.index(&name("index"), kept, out)?, &rows)?;
        Ok(b.matmul(&a)?.index_add(&places, &rows, 0)?)
    }

    /// `B·x` of sorted rows, without `B`.
    pub(super) fn apply(
        &self,
        x: &Tensor,
        pick: Pick,
        segments: &Arc<[Segment]>,
    ) -> Result<Tensor> {
        let low = self.factors.apply(x, pick, segments)?;
        let kept = grouped_linear(x, pick(&self.rows), segments)?;
        let places = pick(&self.places).flatten_all()?.to_vec1::<u32>()?;
        Ok((spread_columns(&kept, &places.into(), segments, low.dim(1)?)? + low)?)
    }
}

/// The `count` rows of largest norm of `s: [out, in]`, of equal ones the first: where they stand,
/// ascending, and the rows `[count, in]`.
///
/// # Errors
/// If there are fewer rows.
pub fn largest_rows(s: &Tensor, count: usize) -> Result<(Vec<u32>, Tensor)> {
    let norms = s.sqr()?.sum(1)?.to_vec1::<f32>()?;
    if count > norms.len() {
        return Err(Error::Invalid(format!(
            "{count} rows of a matrix of {}; plan it again",
            norms.len()
        )));
    }
    let mut places: Vec<u32> = (0..norms.len() as u32).collect();
    places.sort_by(|&a, &b| {
        norms[b as usize]
            .total_cmp(&norms[a as usize])
            .then(a.cmp(&b))
    });
    places.truncate(count);
    places.sort_unstable();
    let rows = s.index_select(&super::index(&places, s)?, 0)?;
    Ok((places, rows))
}

impl Bank {
    /// How the bases are stored, if as factors.
    pub fn factored_bases(&self) -> Option<FactoredBases> {
        self.factored_bases
    }

    /// Makes the factored bases ready to train: `S` is all that `bases`, the whole matrices that the
    /// factors stand for, have beside `L·R`.
    ///
    /// # Errors
    /// If the bank has no factored bases, or of another shape.
    pub fn unfold_bases(&mut self, bases: &Projections) -> Result<()> {
        let Some(Factored { factors, .. }) = self.factored.take() else {
            return Err(super::missing("factored bases"));
        };
        let mut rest = bases.clone();
        for ((_, whole), (_, product)) in rest
            .named_mut()
            .into_iter()
            .zip(factors.products()?.named())
        {
            let product = product.to_dtype(whole.dtype())?;
            *whole = (whole.to_device(product.device())? - product)?;
        }
        self.bases = Some(rest);
        self.base_adapters = Some(factors);
        Ok(())
    }

    /// Takes the rows out of `S` that training left; nothing for a bank whose bases are not unfolded.
    ///
    /// # Errors
    /// If more rows are left than the layout has room for: the pruning did not come to its end.
    pub fn fold_bases(&mut self) -> Result<()> {
        let Some(shape) = self.factored_bases else {
            return Ok(());
        };
        let (Some(whole), Some(factors)) = (self.bases.take(), self.base_adapters.take()) else {
            return Ok(());
        };
        let fold = |projection: &str, stack: &Tensor| -> Result<(Tensor, Tensor)> {
            let stack = stack.detach();
            let (mut places, mut rows) = (Vec::new(), Vec::new());
            for base in 0..stack.dim(0)? {
                let s = stack.get(base)?;
                let (at, kept) = largest_rows(&s, shape.rows(projection))?;
                let others = s.index_add(&super::index(&at, &s)?, &kept.neg()?, 0)?;
                if others.abs()?.sum_all()?.to_scalar::<f32>()? > 0.0 {
                    return Err(Error::Invalid(format!(
                        "`{projection}` of base {base} has more rows than the {} that stay; train to \
                         the end before writing it",
                        at.len()
                    )));
                }
                places.push(Tensor::new(at, &Device::Cpu)?);
                rows.push(kept);
            }
            Ok((Tensor::stack(&places, 0)?, Tensor::stack(&rows, 0)?))
        };
        let [gate, up, down] = whole.named().map(|(name, stack)| fold(name, stack));
        let ((gate, up), down) = ((gate?, up?), down?);
        let detached = |side: &Projections| side.map(|t| Ok(t.detach()));
        self.factored = Some(Factored {
            factors: Adapters {
                a: detached(&factors.a)?,
                b: detached(&factors.b)?,
            },
            places: Projections {
                gate: gate.0,
                up: up.0,
                down: down.0,
            },
            rows: Projections {
                gate: gate.1,
                up: up.1,
                down: down.1,
            },
        });
        Ok(())
    }
}
