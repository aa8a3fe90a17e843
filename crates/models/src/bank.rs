//! The expert bank: one slot per router output, whatever became of the expert behind it.
//!
//! Slots stand in *positions*: dense slots first, then adapted slots by group, those without one,
//! constants, and removed slots last, so that the rows of each form, and of each group, are
//! consecutive after sorting by position. A dense slot computes with its own matrices; an adapted
//! slot with `β·W + (1−β)·B + U·V`, where `W` is the expert it replaces (only while `β > 0`), `B` the
//! base its group shares, if it has one, and `U·V` its adapter (LightMoE, eq. 6–7). A constant slot
//! gives its vector whatever the input, and a removed one is never chosen. While training, dense
//! slots may carry adapters too.
//!
//! Adapters of different ranks lie in one stack, the narrow ones filled up with zeros, which neither
//! compute nor learn.
//!
//! The products with a base run once per token and group: the gate and up inputs of a token's
//! slots are the same, and the down projection is linear, so `Σ g·(B·h) = B·(Σ g·h)`.

use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_kernels::{Dispatch, Segment, grouped_linear, swiglu, weighted_scatter};
use std::ops::Range;
use std::sync::Arc;

/// The three matrices of `n` experts, stacked.
#[derive(Debug, Clone)]
pub struct Projections {
    /// `[n, F, H]`
    pub gate: Tensor,
    /// `[n, F, H]`
    pub up: Tensor,
    /// `[n, H, F]`
    pub down: Tensor,
}

impl Projections {
    /// The three with their Hugging Face names.
    pub fn named(&self) -> [(&'static str, &Tensor); 3] {
        [
            ("gate_proj", &self.gate),
            ("up_proj", &self.up),
            ("down_proj", &self.down),
        ]
    }

    /// The three after `f`.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            gate: f(&self.gate)?,
            up: f(&self.up)?,
            down: f(&self.down)?,
        })
    }

    /// The same, to change them.
    pub fn named_mut(&mut self) -> [(&'static str, &mut Tensor); 3] {
        [
            ("gate_proj", &mut self.gate),
            ("up_proj", &mut self.up),
            ("down_proj", &mut self.down),
        ]
    }
}

/// Low-rank adapters of `n` experts: `lora_A` `[n, R, in]`, `lora_B` `[n, out, R]` (scale 1).
#[derive(Debug, Clone)]
pub struct Adapters {
    /// `V` of the paper: gate and up `[n, R, H]`, down `[n, R, F]`.
    pub a: Projections,
    /// `U` of the paper: gate and up `[n, F, R]`, down `[n, H, R]`.
    pub b: Projections,
}

/// What is shown of each dense expert that was chosen: its number, the places of its rows among the
/// `[T · K]` choices, and its outputs there before they are weighted, `[rows, H]`.
pub type OutputObserver<'a> = dyn FnMut(usize, &[u32], &Tensor) -> Result<()> + 'a;

/// The experts of one layer.
#[derive(Debug, Clone)]
pub struct Bank {
    /// Which slot stands where.
    pub(crate) order: Order,
    /// Matrices of the dense positions.
    pub dense: Option<Projections>,
    /// Adapters of the dense positions, while training.
    pub dense_adapters: Option<Adapters>,
    /// Shared bases.
    pub bases: Option<Projections>,
    /// Adapters of the adapted positions.
    pub adapters: Option<Adapters>,
    /// Vectors of the constant positions, `[n, H]`.
    pub constants: Option<Tensor>,
    /// The experts that the adapted positions replace, while `beta > 0`.
    pub originals: Option<Projections>,
    /// Share of the originals.
    pub beta: f64,
}

/// The positions of a layer's slots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// Expert of each position: `[E]`.
    pub(crate) experts: Vec<usize>,
    /// Position of each expert: `[E]`.
    pub(crate) position: Vec<usize>,
    /// Group of each adapted position that has one, ascending.
    pub(crate) groups: Vec<usize>,
    /// Rank of each adapted position.
    pub(crate) ranks: Vec<usize>,
    /// How many positions are dense, and constant; what is left is removed.
    pub(crate) dense: usize,
    pub(crate) constants: usize,
}

impl Order {
    /// The adapted positions.
    fn adapted(&self) -> Range<usize> {
        self.dense..self.dense + self.ranks.len()
    }

    /// The constant positions.
    fn constant(&self) -> Range<usize> {
        let start = self.adapted().end;
        start..start + self.constants
    }
}

