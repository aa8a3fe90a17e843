//! One layer under work.
//!
//! The base of a group is the mean of its members' weights, weighted by their scores (LightMoE eq. 4),
//! for each of the three matrices; fresh adapters start as Gaussian · zero, so a built model computes
//! with the bases alone until it is recovered. Whitened ones start as the factors of what an expert
//! differs from its base by.

use crate::damage::LayerDamage;
use crate::factor::{Gram, Metric, fitted, whitened};
use crate::inputs::Inputs;
use crate::merge::{merge, nearest};
use crate::methods::{AdapterInit, BaseInit};
use crate::mixture::{self, fit};
use crate::moments::{LayerMoments, Moments};
use crate::observations::LayerObservations;
use crate::plan::{LayerPlan, PlanSettings, SlotForm};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{
    Adapters, Checkpoint, CheckpointWriter, NamedShape, Projections, SlotLayout, largest_rows,
    names,
};
use rayon::prelude::*;

/// Of how many groups or experts the matrices may be held at once, at worst: a thread works on one, but
/// may take another up while it waits for a part of its own.
fn at_once() -> usize {
    4 * rayon::current_num_threads()
}

pub(super) struct Layer<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) seed: u64,
    pub(super) settings: &'a PlanSettings,
    pub(super) plan: Option<&'a LayerPlan>,
    pub(super) observed: Option<&'a LayerObservations>,
    pub(super) moments: Option<&'a Moments>,
    pub(super) damage: Option<LayerDamage>,
    pub(super) inputs: Option<Inputs>,
}

/// Tensors with their names.
pub(super) type Named = Vec<(String, Tensor)>;

