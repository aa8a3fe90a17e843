//! A sparse vector of signs in a few bits an entry: Golomb-Rice codes of the gaps between entries.
//!
//! An entry is coded as its gap (the zeros since the entry before it), shifted right by the Rice
//! parameter `b`, as that many 1 bits and a 0 bit; the `b` low bits of the gap, most significant
//! first; and a sign bit, 1 for negative. Bits fill bytes from the most significant on, and zeros
//! fill the last byte up.

/// Entries from one mark to the next.
const STRIDE: u64 = 4096;

/// The Rice parameter for `kept` entries of `n`: `max(0, 1 + ⌊log₂(ln(φ − 1) / ln(1 − p))⌋)` with
/// `p = kept / n` and the golden ratio `φ` (ComPEFT, arXiv 2311.13171, section on Golomb coding).
pub(crate) fn rice_parameter(kept: u64, n: u64) -> u32 {
    let p = kept as f64 / n as f64;
    let inverse_golden = (5f64.sqrt() - 1.0) / 2.0;
    let b = 1.0 + (inverse_golden.ln() / (1.0 - p).ln()).log2().floor();
    b.max(0.0) as u32
}

/// Codes entries one after the other.
pub(crate) struct SignsWriter {
    rice: u32,
    /// The least index of the next entry.
    next: u64,
    bytes: Vec<u8>,
    /// Bits of the last byte that are not used yet.
    free: u32,
}

impl SignsWriter {
    pub(crate) fn new(rice: u32) -> Self {
        Self {
            rice,
            next: 0,
            bytes: Vec::new(),
            free: 0,
        }
    }

    /// Adds the entry at `index`, which lies behind all before it.
    pub(crate) fn push(&mut self, index: u64, negative: bool) {
        let gap = index - self.next;
        (0..gap >> self.rice).for_each(|_| self.bit(true));
        self.bit(false);
        (0..self.rice)
            .rev()
            .for_each(|i| self.bit(gap >> i & 1 == 1));
        self.bit(negative);
        self.next = index + 1;
    }

    fn bit(&mut self, bit: bool) {
        if self.free == 0 {
            self.bytes.push(0);
            self.free = 8;
        }
        self.free -= 1;
        if let Some(last) = self.bytes.last_mut() {
            *last |= u8::from(bit) << self.free;
        }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// A coded vector of signs, checked to its last bit.
#[derive(Debug, PartialEq)]
pub(crate) struct Signs {
    n: u64,
    kept: u64,
    rice: u32,
    stream: Vec<u8>,
    /// Where every [`STRIDE`]-th entry begins, to find those of a range without reading all before.
    marks: Vec<Position>,
}

/// Between two entries.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Position {
    /// The least index of the next entry.
    next: u64,
    /// Bits before it.
    bit: u64,
}

impl Signs {
    /// `kept` entries of a vector of `n`, from their stream.
    ///
    /// # Errors
    /// What is wrong with the stream, as part of a sentence.
    pub(crate) fn decode(n: u64, kept: u64, rice: u32, stream: Vec<u8>) -> Result<Self, String> {
        if rice > 62 {
            return Err(format!("a Rice parameter of {rice}, expected at most 62"));
        }
        let mut signs = Self {
            n,
            kept,
            rice,
            stream,
            marks: Vec::new(),
        };
        let mut at = Position::default();
        for entry in 0..kept {
            if entry.is_multiple_of(STRIDE) {
                signs.marks.push(at);
            }
            signs.read(&mut at).ok_or_else(|| {
                format!(
                    "entry {entry} of {kept} ends behind the stream of {} bytes or the vector of {n}",
                    signs.stream.len()
                )
            })?;
        }
        let whole = at.bit.div_ceil(8) == signs.stream.len() as u64;
        if !whole || (at.bit..8 * signs.stream.len() as u64).any(|i| signs.bit(i) != Some(false)) {
            return Err(format!(
                "{} bytes in the stream, of which {} bits are used; expected zeros to the end of \
                 the last byte and nothing behind it",
                signs.stream.len(),
                at.bit
            ));
        }
        Ok(signs)
    }

    pub(crate) fn n(&self) -> u64 {
        self.n
    }

    pub(crate) fn kept(&self) -> u64 {
        self.kept
    }

    pub(crate) fn rice(&self) -> u32 {
        self.rice
    }

    pub(crate) fn stream(&self) -> &[u8] {
        &self.stream
    }

    /// The entries with `start <= index < end`: index, and whether it is negative.
    pub(crate) fn range(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, bool)> + '_ {
        // The last mark with no entry of the range before it.
        let after = self.marks.partition_point(|mark| mark.next <= start);
        let first = after.saturating_sub(1);
        let mut at = self.marks.get(first).copied().unwrap_or_default();
        (first as u64 * STRIDE..self.kept)
            .map_while(move |_| self.read(&mut at))
            .skip_while(move |(index, _)| *index < start)
            .take_while(move |(index, _)| *index < end)
    }

    fn bit(&self, at: u64) -> Option<bool> {
        let byte = self.stream.get(usize::try_from(at / 8).ok()?)?;
        Some(byte >> (7 - at % 8) & 1 == 1)
    }

    /// The entry at a position, which moves behind it; `None` if it leaves the stream or the vector.
    fn read(&self, at: &mut Position) -> Option<(u64, bool)> {
        let mut bit = || {
            let bit = self.bit(at.bit);
            at.bit += 1;
            bit
        };
        let mut gap = 0;
        while bit()? {
            gap += 1;
            if gap > self.n >> self.rice {
                return None;
            }
        }
        for _ in 0..self.rice {
            gap = gap << 1 | u64::from(bit()?);
        }
        let negative = bit()?;
        let index = at.next.checked_add(gap).filter(|index| *index < self.n)?;
        at.next = index + 1;
        Some((index, negative))
    }
}