/// Rows of one form: their inputs, gates and tokens.
struct Rows {
    x: Tensor,
    gates: Tensor,
    tokens: Arc<[u32]>,
    /// Places among the choices.
    pairs: Arc<[u32]>,
    segments: Arc<[Segment]>,
}

impl Bank {
    /// Number of experts.
    pub fn len(&self) -> usize {
        self.order.experts.len()
    }

    /// Whether there are no experts.
    pub fn is_empty(&self) -> bool {
        self.order.experts.is_empty()
    }

    /// The experts of the dense positions, in order.
    pub fn dense_experts(&self) -> &[usize] {
        &self.order.experts[..self.order.dense]
    }

    /// The experts of the adapted positions, in order of their group, those without one last.
    pub fn adapted_experts(&self) -> &[usize] {
        &self.order.experts[self.order.adapted()]
    }

    /// The group of each adapted expert that has one, in the order of [`Bank::adapted_experts`].
    pub fn groups(&self) -> &[usize] {
        &self.order.groups
    }

    /// The experts of the constant positions, in order.
    pub fn constant_experts(&self) -> &[usize] {
        &self.order.experts[self.order.constant()]
    }

    /// The experts that may not be chosen.
    pub fn removed_experts(&self) -> &[usize] {
        &self.order.experts[self.order.constant().end..]
    }

    /// Runs the chosen experts: `x: [T, H]`, `gates: [T · K]`, `chosen: [T · K]` expert numbers;
    /// result `[T, H]`, the gate-weighted sum of the experts' outputs.
    pub fn forward(&self, x: &Tensor, gates: &Tensor, chosen: &[u32]) -> Result<Tensor> {
        self.forward_observed(x, gates, chosen, &mut |_, _, _| Ok(()))
    }

