//! One safe-to-read wrapper over the `gemm` crate: strided matrices over slices.

use crate::real::Real;
use std::marker::PhantomData;

/// A read-only matrix over a slice: element `(i, j)` is `data[i * rs + j * cs]`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rs: usize,
    cs: usize,
}

impl<'a, T> Mat<'a, T> {
    /// `rs`, `cs`: distance between neighbouring rows and columns, in elements.
    pub(crate) fn new(data: &'a [T], rs: usize, cs: usize) -> Self {
        Self { data, rs, cs }
    }

    /// The transposed matrix, without a copy.
    pub(crate) fn t(self) -> Self {
        Self {
            data: self.data,
            rs: self.cs,
            cs: self.rs,
        }
    }
}

/// An output that several tasks write at once, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a, T> {
    ptr: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer comes from a `&mut [T]` that lives as long as `Output`; the callers of
// `tile` promise that no two tasks touch the same element.
unsafe impl<T: Send> Send for Output<'_, T> {}
// SAFETY: as above; sharing the handle shares no reference to the elements.
unsafe impl<T: Send> Sync for Output<'_, T> {}

/// A part of an [`Output`]: its first number, and from a row to the next.
#[derive(Clone, Copy)]
pub(crate) struct Part<T> {
    pub(crate) first: *mut T,
    pub(crate) stride: usize,
}

impl<T> Part<T> {
    /// The part from this row and column on.
    ///
    /// # Safety
    /// They are there.
    pub(crate) unsafe fn at(self, row: usize, column: usize) -> Self {
        Self {
            // SAFETY: the caller's promise.
            first: unsafe { self.first.add(row * self.stride + column) },
            ..self
        }
    }
}

impl<'a, T: Real> Output<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self {
            ptr: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }

    /// Copies `data` to `offset`.
    ///
    /// # Safety
    /// No other task may read or write the elements addressed here at the same time.
    pub(crate) unsafe fn write(self, offset: usize, data: &[T]) {
        assert!(offset + data.len() <= self.len, "output row out of bounds");
        // SAFETY: the elements are there, and the caller keeps other tasks away from them; `data` is borrowed,
        // so it is none of them.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.ptr.add(offset), data.len()) };
    }

    /// Where an output of so many rows and columns begins, whose rows are `stride` numbers apart.
    pub(crate) fn part(self, offset: usize, stride: usize, [rows, columns]: [usize; 2]) -> Part<T> {
        let end = match rows * columns {
            0 => offset,
            _ => offset + (rows - 1) * stride + columns,
        };
        assert!(end <= self.len, "output tile out of bounds");
        Part {
            // SAFETY: the offset is within the output, or at its end.
            first: unsafe { self.ptr.add(offset) },
            stride,
        }
    }

    /// `self[offset + i*rs + j*cs] = alpha * (a · b)[i, j] + beta * self[…]` for
    /// `a: [m, k]`, `b: [k, n]`.
    ///
    /// # Safety
    /// No other task may read or write the elements addressed here at the same time.
    #[allow(clippy::too_many_arguments)] // the signature of a matrix product
    pub(crate) unsafe fn matmul(
        self,
        (offset, rs, cs): (usize, usize, usize),
        (m, k, n): (usize, usize, usize),
        a: Mat<'_, T>,
        b: Mat<'_, T>,
        alpha: T,
        beta: T,
    ) {
        if m == 0 || n == 0 {
            return;
        }
        if m.min(n) == 1 && beta == T::one() {
            // To a single row or column `gemm` adds term by term, and to others the sum of three terms and more.
            let mut product = vec![T::zero(); m * n];
            // SAFETY: `product` is this task's own.
            unsafe {
                Output::new(&mut product).matmul((0, n, 1), (m, k, n), a, b, alpha, T::zero())
            };
            for (i, value) in product.into_iter().enumerate() {
                let at = offset + i / n * rs + i % n * cs;
                assert!(at < self.len, "output tile out of bounds");
                // SAFETY: the element is there, and the caller keeps other tasks away from it.
                unsafe { *self.ptr.add(at) = *self.ptr.add(at) + value };
            }
            return;
        }
        assert!(
            offset + (m - 1) * rs + (n - 1) * cs < self.len,
            "output tile out of bounds"
        );
        if k > 0 {
            assert!(
                (m - 1) * a.rs + (k - 1) * a.cs < a.data.len(),
                "left operand out of bounds"
            );
            assert!(
                (k - 1) * b.rs + (n - 1) * b.cs < b.data.len(),
                "right operand out of bounds"
            );
        }
        // SAFETY: the three asserts keep every access inside its slice, and the caller keeps other
        // tasks away from this tile.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                self.ptr.add(offset),
                cs as isize,
                rs as isize,
                beta != T::zero(),
                a.data.as_ptr(),
                a.cs as isize,
                a.rs as isize,
                b.data.as_ptr(),
                b.cs as isize,
                b.rs as isize,
                // gemm computes `dst = alpha * dst + beta * lhs · rhs`.
                beta,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
