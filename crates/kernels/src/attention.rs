//! Causal attention with a backward, blocked over queries so that only a strip of the score
//! matrix exists at a time. Grouped-query: query head `h` reads key head `h / (heads / kv_heads)`.
//!
//! The probabilities are recomputed in the backward instead of kept.

use crate::composed;
use crate::gemm::{Mat, Output};
use crate::lanes::{dot, max, simd, sum};
use crate::real::{Real, dispatch, same_dtype, slice, storage, tracked, view};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Query rows of a strip.
const STRIP: usize = 64;

/// Which keys a query of [`attention`] sees, of its own position and those before it.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// At most so many, its own the last (Mistral, arXiv 2310.06825, section 2). None: all.
    pub window: Option<usize>,
    /// By row of the batch, the first position; keys and values before it are padding. Empty: no row
    /// has any.
    pub starts: Arc<[usize]>,
    /// By row of the batch, how many of the queries, from the first on, are no padding; the others see
    /// nothing, give zero, and their keys are seen by none. Empty: no row has any.
    pub lengths: Arc<[usize]>,
}

impl Seen {
    /// The first position of a row.
    fn start(&self, row: usize) -> usize {
        self.starts.get(row).copied().unwrap_or(0)
    }

    fn check(&self, d: Dims) -> Result<()> {
        if self.window == Some(0) {
            candle_core::bail!("attention: a window of 0 keys, expected at least 1")
        }
        let fits = self.starts.is_empty() || self.starts.len() == d.batch;
        if !fits || self.starts.iter().any(|start| start + d.queries > d.keys) {
            candle_core::bail!(
                "attention: rows that start at {:?} do not fit {} rows of {} keys for {} queries; \
                 give one start a row, before its first query",
                self.starts,
                d.batch,
                d.keys,
                d.queries
            )
        }
        let fits = self.lengths.is_empty() || self.lengths.len() == d.batch;
        if !fits || self.lengths.iter().any(|length| *length > d.queries) {
            candle_core::bail!(
                "attention: rows of {:?} queries do not fit {} rows of {}; give one number a row",
                self.lengths,
                d.batch,
                d.queries
            )
        }
        Ok(())
    }
}

struct Attention {
    scale: f64,
    seen: Seen,
}

/// `q: [B, T, Hq, D]`, `k, v: [B, S, Hkv, D]`; query `t` sees keys `0 ..= S - T + t`.
#[derive(Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    /// From one row of the batch to the next in `k` and in `v`.
    rows: [usize; 2],
}

impl Dims {
    pub(crate) fn new(q: &Shape, k: &Shape, v: &Shape) -> Result<Self> {
        let (batch, queries, heads, dim) = q.dims4()?;
        let (kb, keys, kv_heads, kd) = k.dims4()?;
        if k != v
            || kb != batch
            || kd != dim
            || kv_heads == 0
            || heads % kv_heads != 0
            || keys < queries
        {
            candle_core::bail!("attention: shapes do not fit: q {q:?}, k {k:?}, v {v:?}")
        }
        Ok(Self {
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            dim,
            rows: [keys * kv_heads * dim; 2],
        })
    }

    /// Query rows of the largest strip.
    fn strip(self) -> usize {
        STRIP.min(self.queries)
    }

    /// (batch, key head) pairs: the unit of parallel work, because all query heads of a key head
    /// add to the same key gradient.
    fn units(self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        // Without keys there are no queries either, and nothing to do.
        let batch = if self.keys == 0 { 0 } else { self.batch };
        (0..batch * self.kv_heads)
            .into_par_iter()
            .map(move |i| (i / self.kv_heads, i % self.kv_heads))
    }

