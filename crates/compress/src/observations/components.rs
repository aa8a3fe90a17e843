//! What was observed of the components of the experts' matrices, by which ranks are chosen.

/// The names of the spectra in the file.
pub(super) const SPECTRA: [&str; 3] = ["spectrum_gate", "spectrum_up", "spectrum_down"];
/// The names of [`Damage::own`].
pub(super) const DAMAGES: [&str; 3] = ["damage_gate", "damage_up", "damage_down"];
/// The names of [`Damage::difference`].
pub(super) const DIFFERENCES: [&str; 3] = ["difference_gate", "difference_up", "difference_down"];

/// A number for each component of the three matrices of each of `E` experts, the largest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Components {
    /// `[E * min(H, F)]` row-major: of the gate projection.
    pub gate: Vec<f64>,
    /// Of the up projection.
    pub up: Vec<f64>,
    /// Of the down projection.
    pub down: Vec<f64>,
}

impl Components {
    /// Zeros for `experts` experts of `width` components.
    pub(crate) fn none(experts: usize, width: usize) -> Self {
        let [gate, up, down] = [(); 3].map(|()| vec![0.0; experts * width]);
        Self { gate, up, down }
    }

    /// Puts in the numbers of one expert.
    pub(crate) fn set(&mut self, expert: usize, values: &[Vec<f64>; 3]) {
        let all = [&mut self.gate, &mut self.up, &mut self.down];
        for (all, own) in all.into_iter().zip(values) {
            all[expert * own.len()..][..own.len()].copy_from_slice(own);
        }
    }

    /// By name in the file.
    pub(super) fn named(
        &self,
        [gate, up, down]: [&'static str; 3],
    ) -> [(&'static str, &Vec<f64>); 3] {
        [(gate, &self.gate), (up, &self.up), (down, &self.down)]
    }

    /// What the components of `expert`, of `experts`, come to together from the `r`th on, for `r = 0, 1, …,
    /// min(H, F)`: `of` each, summed over the three matrices.
    fn tails(&self, expert: usize, experts: usize, of: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        let width = self.gate.len() / experts.max(1);
        let mut tails = vec![0.0; width + 1];
        for values in [&self.gate, &self.up, &self.down] {
            let mut tail = 0.0;
            let own = of(&values[expert * width..][..width]);
            for (sum, value) in tails.iter_mut().zip(&own).rev() {
                tail += value;
                *sum += tail;
            }
        }
        tails
    }

    /// Of singular values: the share of the energy of `expert`, of `experts`, that rank `r` loses, summed
    /// over its three matrices, for `r = 0, 1, …, min(H, F)`: from 3 down to 0.
    pub fn losses(&self, expert: usize, experts: usize) -> Vec<f64> {
        self.tails(expert, experts, |values| {
            let total: f64 = values.iter().map(|s| s * s).sum();
            let share = |s: &f64| s * s / total.max(f64::MIN_POSITIVE);
            values.iter().map(share).collect()
        })
    }
}

/// What it costs the model to leave something of an expert out, in nats for each predicted token, as far
/// as a second-order estimate goes ([`crate::damage`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Damage {
    /// Of the components of the matrices.
    pub own: Components,
    /// Of the components of what they differ by from the mean of the layer's experts, weighted by
    /// `mass`; `None` where that mean tells too little of them.
    pub difference: Option<Components>,
    /// `[E]`: of all but the mean of the outputs.
    pub drop: Vec<f64>,
    /// `[E]`: what an error of unit size counts for, summed over the tokens that chose the expert: the
    /// square of the gate times what errors for the token cost.
    pub mass: Vec<f64>,
}

impl Damage {
    /// By name in the file.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, &Vec<f64>)> {
        let own = self.own.named(DAMAGES);
        let difference = self.difference.iter().flat_map(|d| d.named(DIFFERENCES));
        let experts = [("damage_drop", &self.drop), ("damage_mass", &self.mass)];
        own.into_iter().chain(difference).chain(experts)
    }

    /// The tables of a number a component.
    pub(super) fn wide(&self) -> impl Iterator<Item = &Vec<f64>> {
        let all = std::iter::once(&self.own).chain(&self.difference);
        all.flat_map(|of| [&of.gate, &of.up, &of.down])
    }

    /// What rank `r` of all three matrices of `expert` costs, for `r = 0, 1, …, min(H, F)`.
    pub fn of_ranks(&self, expert: usize) -> Vec<f64> {
        self.own.tails(expert, self.drop.len(), <[f64]>::to_vec)
    }

    /// The same beside the mean of the layer's experts; `None` where that tells too little of them.
    pub fn of_differences(&self, expert: usize) -> Option<Vec<f64>> {
        let difference = self.difference.as_ref()?;
        Some(difference.tails(expert, self.drop.len(), <[f64]>::to_vec))
    }
}