impl Layer<'_> {
    /// Writes all tensors of the layer: those that stay, bases, merged experts, adapters, biases, mixtures,
    /// constants.
    pub(super) fn write(&self, tensors: &[NamedShape], writer: &CheckpointWriter) -> Result<()> {
        let Some(plan) = self.plan else {
            return Ok(writer.copy(self.checkpoint, tensors)?);
        };
        let merged: Vec<usize> = (0..plan.slots.len())
            .filter(|&expert| plan.sources(expert).len() > 1)
            .collect();
        let made = [
            ".mlp.bases.",
            ".mlp.basis.",
            ".lora_",
            ".down_proj.bias",
            ".transform.",
            ".mixing.",
            ".constant.",
            ".mlp.scales.",
        ];
        let ours = |name: &str| {
            let own = |&e: &usize| {
                let mut projections = names::PROJECTIONS.iter();
                projections.any(|p| name == names::expert(plan.layer, e, p))
            };
            made.iter().any(|part| name.contains(part)) || merged.iter().any(own)
        };
        let stays = tensors.iter().filter(|(name, _)| !ours(name));
        writer.copy(self.checkpoint, &stays.cloned().collect::<Vec<_>>())?;
        for (name, shape) in tensors
            .iter()
            .filter(|(name, _)| name.contains(".mlp.scales."))
        {
            let ones = Tensor::ones(&shape[..], DType::F32, &Device::Cpu)?;
            push(writer, vec![(name.clone(), ones)])?;
        }
        let groups: Vec<usize> = (0..plan.groups).collect();
        // Only factors of differences and biases need them again.
        let wanted = self.settings.adapters != AdapterInit::Fresh || plan.has_biases();
        let base = |&group: &usize| {
            let whole = self.base(plan, group)?;
            push(writer, self.stored(plan, group, &whole)?)?;
            Ok(wanted.then_some(whole))
        };
        let mut bases = Vec::new();
        for some in groups.chunks(at_once()) {
            let made = some.par_iter().map(base);
            bases.extend(made.collect::<Result<Vec<_>>>()?.into_iter().flatten());
        }
        let merge = |&expert: &usize| self.merged(plan, expert);
        self.each(&merged, merge, writer)?;
        let constants: Vec<usize> = plan.layout().of_form(SlotLayout::Constant).collect();
        let constant = |&expert: &usize| {
            let name = names::constant(plan.layer, expert);
            Ok(vec![(name, self.constant(plan, expert)?)])
        };
        self.each(&constants, constant, writer)?;
        let moments = self.moments.map(|m| m.layer(plan.layer)).transpose()?;
        let layout = plan.layout();
        let adapted: Vec<(usize, Option<usize>, usize)> = layout.adapted().collect();
        let adapters = |&(expert, group, rank): &(usize, Option<usize>, usize)| {
            let base = group.and_then(|group| bases.get(group));
            let mut made = match self.settings.adapters {
                _ if rank == 0 => Vec::new(),
                AdapterInit::Fresh => self.fresh(plan, expert, rank)?,
                AdapterInit::Whitened | AdapterInit::Truncated | AdapterInit::Fitted => {
                    self.factors(plan, expert, base, rank, moments.as_ref())?
                }
            };
            if plan.slots[expert].form.has_bias() {
                let bias = self.bias(plan, expert, base, &made)?;
                made.push((names::bias(plan.layer, expert), bias));
            }
            Ok(made)
        };
        self.each(&adapted, adapters, writer)?;
        let Some(mixture) = plan.mixture() else {
            return Ok(());
        };
        let mixture = |projection: &&str| self.mixture(plan, mixture, projection);
        self.each(&names::MIXED, mixture, writer)
    }

    /// Makes and writes the tensors of `items`.
    fn each<T: Sync>(
        &self,
        items: &[T],
        make: impl Fn(&T) -> Result<Named> + Sync,
        writer: &CheckpointWriter,
    ) -> Result<()> {
        items.chunks(at_once()).try_for_each(|some| {
            some.par_iter()
                .try_for_each(|item| push(writer, make(item)?))
        })
    }

    /// Gate `[F, H]`, up `[F, H]` and down `[H, F]` of an expert of the original.
    pub(super) fn expert(&self, layer: usize, expert: usize) -> Result<[Tensor; 3]> {
        let config = self.checkpoint.config();
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        let read = |projection: &str, shape: [usize; 2]| {
            let name = names::expert(layer, expert, projection);
            self.checkpoint.tensor(&name, &shape)
        };
        let [gate, up, down] = names::PROJECTIONS;
        Ok([read(gate, [f, h])?, read(up, [f, h])?, read(down, [h, f])?])
    }

    /// The mean of some experts, the first of which gives the order of the neurons.
    fn mean(&self, plan: &LayerPlan, members: &[usize]) -> Result<[Tensor; 3]> {
        let scores: Vec<f64> = members.iter().map(|&e| plan.slots[e].weight()).collect();
        let align = self.settings.base == BaseInit::Aligned;
        let weights = |expert: usize| self.expert(plan.layer, expert);
        merge(&weights, members, &scores, align)
    }

    /// The tensors that hold a base. A factored one has the truncated SVD, and of what that leaves the
    /// rows of largest norm: no gradient says yet which matter.
    fn stored(&self, plan: &LayerPlan, group: usize, base: &[Tensor; 3]) -> Result<Named> {
        let name = |part: &str| names::base(plan.layer, group, part);
        let Some(shape) = &plan.factored else {
            return Ok(named(name, base));
        };
        let mut out = Vec::new();
        for (projection, w) in names::PROJECTIONS.iter().zip(base) {
            let factors = whitened(w, &Gram::identity(), shape.rank)?;
            let rest = (w - factors.b.matmul(&factors.a)?)?;
            let (places, rows) = largest_rows(&rest, shape.rows(projection))?;
            let places = Tensor::new(places, &Device::Cpu)?;
            for (part, tensor) in [
                ("lora_A", factors.a),
                ("lora_B", factors.b),
                ("rows", rows),
                ("index", places),
            ] {
                out.push((name(&format!("{projection}.{part}")), tensor));
            }
        }
        Ok(out)
    }

    /// All bases of the layer, whole.
    pub(super) fn bases(&self, plan: &LayerPlan) -> Result<Projections> {
        let groups: Vec<usize> = (0..plan.groups).collect();
        let made = groups.par_iter().map(|&group| self.base(plan, group));
        let made = made.collect::<Result<Vec<_>>>()?;
        let stack =
            |i: usize| Tensor::stack(&made.iter().map(|base| &base[i]).collect::<Vec<_>>(), 0);
        Ok(Projections {
            gate: stack(0)?,
            up: stack(1)?,
            down: stack(2)?,
        })
    }

    /// The three matrices of the base of a group.
    fn base(&self, plan: &LayerPlan, group: usize) -> Result<[Tensor; 3]> {
        let is_dominant = |&expert: &usize| {
            matches!(
                plan.slots[expert].form,
                SlotForm::Adapted { dominant: true, .. }
            )
        };
        let (mut members, others): (Vec<usize>, Vec<usize>) = match self.settings.base {
            BaseInit::Aligned => plan.members(group).partition(is_dominant),
            BaseInit::Common => ((0..plan.slots.len()).collect(), Vec::new()),
            _ => (plan.members(group).collect(), Vec::new()),
        };
        members.extend(others);
        let mean = self.mean(plan, &members)?;
        if let Some(moments) = self
            .moments
            .filter(|_| self.settings.base == BaseInit::LeastSquares)
        {
            let (config, moments) = (self.checkpoint.config(), moments.layer(plan.layer)?);
            let weights = |expert: usize| self.expert(plan.layer, expert);
            return nearest(
                &weights,
                &|expert| moments.sums(config, expert),
                &members,
                mean,
            );
        }
        if self.settings.base != BaseInit::Random {
            return Ok(mean);
        }
        let mut rng = stream(self.seed, &format!("base/{}/{group}", plan.layer));
        let mut random = |mean: &Tensor| gaussian(&mut rng, root_mean_square(mean)?, mean.dims());
        let [gate, up, down] = &mean;
        Ok([random(gate)?, random(up)?, random(down)?])
    }

    /// An expert that others were merged into.
    fn merged(&self, plan: &LayerPlan, expert: usize) -> Result<Named> {
        let mean = self.mean(plan, &plan.sources(expert))?;
        Ok(named(|p| names::expert(plan.layer, expert, p), &mean))
    }

    /// Adapters that do nothing yet.
    fn fresh(&self, plan: &LayerPlan, expert: usize, rank: usize) -> Result<Named> {
        let config = self.checkpoint.config();
        let numbers = (rank, self.seed);
        let fresh = Adapters::fresh(config, plan.layer, &[expert], numbers, &Device::Cpu)?;
        let mut out = Vec::new();
        if let Some(adapters) = fresh {
            for (side, stack) in [("lora_A", &adapters.a), ("lora_B", &adapters.b)] {
                for (projection, tensor) in stack.named() {
                    let name = format!("{projection}.{side}");
                    out.push((names::expert(plan.layer, expert, &name), tensor.get(0)?));
                }
            }
        }
        Ok(out)
    }

    /// Adapters that are the factors of what an expert differs from its base by: by what errors cost if
    /// that is known, else by moments, else those of the weights alone.
    fn factors(
        &self,
        plan: &LayerPlan,
        expert: usize,
        base: Option<&[Tensor; 3]>,
        rank: usize,
        moments: Option<&LayerMoments>,
    ) -> Result<Named> {
        let config = self.checkpoint.config();
        let own = self.expert(plan.layer, expert)?;
        let metrics = match (&self.damage, moments) {
            (Some(damage), _) => {
                let bias = self.inputs.is_none() && plan.slots[expert].form.has_bias();
                damage.metrics(expert, own.each_ref(), bias)?
            }
            (None, Some(moments)) => {
                let [input, hidden] = moments.expert(config, expert)?;
                [input.clone(), input, hidden].map(Metric::of_inputs)
            }
            (None, None) => [(); 3].map(|()| Metric::of_inputs(Gram::identity())),
        };
        let mut out = Vec::new();
        for (i, (w, metric)) in own.iter().zip(&metrics).enumerate() {
            let difference = match base {
                Some(base) => &(w - &base[i])?,
                None => w,
            };
            let factors = fitted(difference, metric, rank)?;
            for (side, tensor) in [("lora_A", factors.a), ("lora_B", factors.b)] {
                let name = format!("{}.{side}", names::PROJECTIONS[i]);
                out.push((names::expert(plan.layer, expert, &name), tensor));
            }
        }
        Ok(out)
    }

    /// The gate or the up matrices of the mixed slots, over `bases` bases of `rank` rows.
    fn mixture(
        &self,
        plan: &LayerPlan,
        (bases, rank): (usize, usize),
        projection: &str,
    ) -> Result<Named> {
        let config = self.checkpoint.config();
        let experts: Vec<usize> = plan.layout().mixed().collect();
        let of = |part: &str| -> Vec<String> {
            let name = |&e: &usize| names::expert(plan.layer, e, &format!("{projection}{part}"));
            experts.iter().map(name).collect()
        };
        let shape = [config.moe.intermediate_size, config.hidden_size];
        let steps = self.settings.fit_steps.unwrap_or(mixture::STEPS);
        let fit = fit(&self.checkpoint.stack(&of(""), &shape)?, bases, rank, steps)?;
        let (layer, loss) = (plan.layer, fit.loss);
        tracing::debug!(layer, projection, loss, "fitted by mixed bases");
        let basis = (0..bases).map(|m| names::basis(plan.layer, m, projection));
        let stacks = [
            (basis.collect(), fit.bases),
            (of(".mixing"), fit.weights),
            (of(".transform"), fit.transforms),
        ];
        let mut out = Vec::new();
        for (names, stack) in stacks {
            for (i, name) in names.into_iter().enumerate() {
                out.push((name, stack.get(i)?));
            }
        }
        Ok(out)
    }

    /// The mean output of an expert over the tokens that chose it, weighted by how much they matter where
    /// that is known; zero if there were none.
    fn constant(&self, plan: &LayerPlan, expert: usize) -> Result<Tensor> {
        if let Some(damage) = &self.damage {
            let [_, _, down] = self.expert(plan.layer, expert)?;
            return damage.constant(expert, &down);
        }
        let width = self.checkpoint.config().hidden_size;
        let seen = self
            .observed
            .and_then(|o| Some((o.outputs.as_ref()?, o.selections[expert])));
        let (outputs, count) = seen.ok_or_else(|| {
            Error::Invalid(format!(
                "layer {}: expert {expert} becomes its mean output, which only observations tell; \
                 give those that `observe` wrote",
                plan.layer
            ))
        })?;
        let sum = &outputs.sum[expert * width..(expert + 1) * width];
        let mean: Vec<f32> = sum
            .iter()
            .map(|s| (s / count.max(1) as f64) as f32)
            .collect();
        Ok(Tensor::new(mean, &Device::Cpu)?)
    }
}

/// Writes what an earlier run did not.
fn push(writer: &CheckpointWriter, tensors: Named) -> Result<()> {
    for (name, tensor) in tensors {
        if !writer.is_done(&name) {
            writer.push(name, &tensor)?;
        }
    }
    Ok(())
}

/// The three matrices under their names.
fn named(name: impl Fn(&str) -> String, matrices: &[Tensor; 3]) -> Named {
    let names = names::PROJECTIONS.iter().map(|p| name(p));
    names.zip(matrices.iter().cloned()).collect()
}

fn root_mean_square(w: &Tensor) -> candle_core::Result<f64> {
    Ok(f64::from(w.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt())
}