    /// Strips of one unit: (query head, first query, queries, visible keys). They depend on nothing but
    /// how long the row is.
    fn strips(
        self,
        seen: &Seen,
        (row, kv_head): (usize, usize),
    ) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let group = self.heads / self.kv_heads;
        let length = seen.lengths.get(row).copied().unwrap_or(self.queries);
        let behind = self.keys - seen.start(row) - self.queries;
        (kv_head * group..(kv_head + 1) * group).flat_map(move |head| {
            (0..length).step_by(STRIP).map(move |t| {
                let n = STRIP.min(length - t);
                (head, t, n, behind + t + n)
            })
        })
    }

    fn q_at(self, batch: usize, t: usize, head: usize) -> usize {
        ((batch * self.queries + t) * self.heads + head) * self.dim
    }

    /// Where keys and values of a unit begin.
    fn kv_at(self, batch: usize, start: usize, kv_head: usize) -> [usize; 2] {
        let within = (start * self.kv_heads + kv_head) * self.dim;
        self.rows.map(|row| batch * row + within)
    }

    fn q_stride(self) -> usize {
        self.heads * self.dim
    }

    fn k_stride(self) -> usize {
        self.kv_heads * self.dim
    }

    /// Softmax probabilities of one strip into `p: [n, visible]`.
    fn probabilities<T: Real>(
        self,
        (q, k): (Mat<'_, T>, Mat<'_, T>),
        (n, visible, window): (usize, usize, usize),
        scale: T,
        p: &mut [T],
    ) {
        // SAFETY: `p` is this task's own buffer.
        unsafe {
            Output::new(p).matmul(
                (0, visible, 1),
                (n, self.dim, visible),
                q,
                k.t(),
                scale,
                T::zero(),
            )
        };
        softmax(p, n, visible, window);
    }
}

simd! {
    /// Softmax of each of the `n` rows of `p: [n, visible]` over what it sees; zero elsewhere.
    fn softmax<T: Real>(p: &mut [T], n: usize, visible: usize, window: usize) {
        for (i, row) in p.chunks_exact_mut(visible).enumerate() {
            let (past, hidden) = row.split_at_mut(visible - n + i + 1);
            let (gone, seen) = past.split_at_mut(past.len().saturating_sub(window));
            gone.fill(T::zero());
            let top = max(seen);
            seen.iter_mut().for_each(|v| *v = (*v - top).fast_exp());
            let inverse = T::one() / sum(seen, |v| v);
            seen.iter_mut().for_each(|v| *v *= inverse);
            hidden.fill(T::zero());
        }
    }
}

simd! {
    /// `ds = p ∘ (ds − dot(dy, y))` for one row.
    fn softmax_backward<T: Real>(p: &[T], ds: &mut [T], y: &[T], dy: &[T]) {
        let dot = dot(y, dy);
        for (ds, &p) in ds.iter_mut().zip(p) {
            *ds = p * (*ds - dot);
        }
    }
}

impl Attention {
    fn window(&self) -> usize {
        self.seen.window.unwrap_or(usize::MAX)
    }

    fn forward<T: Real>(&self, d: Dims, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
        let mut y = vec![T::zero(); q.len()];
        let out = Output::new(&mut y);
        let (qs, ks) = (d.q_stride(), d.k_stride());
        let window = self.window();
        d.units().for_each(|(batch, kv_head)| {
            let mut p = vec![T::zero(); d.strip() * d.keys];
            let start = self.seen.start(batch);
            let [k_at, v_at] = d.kv_at(batch, start, kv_head);
            let (k, v) = (Mat::new(&k[k_at..], ks, 1), Mat::new(&v[v_at..], ks, 1));
            for (head, t, n, visible) in d.strips(&self.seen, (batch, kv_head)) {
                let at = d.q_at(batch, t, head);
                let p = &mut p[..n * visible];
                let q = Mat::new(&q[at..], qs, 1);
                let scale = T::from_f64(self.scale);
                d.probabilities((q, k), (n, visible, window), scale, p);
                let shape = (n, visible, d.dim);
                // SAFETY: every (batch, head, strip) owns its rows and columns of the output.
                unsafe {
                    out.matmul(
                        (at, qs, 1),
                        shape,
                        Mat::new(p, visible, 1),
                        v,
                        T::one(),
                        T::zero(),
                    )
                };
            }
        });
        y
    }

