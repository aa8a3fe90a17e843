//! The one forward pass of the bank.

use super::scales::TokenScales;
use super::{Adapters, Bank, Pick, Projections, RankedAdapters, index, missing};
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_kernels::{
    Dispatch, Segment, add_rows, grouped_linear, linear, select_rows, swiglu, weighted_scatter,
};
use std::ops::Range;
use std::sync::Arc;

/// Tokens that run at once where nobody looks, so that what lies between their products is used again while it is
/// near.
const AT_ONCE: usize = 4096;

/// What is shown of a dense expert that was chosen.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a> {
    /// Its number.
    pub expert: usize,
    /// The places of its rows among the `[T · K]` choices.
    pub pairs: &'a [u32],
    /// What it was given, `[rows, H]`.
    pub x: &'a Tensor,
    /// What its down projection was given, `[rows, F]`.
    pub h: &'a Tensor,
    /// What it gave before it is weighted, `[rows, H]`.
    pub y: &'a Tensor,
}

/// What sees the chosen dense experts.
pub(crate) type BankObserver<'a> = dyn FnMut(&ExpertRows<'_>) -> Result<()> + 'a;

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
    /// Runs the chosen experts: `x: [T, H]`, `gates: [T · K]`, `chosen: [T · K]` expert numbers;
    /// result `[T, H]`, the gate-weighted sum of the experts' outputs.
    pub fn forward(&self, x: &Tensor, gates: &Tensor, chosen: &[u32]) -> Result<Tensor> {
        let run = |x: &Tensor, gates: &Tensor, chosen: &[u32]| {
            self.forward_observed(x, gates, chosen, &mut |_| Ok(()))
        };
        let tokens = x.dim(0)?;
        // What is kept for gradients is no smaller in parts.
        if tokens <= AT_ONCE || x.track_op() || self.has_gradients() {
            return run(x, gates, chosen);
        }
        let per_token = chosen.len() / tokens;
        let parts = (0..tokens).step_by(AT_ONCE).map(|first| {
            let count = AT_ONCE.min(tokens - first);
            let rows = first * per_token..(first + count) * per_token;
            let gates = gates.narrow(0, rows.start, rows.len())?;
            run(&x.narrow(0, first, count)?, &gates, &chosen[rows])
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The same, while `each` sees every dense expert that was chosen.
    pub(crate) fn forward_observed(
        &self,
        x: &Tensor,
        gates: &Tensor,
        chosen: &[u32],
        each: &mut BankObserver<'_>,
    ) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let Some(scales) = &self.scales else {
            return self.run(x, gates, chosen, None, each);
        };
        let (main, scales) = scales.part(gates, chosen, tokens)?;
        // Rows are named by their place among all choices.
        let k = chosen.len() / tokens.max(1);
        let all = |pair: u32| pair as usize / main.per_token * k + pair as usize % main.per_token;
        self.run(x, &main.gates, &main.chosen, Some(&scales), &mut |rows| {
            let pairs: Vec<u32> = rows.pairs.iter().map(|&pair| all(pair) as u32).collect();
            each(&ExpertRows {
                pairs: &pairs,
                ..*rows
            })
        })
    }

    /// The same for the choices that run, their inputs scaled.
    fn run(
        &self,
        x: &Tensor,
        gates: &Tensor,
        chosen: &[u32],
        scales: Option<&TokenScales>,
        each: &mut BankObserver<'_>,
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
            out = Some(self.dense_output(&rows, tokens, scales, each)?);
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
        if let Some(rows) = Rows::select(&dispatch, self.order.mixed(), x, gates)? {
            out = add(out, Some(self.mixed_output(&rows, tokens)?))?;
        }
        let constants = self.order.constant();
        if !constants.is_empty() {
            let all = self.constants.as_ref();
            let all = all.ok_or_else(|| missing("constants"))?;
            let given = given_vectors(all, constants, &dispatch, x, gates)?;
            out = add(out, given)?;
        }
        let share = 1.0 - self.beta;
        if share > 0.0 && !self.order.biased.is_empty() {
            let all = self.biases.as_ref().ok_or_else(|| missing("biases"))?;
            let biased = self.order.biased.iter().copied();
            let given = given_vectors(all, biased, &dispatch, x, gates)?;
            let given = match share {
                1.0 => given,
                share => given.map(|given| given * share).transpose()?,
            };
            out = add(out, given)?;
        }
        out.ok_or_else(|| Error::Invalid("the expert bank was given no tokens".into()))
    }

    /// The sum over all rows of `x: [T, H]` of what each dense expert would give, whether the router
    /// chose it or not: `[dense][H]`.
    pub fn output_sums(&self, x: &Tensor) -> Result<Vec<Vec<f32>>> {
        // The down projection is linear, so it takes the sum.
        let sums = self.each_dense(x, |h| Ok(h.sum_keepdim(0)?))?;
        let row = |sum: Tensor| Ok(sum.flatten_all()?.to_vec1()?);
        sums.into_iter().map(row).collect()
    }

    /// What each dense expert would give for every row of `x: [T, H]`, whether the router chose it or
    /// not: `[T, H]` each.
    pub fn outputs(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.each_dense(x, Ok)
    }

    /// Each dense expert on `x: [T, H]`, with `between` on what its down projection is given.
    fn each_dense(
        &self,
        x: &Tensor,
        between: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let w = self
            .dense
            .as_ref()
            .ok_or_else(|| missing("dense weights"))?;
        let of_expert = |i: usize| -> Result<Tensor> {
            let h = swiglu(&linear(x, &w.gate.get(i)?)?, &linear(x, &w.up.get(i)?)?)?;
            Ok(linear(&between(h)?, &w.down.get(i)?)?)
        };
        (0..self.order.dense).map(of_expert).collect()
    }

    fn mixed_output(&self, rows: &Rows, tokens: usize) -> Result<Tensor> {
        let mixed = self.mixed.as_ref().ok_or_else(|| missing("mixtures"))?;
        let segments = &rows.segments;
        let (gate, up) = (
            mixed.gate.apply(&rows.x, segments)?,
            mixed.up.apply(&rows.x, segments)?,
        );
        let y = mixed.down(&swiglu(&gate, &up)?, segments)?;
        Ok(weighted_scatter(&y, &rows.gates, &rows.tokens, tokens)?)
    }

    /// What the adapted `positions` compute by themselves: adapters, and originals at their share.
    fn own(&self, rows: &Rows, positions: Range<usize>) -> Result<Own> {
        let start = positions.start - self.order.dense;
        let part = |w: &Tensor| Ok(w.narrow(0, start, positions.len())?);
        let adapters = [&self.frozen, &self.adapters].into_iter().flatten();
        let adapters = adapters.map(|adapters| adapters.part(start..start + positions.len()));
        let originals = self.blended()?.map(|w| w.map(part));
        Ok(Own {
            adapters: adapters.collect::<Result<_>>()?,
            originals: originals.transpose()?,
            adapter_share: match self.adapters_fade_in {
                true => 1.0 - self.beta,
                false => 1.0,
            },
            beta: self.beta,
            segments: rows.segments.clone(),
        })
    }

    fn dense_output(
        &self,
        rows: &Rows,
        tokens: usize,
        scales: Option<&TokenScales>,
        each: &mut BankObserver<'_>,
    ) -> Result<Tensor> {
        let Some(w) = &self.dense else {
            return Err(missing("dense weights"));
        };
        let adapters = self.dense_adapters.as_ref();
        let project = |x: &Tensor, pick: Pick| product(w, adapters, x, pick, &rows.segments);
        let scaled = |x: &Tensor, pick: fn(&TokenScales) -> &Tensor| match scales {
            Some(scales) => x * select_rows(pick(scales), &rows.tokens)?.to_dtype(x.dtype())?,
            None => Ok(x.clone()),
        };
        let h = swiglu(
            &project(&scaled(&rows.x, |s| &s.gate)?, |p| &p.gate)?,
            &project(&scaled(&rows.x, |s| &s.up)?, |p| &p.up)?,
        )?;
        let h = scaled(&h, |s| &s.down)?;
        let y = project(&h, |p| &p.down)?;
        for segment in rows.segments.iter().filter(|segment| segment.len > 0) {
            let part = |t: &Tensor| t.narrow(0, segment.start, segment.len);
            each(&ExpertRows {
                expert: self.order.experts[segment.group],
                pairs: &rows.pairs[segment.start..segment.start + segment.len],
                x: &part(&rows.x)?,
                h: &part(&h)?,
                y: &part(&y)?,
            })?;
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
        let (gate, up) = (
            own.apply(&rows.x, |p| &p.gate)?,
            own.apply(&rows.x, |p| &p.up)?,
        );
        let first = self.order.dense;
        let groups = &self.order.groups;
        let pairs = dispatch.token_groups(first, first + groups.len(), groups);
        let pair_x = select_rows(x, &pairs.tokens)?;
        let base = |x: &Tensor, pick: Pick| self.base_product(x, pick, &pairs.segments);
        let with_base = |own: Option<Tensor>, pick: Pick| -> Result<Tensor> {
            let y = base(&pair_x, pick)?;
            Ok(match own {
                Some(own) => add_rows(&own, &y, &pairs.pair_of_row, share)?,
                None => select_rows(&(y * share)?, &pairs.pair_of_row)?,
            })
        };
        let h = swiglu(&with_base(gate, |p| &p.gate)?, &with_base(up, |p| &p.up)?)?;
        let pair_h = weighted_scatter(&h, &rows.gates, &pairs.pair_of_row, pairs.tokens.len())?;
        let pair_y = base(&pair_h, |p| &p.down)?;
        let weights = Tensor::full(share, pairs.tokens.len(), x.device())?.to_dtype(x.dtype())?;
        let base_sum = weighted_scatter(&pair_y, &weights, &pairs.tokens, tokens)?;
        Ok(match own.apply(&h, |p| &p.down)? {
            Some(y) => (base_sum + weighted_scatter(&y, &rows.gates, &rows.tokens, tokens)?)?,
            None => base_sum,
        })
    }

    /// What the bases make of sorted rows, in whichever form they are.
    fn base_product(&self, x: &Tensor, pick: Pick, segments: &Arc<[Segment]>) -> Result<Tensor> {
        if let Some(factored) = &self.factored {
            return factored.apply(x, pick, segments);
        }
        let bases = self.bases.as_ref().ok_or_else(|| missing("bases"))?;
        product(bases, self.base_adapters.as_ref(), x, pick, segments)
    }
}

/// What adapted slots compute by themselves: `β·W·x + U·V·x`, or `β·W·x + (1 − β)·U·V·x`. A plain merge
/// has neither.
struct Own {
    adapters: Vec<RankedAdapters>,
    adapter_share: f64,
    originals: Option<Projections>,
    beta: f64,
    segments: Arc<[Segment]>,
}

impl Own {
    /// One of the three matrices on sorted rows.
    fn apply(&self, x: &Tensor, pick: Pick) -> Result<Option<Tensor>> {
        let mut sum = None;
        for adapters in &self.adapters {
            let mut own = adapters.apply(x, pick, &self.segments)?;
            if self.adapter_share != 1.0 {
                own = (own * self.adapter_share)?;
            }
            sum = add(sum, Some(own))?;
        }
        let original = self
            .originals
            .as_ref()
            .map(|w| Ok::<_, Error>((grouped_linear(x, pick(w), &self.segments)? * self.beta)?));
        add(sum, original.transpose()?)
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
            x: select_rows(x, &tokens)?,
            gates: select_rows(gates, &pairs)?,
            tokens,
            pairs,
            segments: dispatch.segments(start, end),
        }))
    }
}

