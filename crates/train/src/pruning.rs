//! Rows that training drops: the sparse part of factored bases keeps fewer and fewer of its rows (LoSparse,
//! arXiv 2306.11222, as MC-SMoE, arXiv 2310.01334, uses it).

use crate::Result;
use candle_core::{Tensor, Var};
use rayon::prelude::*;

/// How the rows of the sparse parts become fewer, and which stay. The official code counts its two
/// warm-ups in steps, 1 and 4 times those of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowPruning {
    /// Share of the steps in which all rows stay.
    pub initial: f64,
    /// Share of the steps, at the end, in which no more rows go, though others may stay.
    pub last: f64,
    /// What an importance keeps of its earlier value in each step.
    pub decay: f64,
}

impl Default for RowPruning {
    fn default() -> Self {
        Self {
            initial: 0.05,
            last: 0.2,
            decay: 0.85,
        }
    }
}

impl RowPruning {
    /// How many of `rows` rows stay after `done` of `total` steps, `kept` in the end: a cubic between.
    pub fn kept(&self, done: usize, total: usize, rows: usize, kept: usize) -> usize {
        let (begin, end) = (
            self.initial * total as f64,
            (1.0 - self.last) * total as f64,
        );
        let progress = ((done as f64 - begin) / (end - begin)).clamp(0.0, 1.0);
        let more = rows.saturating_sub(kept) as f64 * (1.0 - progress).powi(3);
        kept + more.round() as usize
    }
}

/// What is known of the rows of one stack of matrices, `[n, rows, in]`.
pub(crate) struct PrunedRows {
    /// How many rows of each matrix stay in the end.
    pub(crate) kept: usize,
    /// The running mean of `|w·∂w|` over each row, `[n · rows]`.
    pub(crate) importance: Vec<f32>,
}

impl PrunedRows {
    pub(crate) fn new(stack: &Tensor, kept: usize) -> Result<Self> {
        let (n, rows, _) = stack.dims3()?;
        Ok(Self {
            kept,
            importance: vec![0.0; n * rows],
        })
    }

    /// Learns from a step: the matrices after it, and the gradient that led there, times `scale`.
    pub(crate) fn observe(
        &mut self,
        stack: &Tensor,
        grad: &Tensor,
        scale: f64,
        decay: f64,
    ) -> Result<()> {
        let width = stack.dim(2)?.max(1);
        let values = |t: &Tensor| Ok::<_, crate::Error>(t.flatten_all()?.to_vec1::<f32>()?);
        let (w, grad) = (values(stack)?, values(grad)?);
        let rows = w.par_chunks(width).zip(grad.par_chunks(width));
        self.importance
            .par_iter_mut()
            .zip(rows)
            .for_each(|(importance, (w, grad))| {
                let sum: f64 = w
                    .iter()
                    .zip(grad)
                    .map(|(w, g)| (f64::from(*w) * f64::from(*g)).abs())
                    .sum();
                let mean = scale * sum / width as f64;
                *importance = (decay * f64::from(*importance) + (1.0 - decay) * mean) as f32;
            });
        Ok(())
    }

    /// Sets all rows of each matrix to zero but the `count` most important, of equal ones the first.
    pub(crate) fn prune(&self, stack: &Var, count: usize) -> Result<()> {
        let (_, rows, width) = stack.dims3()?;
        if count >= rows {
            return Ok(());
        }
        let mut values = stack.flatten_all()?.to_vec1::<f32>()?;
        values
            .par_chunks_mut((rows * width).max(1))
            .zip(self.importance.par_chunks(rows))
            .for_each(|(matrix, importance)| {
                let mut order: Vec<usize> = (0..rows).collect();
                order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]).then(a.cmp(&b)));
                for &row in &order[count..] {
                    matrix[row * width..(row + 1) * width].fill(0.0);
                }
            });
        let shape = stack.shape().clone();
        Ok(stack.set(&Tensor::from_vec(values, shape, stack.device())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn rows_go_by_a_cubic_between_the_corners() {
        let pruning = RowPruning::default();
        let kept = |done| pruning.kept(done, 200, 1000, 100);
        assert_eq!([kept(0), kept(1), kept(10)], [1000; 3]);
        assert_eq!([kept(160), kept(161), kept(200)], [100; 3]);
        // A third and a half of the way from step 10 to 160: 900 · (2/3)³ and 900 · (1/2)³.
        assert_eq!((kept(60), kept(85)), (100 + 267, 100 + 113));
        assert!((0..200).all(|done| kept(done + 1) <= kept(done)));
        // The last step ends with what stays, however few there are.
        for total in 1..9 {
            assert_eq!(pruning.kept(total, total, 1000, 100), 100);
        }
    }

    fn stack(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (2, 3, 2), &Device::Cpu).unwrap()
    }

    /// Two matrices of three rows, reckoned by hand.
    #[test]
    fn importance_is_a_running_mean_and_decides() {
        let w = [1.0, 2.0, -4.0, 0.0, 0.5, 0.5, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0];
        let grad = [1.0, -1.0, 1.0, 9.0, 1.0, 1.0, 5.0, 5.0, 1.0, -1.0, 0.0, 1.0];
        let var = Var::from_tensor(&stack(&w)).unwrap();
        let mut rows = PrunedRows::new(&var, 1).unwrap();
        rows.observe(&var, &stack(&grad), 1.0, 0.85).unwrap();
        let close = |ours: &[f32], expected: [f32; 6]| {
            for (a, b) in ours.iter().zip(expected) {
                assert!((a - b).abs() < 1e-6, "{ours:?} is not {expected:?}");
            }
        };
        // 0.15 times the means 1.5, 2, 0.5 and 0, 1, 1.
        close(&rows.importance, [0.225, 0.3, 0.075, 0.0, 0.15, 0.15]);
        rows.observe(&var, &stack(&grad), 2.0, 0.85).unwrap();
        // 0.85 of that, and 0.15 times twice the means.
        close(
            &rows.importance,
            [0.64125, 0.855, 0.21375, 0.0, 0.4275, 0.4275],
        );
        rows.prune(&var, 3).unwrap();
        let values = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&var), w);
        rows.prune(&var, 1).unwrap();
        let left = [0.0, 0.0, -4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0];
        assert_eq!(values(&var), left);
    }
}