    /// `dv = pᵀ dy`, `ds = p ∘ (dy vᵀ − rowsum(dy ∘ y))`, `dq = scale · ds k`, `dk = scale · dsᵀ q`.
    fn backward<T: Real>(&self, d: Dims, [q, k, v, y, dy]: [&[T]; 5]) -> [Vec<T>; 3] {
        let zeros = |len| vec![T::zero(); len];
        let (mut dq, mut dk, mut dv) = (zeros(q.len()), zeros(k.len()), zeros(v.len()));
        let (out_q, out_k, out_v) = (
            Output::new(&mut dq),
            Output::new(&mut dk),
            Output::new(&mut dv),
        );
        let (qs, ks) = (d.q_stride(), d.k_stride());
        let (one, zero, scale) = (T::one(), T::zero(), T::from_f64(self.scale));
        let window = self.window();
        d.units().for_each(|(batch, kv_head)| {
            let (mut p, mut ds) = (zeros(d.strip() * d.keys), zeros(d.strip() * d.keys));
            let start = self.seen.start(batch);
            let [k_at, v_at] = d.kv_at(batch, start, kv_head);
            let (k, v) = (Mat::new(&k[k_at..], ks, 1), Mat::new(&v[v_at..], ks, 1));
            for (head, t, n, visible) in d.strips(&self.seen, (batch, kv_head)) {
                let at = d.q_at(batch, t, head);
                let (p, ds) = (&mut p[..n * visible], &mut ds[..n * visible]);
                let (q, dyt) = (Mat::new(&q[at..], qs, 1), Mat::new(&dy[at..], qs, 1));
                d.probabilities((q, k), (n, visible, window), scale, p);
                // SAFETY: `ds` is this task's own buffer.
                unsafe {
                    let shape = (n, d.dim, visible);
                    Output::new(ds).matmul((0, visible, 1), shape, dyt, v.t(), one, zero)
                };
                for i in 0..n {
                    let row = at + i * qs..at + i * qs + d.dim;
                    let cells = i * visible..(i + 1) * visible;
                    softmax_backward(&p[cells.clone()], &mut ds[cells], &y[row.clone()], &dy[row]);
                }
                let (p, ds) = (Mat::new(p, visible, 1), Mat::new(ds, visible, 1));
                // SAFETY: every (batch, head, strip) owns its part of dq; one (batch, key head) is
                // one task, so its parts of dk and dv are written by this task alone.
                unsafe {
                    out_v.matmul((v_at, ks, 1), (visible, n, d.dim), p.t(), dyt, one, one);
                    out_q.matmul((at, qs, 1), (n, visible, d.dim), ds, k, scale, zero);
                    out_k.matmul((k_at, ks, 1), (visible, n, d.dim), ds.t(), q, scale, one);
                }
            }
        });
        [dq, dk, dv]
    }
}

/// Whether every row of a batch is contiguous, whatever lies between rows.
pub(crate) fn has_whole_rows(layout: &Layout) -> bool {
    match (layout.dims(), layout.stride()) {
        (&[_, _, heads, dim], &[_, s, h, d]) => (s, h, d) == (heads * dim, dim, 1),
        _ => false,
    }
}

/// The elements from the first row of the batch on.
fn rows<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    if !has_whole_rows(layout) {
        candle_core::bail!("attention: keys and values of contiguous rows were expected")
    }
    Ok(&T::cpu_storage_as_slice(storage)?[layout.start_offset()..])
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), q.dtype(), k.dtype())?;
        let mut d = Dims::new(lq.shape(), lk.shape(), lv.shape())?;
        self.seen.check(d)?;
        d.rows = [lk.stride()[0], lv.stride()[0]];
        let y = dispatch!(q.dtype(), self.name(), T => {
            storage(self.forward::<T>(d, slice(q, lq)?, rows(k, lk)?, rows(v, lv)?))
        });
        Ok((y, lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d = Dims::new(q.shape(), k.shape(), v.shape())?;
        let (k, v, dy) = (&k.contiguous()?, &v.contiguous()?, &dy.contiguous()?);
        let views = [q, k, v, y, dy].map(view);
        dispatch!(q.dtype(), self.name(), T => {
            let [a, b, c, e, f] = &views;
            let slices = [a.slice::<T>()?, b.slice()?, c.slice()?, e.slice()?, f.slice()?];
            let [dq, dk, dv] = self.backward(d, slices);
            Ok((tracked(q, dq)?, tracked(k, dk)?, tracked(v, dv)?))
        })
    }
}

/// Causal softmax attention: `q: [B, T, heads, D]`, `k, v: [B, S, kv_heads, D]` with `S ≥ T` (the
/// queries are the last `T` of the `S` positions); result `[B, T, heads, D]`.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    attention(q, k, v, scale, Seen::default())
}

/// As [`causal_attention`], but a query sees only a part of the keys. The first positions of a longer
/// `k` and `v` are read where they are.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, seen: Seen) -> Result<Tensor> {
    if composed::is_for(q) {
        seen.check(Dims::new(q.shape(), k.shape(), v.shape())?)?;
        return composed::attention(q, k, v, scale, &seen);
    }
    let in_rows = |x: &Tensor| match has_whole_rows(x.layout()) {
        true => Ok(x.clone()),
        false => x.contiguous(),
    };
    let op = Attention { scale, seen };
    q.contiguous()?.apply_op3(&in_rows(k)?, &in_rows(v)?, op)
}