    /// The same, while `each` sees the outputs of every dense expert.
    pub fn forward_observed(
        &self,
        x: &Tensor,
        gates: &Tensor,
        chosen: &[u32],
        each: &mut OutputObserver<'_>,
    ) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let dispatch = Dispatch::new(
            chosen,
            chosen.len() / tokens.max(1),
            &self.order.position,
            self.len(),
        );
        let adapted = self.order.adapted();
        let with_base = adapted.start..adapted.start + self.order.groups.len();
        let without = with_base.end..adapted.end;
        let mut out = None;
        if let Some(rows) = Rows::select(&dispatch, 0..self.order.dense, x, gates)? {
            out = Some(self.dense_output(&rows, tokens, each)?);
        }
        if let Some(rows) = Rows::select(&dispatch, with_base.clone(), x, gates)? {
            let own = self.own(&rows, with_base.clone())?;
            let y = self.based_output(&rows, &own, x, &dispatch, tokens)?;
            out = add(out, Some(y))?;
        }
        if let Some(rows) = Rows::select(&dispatch, without.clone(), x, gates)? {
            let own = self.own(&rows, without)?;
            out = add(out, Some(own.output(&rows, tokens)?))?;
        }
        if let Some(rows) = Rows::select(&dispatch, self.order.constant(), x, gates)? {
            out = add(out, Some(self.constant_output(&rows, tokens)?))?;
        }
        out.ok_or_else(|| Error::Invalid("the expert bank was given no tokens".into()))
    }

    fn constant_output(&self, rows: &Rows, tokens: usize) -> Result<Tensor> {
        let constants = self
            .constants
            .as_ref()
            .ok_or_else(|| missing("constants"))?;
        let slots: Vec<u32> = rows
            .segments
            .iter()
            .flat_map(|segment| std::iter::repeat_n(segment.group as u32, segment.len))
            .collect();
        let y = constants.index_select(&index(&slots)?, 0)?;
        Ok(weighted_scatter(&y, &rows.gates, &rows.tokens, tokens)?)
    }

    /// What the adapted `positions` compute by themselves: adapters, and originals at their share.
    fn own(&self, rows: &Rows, positions: Range<usize>) -> Result<Own> {
        let start = positions.start - self.order.dense;
        let part = |w: &Tensor| Ok(w.narrow(0, start, positions.len())?);
        let adapters = self.adapters.as_ref().map(|adapters| {
            let (a, b) = (adapters.a.map(part)?, adapters.b.map(part)?);
            Ok::<_, Error>(Adapters { a, b })
        });
        let originals = self.blended()?.map(|w| w.map(part));
        Ok(Own {
            adapters: adapters.transpose()?,
            originals: originals.transpose()?,
            beta: self.beta,
            segments: rows.segments.clone(),
        })
    }

    fn dense_output(
        &self,
        rows: &Rows,
        tokens: usize,
        each: &mut OutputObserver<'_>,
    ) -> Result<Tensor> {
        let Some(w) = &self.dense else {
            return Err(missing("dense weights"));
        };
        let adapters = self.dense_adapters.as_ref();
        let project = |x: &Tensor, pick: fn(&Projections) -> &Tensor| -> Result<Tensor> {
            let y = grouped_linear(x, pick(w), &rows.segments)?;
            match adapters {
                Some(adapters) => Ok((y + adapters.apply(x, pick, &rows.segments)?)?),
                None => Ok(y),
            }
        };
        let h = swiglu(
            &project(&rows.x, |p| &p.gate)?,
            &project(&rows.x, |p| &p.up)?,
        )?;
        let y = project(&h, |p| &p.down)?;
        for segment in rows.segments.iter().filter(|segment| segment.len > 0) {
            let pairs = &rows.pairs[segment.start..segment.start + segment.len];
            let outputs = y.narrow(0, segment.start, segment.len)?;
            each(self.order.experts[segment.group], pairs, &outputs)?;
        }
        Ok(weighted_scatter(&y, &rows.gates, &rows.tokens, tokens)?)
    }

    fn based_output(
        &self,
        rows: &Rows,
        own: &Own,
        x: &Tensor,
        dispatch: &Dispatch,
        tokens: usize,
    ) -> Result<Tensor> {
        let share = 1.0 - self.beta;
        // At β = 1 a base has no share, and its gradient is zero.
        if share <= 0.0 {
            return own.output(rows, tokens);
        }
        let bases = self.bases.as_ref().ok_or_else(|| missing("bases"))?;
        let (gate, up) = (
            own.apply(&rows.x, |p| &p.gate)?,
            own.apply(&rows.x, |p| &p.up)?,
        );
        let first = self.order.dense;
        let groups = &self.order.groups;
        let pairs = dispatch.token_groups(first, first + groups.len(), groups);
        let pair_of_row = index(&pairs.pair_of_row)?;
        let pair_x = x.index_select(&index(&pairs.tokens)?, 0)?;
        let with_base = |own: Option<Tensor>, w: &Tensor| -> Result<Tensor> {
            let y = (grouped_linear(&pair_x, w, &pairs.segments)? * share)?;
            let y = y.index_select(&pair_of_row, 0)?;
            Ok(match own {
                Some(own) => (own + y)?,
                None => y,
            })
        };
        let h = swiglu(&with_base(gate, &bases.gate)?, &with_base(up, &bases.up)?)?;
        let pair_h = weighted_scatter(&h, &rows.gates, &pairs.pair_of_row, pairs.tokens.len())?;
        let pair_y = grouped_linear(&pair_h, &bases.down, &pairs.segments)?;
        let weights = Tensor::full(share, pairs.tokens.len(), x.device())?.to_dtype(x.dtype())?;
        let base_sum = weighted_scatter(&pair_y, &weights, &pairs.tokens, tokens)?;
        Ok(match own.apply(&h, |p| &p.down)? {
            Some(y) => (base_sum + weighted_scatter(&y, &rows.gates, &rows.tokens, tokens)?)?,
            None => base_sum,
        })
    }

    /// Sets the share of the originals, brought into `0..=1`; at zero they are dropped from memory
    /// (LightMoE §3.3).
    pub fn anneal(&mut self, beta: f64) {
        self.beta = beta.clamp(0.0, 1.0);
        if self.beta == 0.0 {
            self.originals = None;
        }
    }

    /// Adds the adapters of the dense positions to their matrices and drops the adapters.
    pub fn merge_dense_adapters(&mut self) -> Result<()> {
        if self.dense_adapters.is_some() {
            self.dense = self.whole_dense()?;
            self.dense_adapters = None;
        }
        Ok(())
    }

    /// The originals that take part now.
    pub(crate) fn blended(&self) -> Result<Option<&Projections>> {
        if self.beta <= 0.0 || self.order.ranks.is_empty() {
            return Ok(None);
        }
        let originals = self.originals.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "the expert bank has no originals, but their share is {}; load them, or anneal to \
                 zero",
                self.beta
            ))
        });
        originals.map(Some)
    }

    /// The matrices of the dense positions, adapters added.
    fn whole_dense(&self) -> Result<Option<Projections>> {
        sum([
            self.dense.as_ref().map(|w| scaled(w, 1.0)).transpose()?,
            products(self.dense_adapters.as_ref())?,
        ])
    }
}

