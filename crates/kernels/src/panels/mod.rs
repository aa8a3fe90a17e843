//! Products of rows with matrices by the widest units of the processor, for matrices in f32 or bf16: the vectors of
//! AVX-512, and for bf16 the tile unit (AMX) where there is one. In bf16 an instruction of AVX-512 does twice as
//! many operations as in f32, and matrices are half of the bytes.
//!
//! Matrices are read as they lie. Thirty-two columns at a time are brought into the order that the units want, a
//! *panel*, in *words* of 32 bits: a number in f32, or two in bf16 that follow each other. The next panel is
//! fetched from memory meanwhile, so that many matrices with few rows each take as long as one with all rows.
//!
//! Rows that meet a matrix in bf16 are rounded to bf16. Sums are f32: those of parts of as many words as a panel
//! has, and then the sum of the parts. In f32 a part takes its products in the order of the inputs, as
//! [`few`](crate::few) and `gemm` do; the units for bf16 have orders of their own, and take numbers too small to be
//! normal for zero. What a row gives does not depend on the other rows.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod panel;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vectors;

use crate::gemm::Part;

/// Which way the inputs of a product lie in its matrix.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inputs {
    /// One beside the other: `y = x · wᵀ`, `w: [columns, inner]`.
    InRows,
    /// One below the other: `y = x · w`, `w: [inner, columns]`.
    InColumns,
}

/// A product of `rows` rows of `inner` numbers that gives `columns` numbers of each.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a, 'w, W> {
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
    /// The rows, and the numbers from one to the next.
    pub(crate) x: (&'a [f32], usize),
    /// The matrix, and the numbers from one of its rows to the next.
    pub(crate) w: (&'w [W], usize),
    pub(crate) inputs: Inputs,
}

/// Memory for what is brought into order.
#[derive(Default)]
pub(crate) struct Scratch<'a> {
    /// The rows that are in order, from the first on, their number without and with zeros beside them, their sizes,
    /// and how many numbers make a word: those of a product may be those of the one before.
    of: Option<(&'a [f32], [usize; 5])>,
    /// Words of all rows, part by part.
    rows: Vec<u32>,
    panel: Vec<u32>,
    /// The last columns, where they do not fill a panel.
    rest: Vec<f32>,
}

/// What the processor has for products with matrices of a type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unit {
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Vectors,
}

/// What matrices are stored as.
pub(crate) trait Stored: Copy + Sized {
    /// The fastest unit that there is.
    fn unit() -> Option<Unit>;

    /// Computes `product` and writes it to `out`.
    ///
    /// # Safety
    /// Nobody else uses that part of an output at the same time.
    unsafe fn run<'a>(
        unit: Unit,
        product: &Product<'a, '_, Self>,
        scratch: &mut Scratch<'a>,
        out: Part<f32>,
    );
}

#[cfg(target_arch = "x86_64")]
mod stored {
    use super::{Part, Product, Scratch, Stored, Unit, amx::Tiles, panel, vectors};
    use half::bf16;
    use std::arch::is_x86_feature_detected as has;

    fn has_vectors() -> bool {
        has!("avx512f") && has!("avx512bw")
    }

    impl Stored for f32 {
        fn unit() -> Option<Unit> {
            has_vectors().then_some(Unit::Vectors)
        }

        unsafe fn run<'a>(
            _: Unit,
            product: &Product<'a, '_, Self>,
            scratch: &mut Scratch<'a>,
            out: Part<f32>,
        ) {
            // SAFETY: a `Unit` is made where the processor has its features alone; the caller's promise.
            unsafe { panel::product::<vectors::Singles>(product, scratch, out) };
        }
    }

    impl Stored for bf16 {
        fn unit() -> Option<Unit> {
            // Vectors round rows and make panels for the tile unit too.
            let pairs = has_vectors() && has!("avx512bf16");
            pairs.then(|| match super::amx::is_there() {
                true => Unit::Amx,
                false => Unit::Vectors,
            })
        }

        unsafe fn run<'a>(
            unit: Unit,
            product: &Product<'a, '_, Self>,
            scratch: &mut Scratch<'a>,
            out: Part<f32>,
        ) {
            // SAFETY: a `Unit` is made where the processor has its features alone; the caller's promise.
            unsafe {
                match unit {
                    Unit::Amx => panel::product::<Tiles>(product, scratch, out),
                    Unit::Vectors => panel::product::<vectors::Pairs>(product, scratch, out),
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod stored {
    use super::{Part, Product, Scratch, Stored, Unit};

    macro_rules! nothing {
        ($($stored:ty),*) => {$(
            impl Stored for $stored {
                fn unit() -> Option<Unit> {
                    None
                }

                unsafe fn run<'a>(
                    unit: Unit,
                    _: &Product<'a, '_, Self>,
                    _: &mut Scratch<'a>,
                    _: Part<f32>,
                ) {
                    match unit {}
                }
            }
        )*};
    }
    nothing!(f32, half::bf16);
}
