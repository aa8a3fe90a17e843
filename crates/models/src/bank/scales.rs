//! Compressed experts (arXiv 2503.00634): of the experts that the router chooses for a token, the best
//! few run, and the others only scale what those compute with.
//!
//! Every expert has a vector for what goes into each of its three projections. Those of a token's
//! auxiliary experts, weighted by their gates scaled to sum to one, multiply the inputs of its main
//! experts. All ones change nothing.

use crate::Result;
use candle_core::Tensor;
use lightmoe_kernels::{as_rows, weighted_scatter};

/// The vectors of a layer.
#[derive(Debug, Clone)]
pub struct Scales {
    /// How many of a token's experts run, at least one and fewer than are chosen.
    pub main: usize,
    /// On the input of the gate projection, `[E, H]`.
    pub gate: Tensor,
    /// On the input of the up projection, `[E, H]`.
    pub up: Tensor,
    /// On the input of the down projection, `[E, F]`.
    pub down: Tensor,
}

/// What the auxiliary experts of each token make of it.
pub(super) struct TokenScales {
    /// `[T, H]`
    pub(super) gate: Tensor,
    /// `[T, H]`
    pub(super) up: Tensor,
    /// `[T, F]`
    pub(super) down: Tensor,
}

/// The choices that run: experts `[T · main]`, and their gates.
pub(super) struct Main {
    pub(super) chosen: Vec<u32>,
    pub(super) gates: Tensor,
    pub(super) per_token: usize,
}

impl Scales {
    /// The three with the names of their projections.
    pub fn named(&self) -> [(&'static str, &Tensor); 3] {
        [
            ("gate_proj", &self.gate),
            ("up_proj", &self.up),
            ("down_proj", &self.down),
        ]
    }

    /// The same, to change them.
    pub fn named_mut(&mut self) -> [(&'static str, &mut Tensor); 3] {
        [
            ("gate_proj", &mut self.gate),
            ("up_proj", &mut self.up),
            ("down_proj", &mut self.down),
        ]
    }

    /// Parts the choices of `tokens` tokens, best first, into those that run and what the others make
    /// of the tokens.
    pub(super) fn part(
        &self,
        gates: &Tensor,
        chosen: &[u32],
        tokens: usize,
    ) -> Result<(Main, TokenScales)> {
        let k = chosen.len() / tokens.max(1);
        let of = |range: std::ops::Range<usize>| -> Vec<u32> {
            let each = chosen.chunks_exact(k.max(1));
            each.flat_map(|row| row[range.clone()].iter().copied())
                .collect()
        };
        let rows = gates.reshape((tokens, k))?;
        let part = |start: usize, len: usize| rows.narrow(1, start, len)?.contiguous();
        let others = part(self.main, k - self.main)?;
        let weights = others
            .broadcast_div(&others.sum_keepdim(1)?)?
            .flatten_all()?;
        let experts = Tensor::new(of(self.main..k), gates.device())?;
        let owner: Vec<u32> = (0..tokens as u32)
            .flat_map(|token| std::iter::repeat_n(token, k - self.main))
            .collect();
        let owner = owner.into();
        let scale = |vectors: &Tensor| {
            weighted_scatter(
                &as_rows(&vectors.index_select(&experts, 0)?)?,
                &weights,
                &owner,
                tokens,
            )
        };
        let scales = TokenScales {
            gate: scale(&self.gate)?,
            up: scale(&self.up)?,
            down: scale(&self.down)?,
        };
        let main = Main {
            chosen: of(0..self.main),
            gates: part(0, self.main)?.flatten_all()?,
            per_token: self.main,
        };
        Ok((main, scales))
    }
}
