//! What a model keeps of the tokens that it has read, and how rows come and go in it.

use crate::Result;
use crate::attention::{GROWTH, LayerCache};
use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;

/// Keys and values of all layers.
#[derive(Debug)]
pub struct Cache(pub(crate) Vec<LayerCache>);

/// What is known of a sequence: positions of a row of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    /// The number of the cache.
    pub(crate) cache: usize,
    pub(crate) row: usize,
    pub(crate) positions: Range<usize>,
}

/// What goes into a new cache.
pub(crate) struct Places {
    /// Places among all positions of all rows of all old caches, with their room, `[B · S]`.
    pub(crate) index: Vec<u32>,
    /// Positions of a row that are filled.
    pub(crate) len: usize,
    /// By row, the first position that is no padding.
    pub(crate) starts: Arc<[usize]>,
}

impl Places {
    /// Moves `spans` of `caches` to the end of the rows of a new cache, with `room` behind them.
    fn new(caches: &[Cache], spans: &mut [Span], room: usize) -> Self {
        let mut firsts = vec![0];
        for cache in caches {
            let (rows, positions) = cache.room();
            firsts.push(firsts[firsts.len() - 1] + rows * positions);
        }
        let lengths = spans.iter().map(|span| span.positions.len());
        let len = lengths.max().unwrap_or(0);
        let mut index = Vec::with_capacity(spans.len() * (len + room));
        for (row, span) in spans.iter_mut().enumerate() {
            let first = firsts[span.cache] + span.row * caches[span.cache].room().1;
            let start = len - span.positions.len();
            // What stands in padding and room does not matter: nothing sees it.
            index.extend(repeat_n(0, start));
            index.extend(span.positions.clone().map(|at| (first + at) as u32));
            index.extend(repeat_n(0, room));
            *span = Span {
                cache: 0,
                row,
                positions: start..len,
            };
        }
        Self {
            index,
            len,
            starts: spans.iter().map(|span| span.positions.start).collect(),
        }
    }
}

impl Cache {
    /// The cache of some rows, in the order given; a row may be taken more than once, to go on from the
    /// same beginning in several ways.
    ///
    /// # Errors
    /// If there is no such row.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        if self.len() == 0 {
            let layers = self.0.iter().map(|_| LayerCache::default());
            return Ok(Self(layers.collect()));
        }
        let span = |&row: &u32| Span {
            cache: 0,
            row: row as usize,
            positions: self.start(row as usize)..self.len(),
        };
        let mut spans: Vec<Span> = rows.iter().map(span).collect();
        let places = Places::new(std::slice::from_ref(self), &mut spans, 0);
        let layers = self.0.iter();
        layers
            .map(|layer| LayerCache::gather(&[layer], &places))
            .collect::<Result<_>>()
            .map(Self)
    }

    /// One cache of the rows at `spans`, all of which end at its last position: those that are shorter
    /// have padding before them. `spans` then say where the rows are in it. It has room for some tokens
    /// more.
    ///
    /// # Errors
    /// If a span is at no place of `caches`.
    pub(crate) fn gather(mut caches: Vec<Self>, spans: &mut [Span]) -> Result<Self> {
        let is_same = |cache: &Self| {
            let mut rows = spans.iter().enumerate();
            let same = rows.all(|(row, span)| {
                span.row == row && span.positions == (cache.start(row)..cache.len())
            });
            same && spans.len() == cache.room().0
        };
        if let [cache] = &caches[..]
            && is_same(cache)
        {
            return Ok(caches.remove(0));
        }
        let places = Places::new(&caches, spans, GROWTH);
        let layers = caches.first().map_or(0, |cache| cache.0.len());
        // A layer's old tensors are gone before the next one's are made.
        let mut layer = |l: usize| {
            let take = |cache: &mut Self| std::mem::take(&mut cache.0[l]);
            let parts: Vec<LayerCache> = caches.iter_mut().map(take).collect();
            LayerCache::gather(&parts.iter().collect::<Vec<_>>(), &places)
        };
        (0..layers).map(&mut layer).collect::<Result<_>>().map(Self)
    }

    /// The tokens that are read next end with padding: by row, so many do not. It costs no attention then,
    /// and what a row gives does not depend on how much of it there is.
    pub(crate) fn expect(&mut self, lengths: &[usize]) {
        let lengths: Arc<[usize]> = lengths.into();
        let layers = self.0.iter_mut();
        layers.for_each(|layer| layer.expect(lengths.clone()));
    }

    /// Tokens that were read, with padding.
    pub(crate) fn len(&self) -> usize {
        self.0.first().map_or(0, LayerCache::len)
    }

    /// The first position of a row that is no padding.
    fn start(&self, row: usize) -> usize {
        self.0.first().map_or(0, |layer| layer.start(row))
    }

    /// Number of rows, and of the positions that each has room for.
    fn room(&self) -> (usize, usize) {
        self.0.first().map_or((0, 0), LayerCache::room)
    }

    /// Forgets all but the first `len` positions.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.0.iter_mut().for_each(|layer| layer.truncate(len));
    }
}