/// What adapted slots compute by themselves: `β·W·x + U·V·x`. A plain merge has neither.
struct Own {
    adapters: Option<Adapters>,
    originals: Option<Projections>,
    beta: f64,
    segments: Arc<[Segment]>,
}

impl Own {
    /// One of the three matrices on sorted rows.
    fn apply(&self, x: &Tensor, pick: fn(&Projections) -> &Tensor) -> Result<Option<Tensor>> {
        let adapter = self
            .adapters
            .as_ref()
            .map(|a| a.apply(x, pick, &self.segments));
        let original = self
            .originals
            .as_ref()
            .map(|w| Ok::<_, Error>((grouped_linear(x, pick(w), &self.segments)? * self.beta)?));
        add(adapter.transpose()?, original.transpose()?)
    }

    /// The weighted outputs of slots that have nothing else.
    fn output(&self, rows: &Rows, tokens: usize) -> Result<Tensor> {
        let gate = self.apply(&rows.x, |p| &p.gate)?;
        let up = self.apply(&rows.x, |p| &p.up)?;
        let (Some(gate), Some(up)) = (gate, up) else {
            return Err(missing("adapters"));
        };
        let y = self.apply(&swiglu(&gate, &up)?, |p| &p.down)?;
        let y = y.ok_or_else(|| missing("adapters"))?;
        Ok(weighted_scatter(&y, &rows.gates, &rows.tokens, tokens)?)
    }
}

impl Rows {
    /// The rows of these positions, if there are any.
    fn select(
        dispatch: &Dispatch,
        positions: Range<usize>,
        x: &Tensor,
        gates: &Tensor,
    ) -> Result<Option<Self>> {
        let Range { start, end } = positions;
        let rows = dispatch.starts[start]..dispatch.starts[end];
        if rows.is_empty() {
            return Ok(None);
        }
        let tokens: Arc<[u32]> = dispatch.tokens[rows.clone()].into();
        let pairs: Arc<[u32]> = dispatch.pairs[rows].into();
        Ok(Some(Self {
            x: x.index_select(&index(&tokens)?, 0)?,
            gates: gates.index_select(&index(&pairs)?, 0)?,
            tokens,
            pairs,
            segments: dispatch.segments(start, end),
        }))
    }
}

impl Adapters {
    /// `U·(V·x)` of sorted rows.
    fn apply(
        &self,
        x: &Tensor,
        pick: fn(&Projections) -> &Tensor,
        segments: &Arc<[Segment]>,
    ) -> Result<Tensor> {
        let low = grouped_linear(x, pick(&self.a), segments)?;
        Ok(grouped_linear(&low, pick(&self.b), segments)?)
    }

    /// `U·V` of every expert.
    pub fn products(&self) -> Result<Projections> {
        let product = |a: &Tensor, b: &Tensor| b.detach().matmul(&a.detach());
        Ok(Projections {
            gate: product(&self.a.gate, &self.b.gate)?,
            up: product(&self.a.up, &self.b.up)?,
            down: product(&self.a.down, &self.b.down)?,
        })
    }
}

fn add(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (a, b) {
        (Some(a), Some(b)) => Some((a + b)?),
        (a, b) => a.or(b),
    })
}

/// The sum of what there is, matrix by matrix.
fn sum(parts: impl IntoIterator<Item = Option<Projections>>) -> Result<Option<Projections>> {
    let mut whole: Option<Projections> = None;
    for part in parts.into_iter().flatten() {
        if let Some(whole) = &mut whole {
            for ((_, w), (_, more)) in whole.named_mut().into_iter().zip(part.named()) {
                *w = (&*w + more)?;
            }
        } else {
            whole = Some(part);
        }
    }
    Ok(whole)
}

fn scaled(w: &Projections, factor: f64) -> Result<Projections> {
    if factor == 1.0 {
        return w.map(|w| Ok(w.detach()));
    }
    w.map(|w| Ok((w.detach() * factor)?))
}

fn products(adapters: Option<&Adapters>) -> Result<Option<Projections>> {
    adapters.map(Adapters::products).transpose()
}

fn index(values: &[u32]) -> Result<Tensor> {
    Ok(Tensor::new(values, &candle_core::Device::Cpu)?)
}

fn missing(what: &str) -> Error {
    Error::Invalid(format!(
        "the expert bank has no {what}; build the checkpoint again"
    ))
}
