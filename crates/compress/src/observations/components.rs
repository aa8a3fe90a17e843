//! What was observed of the components of the experts' matrices, by which ranks are chosen.

/// The names of the spectra in the file.
pub(super) const SPECTRA: [&str; 3] = ["spectrum_gate", "spectrum_up", "spectrum_down"];
/// The names of [`Damage::own`].
pub(super) const DAMAGES: [&str; 3] = ["damage_gate", "damage_up", "damage_down"];
/// The names of [`Damage::difference`].
pub(super) const DIFFERENCES: [&str; 3] = ["difference_gate", "difference_up", "difference_down"];

/// The names of [`Biased::own`] and [`Biased::difference`].
pub(super) const BIASED: [&str; 2] = ["damage_bias", "difference_bias"];

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

    /// Of singular values: the share of the energy of `expert`, of `experts`, that rank `r` loses, summed
    /// over its three matrices, for `r = 0, 1, …, min(H, F)`: from 3 down to 0.
    pub fn losses(&self, expert: usize, experts: usize) -> Vec<f64> {
        tails(
            [&self.gate, &self.up, &self.down],
            expert,
            experts,
            |values| {
                let total: f64 = values.iter().map(|s| s * s).sum();
                let share = |s: &f64| s * s / total.max(f64::MIN_POSITIVE);
                values.iter().map(share).collect()
            },
        )
    }
}

/// What the components of `expert`, of `experts`, come to together from the `r`th on, for `r = 0, 1, …,
/// min(H, F)`: `of` each, summed over the three matrices.
fn tails(
    matrices: [&Vec<f64>; 3],
    expert: usize,
    experts: usize,
    of: impl Fn(&[f64]) -> Vec<f64>,
) -> Vec<f64> {
    let width = matrices[0].len() / experts.max(1);
    let mut tails = vec![0.0; width + 1];
    for values in matrices {
        let mut tail = 0.0;
        let own = of(&values[expert * width..][..width]);
        for (sum, value) in tails.iter_mut().zip(&own).rev() {
            tail += value;
            *sum += tail;
        }
    }
    tails
}

/// The costs of the components of down where a bias, a vector beside the factors, holds the mean of what they
/// leave out.
#[derive(Debug, Clone, PartialEq)]
pub struct Biased {
    /// `[E * min(H, F)]` row-major: beside the expert's own matrices in factors.
    pub own: Vec<f64>,
    /// The same of the differences from the mean of the layer's experts; `None` where that mean tells too little
    /// of them.
    pub difference: Option<Vec<f64>>,
}

impl Biased {
    /// Puts in the numbers of one expert.
    pub(crate) fn set(&mut self, expert: usize, one: &Self) {
        let difference = self.difference.iter_mut().zip(&one.difference);
        for (all, one) in std::iter::once((&mut self.own, &one.own)).chain(difference) {
            all[expert * one.len()..][..one.len()].copy_from_slice(one);
        }
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
    /// Of the components of down beside a bias; `None` where that was not asked for.
    pub biased: Option<Biased>,
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
        let [of_own, of_difference] = BIASED;
        let biased = self.biased.iter().flat_map(move |biased| {
            let difference = biased.difference.iter();
            let difference = difference.map(move |values| (of_difference, values));
            std::iter::once((of_own, &biased.own)).chain(difference)
        });
        let experts = [("damage_drop", &self.drop), ("damage_mass", &self.mass)];
        let all = own.into_iter().chain(difference).chain(biased);
        all.chain(experts)
    }

    /// The tables of a number a component.
    pub(super) fn wide(&self) -> impl Iterator<Item = &Vec<f64>> {
        let all = std::iter::once(&self.own).chain(&self.difference);
        let all = all.flat_map(|of| [&of.gate, &of.up, &of.down]);
        let biased = self.biased.iter();
        all.chain(biased.flat_map(|of| std::iter::once(&of.own).chain(&of.difference)))
    }

    /// What rank `r` of all three matrices of `expert` costs, for `r = 0, 1, …, min(H, F)`.
    pub fn of_ranks(&self, expert: usize) -> Vec<f64> {
        self.tails(expert, &self.own, &self.own.down)
    }

    /// The same with a bias; `None` where that was not observed.
    pub fn of_biased(&self, expert: usize) -> Option<Vec<f64>> {
        let biased = self.biased.as_ref()?;
        Some(self.tails(expert, &self.own, &biased.own))
    }

    /// As [`Damage::of_ranks`], beside the mean of the layer's experts; `None` where that tells too little of them.
    pub fn of_differences(&self, expert: usize) -> Option<Vec<f64>> {
        let difference = self.difference.as_ref()?;
        Some(self.tails(expert, difference, &difference.down))
    }

    /// The same with a bias; `None` where one or the other was not observed.
    pub fn of_biased_differences(&self, expert: usize) -> Option<Vec<f64>> {
        let down = self.biased.as_ref()?.difference.as_ref()?;
        Some(self.tails(expert, self.difference.as_ref()?, down))
    }

    /// With these costs of down in place of its own.
    fn tails(&self, expert: usize, of: &Components, down: &Vec<f64>) -> Vec<f64> {
        let matrices = [&of.gate, &of.up, down];
        tails(matrices, expert, self.drop.len(), <[f64]>::to_vec)
    }
}