impl Adapters {
    /// `U·(V·x)` of sorted rows.
    pub(super) fn apply(
        &self,
        x: &Tensor,
        pick: Pick,
        segments: &Arc<[Segment]>,
    ) -> Result<Tensor> {
        let low = grouped_linear(x, pick(&self.a), segments)?;
        Ok(grouped_linear(&low, pick(&self.b), segments)?)
    }
}

/// `(W + U·V)·x` of sorted rows.
fn product(
    w: &Projections,
    adapters: Option<&Adapters>,
    x: &Tensor,
    pick: Pick,
    segments: &Arc<[Segment]>,
) -> Result<Tensor> {
    let y = grouped_linear(x, pick(w), segments)?;
    match adapters {
        Some(adapters) => Ok((y + adapters.apply(x, pick, segments)?)?),
        None => Ok(y),
    }
}

/// What the slots at `positions` give whatever the rows of `x: [T, H]` are, a vector each, `vectors: [n, H]`: the
/// sum over the choices that fall on them, weighted by their gates, `[T, H]`; nothing without any.
fn given_vectors(
    vectors: &Tensor,
    positions: impl Iterator<Item = usize>,
    dispatch: &Dispatch,
    x: &Tensor,
    gates: &Tensor,
) -> Result<Option<Tensor>> {
    let (mut slots, mut rows) = (Vec::new(), Vec::new());
    for (slot, position) in positions.enumerate() {
        let of_position = dispatch.starts[position]..dispatch.starts[position + 1];
        slots.extend(std::iter::repeat_n(slot as u32, of_position.len()));
        rows.extend(of_position);
    }
    if rows.is_empty() {
        return Ok(None);
    }
    let pick = |of: &[u32]| -> Arc<[u32]> { rows.iter().map(|&row| of[row]).collect() };
    let y = vectors.index_select(&index(&slots, vectors)?, 0)?;
    let gates = select_rows(gates, &pick(&dispatch.pairs))?;
    let (y, tokens) = (y.to_dtype(x.dtype())?, pick(&dispatch.tokens));
    Ok(Some(weighted_scatter(&y, &gates, &tokens, x.dim(0)?)?))
}

fn add(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (a, b) {
        (Some(a), Some(b)) => Some((a + b)?),
        (a, b) => a.or(b),
    })
}
