//! Neurons of two experts brought into the same order (M-SMoE, arXiv 2310.01334, section 3.1).
//!
//! The neurons of an expert (rows of gate and up, columns of down) may stand in any order without a
//! change of what it computes. Before two experts are averaged, the second is put into the order in
//! which its neurons are most like those of the first: the assignment that maximises
//! `Σ ⟨gate₁, gate₂⟩ + ⟨up₁, up₂⟩ + ⟨down₁, down₂⟩` over the pairs of neurons.

use crate::{Error, Result};
use candle_core::Tensor;

/// The order of the neurons of `expert` that is most like `reference`: the number of the neuron that
/// takes each place, `[F]`. Both are gate `[F, H]`, up `[F, H]` and down `[H, F]`.
///
/// # Errors
/// If the weights are not finite.
pub fn permutation(reference: &[Tensor; 3], expert: &[Tensor; 3]) -> Result<Vec<u32>> {
    let [gate, up, down] = reference;
    let [other_gate, other_up, other_down] = expert;
    let alike = (gate.matmul(&other_gate.t()?)? + up.matmul(&other_up.t()?)?)?;
    let alike = (alike + down.t()?.matmul(other_down)?)?;
    let neurons = alike.dim(0)?;
    let alike = alike.flatten_all()?.to_vec1::<f32>()?;
    let alike: Vec<f64> = alike.into_iter().map(f64::from).collect();
    let (_, order) = lsap::solve(neurons, neurons, &alike, true).map_err(|e| {
        Error::Invalid(format!(
            "the neurons of two experts cannot be compared ({e:?}); the weights are damaged, \
             download the model again"
        ))
    })?;
    Ok(order.into_iter().map(|neuron| neuron as u32).collect())
}

/// `expert` with its neurons in this order.
///
/// # Errors
/// If the order is of another number of neurons.
pub fn permuted(expert: &[Tensor; 3], order: &[u32]) -> Result<[Tensor; 3]> {
    let order = Tensor::new(order, expert[0].device())?;
    let [gate, up, down] = expert;
    Ok([
        gate.index_select(&order, 0)?,
        up.index_select(&order, 0)?,
        down.index_select(&order, 1)?,
    ])
}
