//! Layers that a GPU runs whole, from the router to the sum of the experts.

use super::{Bank, Projections};
use crate::Result;
use crate::config::{GroupScore, MoeConfig, Scoring};
use crate::router::Router;
use candle_core::{Tensor, TensorId};
use lightmoe_kernels::{AdapterParts, Choice, ExpertGroups, LayerParts, TrainedLayer, WholeLayer};
use std::sync::{Arc, Mutex, PoisonError};

/// A layer as a GPU runs it, made when it is first wanted, and again when its tensors are others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Whole(Arc<Mutex<Option<Made>>>);

/// What was made of a layer.
#[derive(Debug, Clone)]
pub(crate) enum Form {
    /// Nothing of it trains, nor what comes before it.
    Still(Arc<WholeLayer>),
    /// It has gradients, by choices of the router that are made before; with the expert of each position.
    Trained(Arc<TrainedLayer>, Tensor),
}

#[derive(Debug)]
struct Made {
    of: (Vec<TensorId>, f64),
    /// Where it does not train, and where it does, as far as that was wanted; nothing where it cannot be run so.
    forms: [Option<Option<Form>>; 2],
}

impl Whole {
    /// Drops what was made, and with it the tensors that it holds.
    pub(crate) fn release(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The layer of this router and bank, for rows like `x: [T, H]`; nothing where it must run step by step.
    pub(crate) fn form(
        &self,
        x: &Tensor,
        router: &Router,
        bank: &Bank,
        moe: &MoeConfig,
    ) -> Result<Option<Form>> {
        if router.weight().device().is_cpu() {
            return Ok(None);
        }
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let choice = choice(moe).filter(|_| bank.is_plain() && bank.fills_groups(moe));
        let Some(choice) = choice else {
            // What was made of other tensors is held no longer.
            *made = None;
            return Ok(None);
        };
        // A layer without replaced experts has no share for them, whatever the schedule says.
        let originals = bank.blended()?.map(three);
        let beta = originals.map_or(0.0, |_| bank.beta);
        let of = (ids(router, bank), beta);
        let trains = x.track_op() || bank.trains() || bank.has_gradients();
        let fits = |form: &Form| match form {
            Form::Still(layer) => x.dtype() == layer.dtype(),
            Form::Trained(layer, _) => x.dtype() == layer.dtype(),
        };
        // What was made of other tensors is held no longer.
        let made = match &mut *made {
            Some(made) if made.of == of => made,
            other => other.insert(Made {
                of,
                forms: Default::default(),
            }),
        };
        if let Some(form) = &made.forms[usize::from(trains)] {
            return Ok(form.clone().filter(fits));
        }
        let order = &bank.order;
        let (adapted, positions) = (order.adapted(), order.constant().end);
        let position = bank.order.position.iter();
        let position: Vec<_> = position.map(|&p| (p < positions).then_some(p)).collect();
        let mut groups: Vec<_> = bank.groups().iter().copied().map(Some).collect();
        // A constant is an adapted position without a base and without components, and its vector.
        groups.resize(positions - adapted.start, None);
        let starts = bank.adapters.as_ref().map(|adapters| {
            let mut starts = adapters.starts.to_vec();
            starts.resize(groups.len() + 1, starts.last().copied().unwrap_or(0));
            starts
        });
        let adapters = bank.adapters.as_ref().zip(starts.as_ref());
        let adapters = adapters.map(|(adapters, starts)| AdapterParts {
            a: three(&adapters.a),
            b: three(&adapters.b),
            starts,
        });
        // What trains has none: constants are of the matrices' type, and biases that train are not.
        let has_vectors = bank.biases.is_some() || bank.constants.is_some();
        let vectors = match trains {
            true => None,
            false => bank.vectors(positions)?,
        };
        let kept = bank.dense_adapters.as_ref();
        let parts = LayerParts {
            router: router.weight(),
            correction: router.correction(),
            choice,
            top_k: moe.top_k,
            position: &position,
            dense: bank.dense.as_ref().map(three),
            bases: bank.bases.as_ref().map(three),
            groups: &groups,
            adapters,
            vectors: vectors.as_ref().map(|(all, of)| (all, &of[..])),
            kept: kept.map(|adapters| [three(&adapters.a), three(&adapters.b)]),
            originals,
            beta,
        };
        let form = match trains {
            true if has_vectors => None,
            true => match TrainedLayer::new(&parts)? {
                Some(layer) => {
                    let experts = order.experts[..positions].iter();
                    let experts: Vec<u32> = experts.map(|&expert| expert as u32).collect();
                    let experts = Tensor::new(experts, x.device())?;
                    Some(Form::Trained(Arc::new(layer), experts))
                }
                None => None,
            },
            false => WholeLayer::new(&parts)?.map(|layer| Form::Still(Arc::new(layer))),
        };
        made.forms[usize::from(trains)] = Some(form.clone());
        Ok(form.filter(fits))
    }
}

/// How a family chooses, if the kernels know it.
fn choice(moe: &MoeConfig) -> Option<Choice> {
    let sigmoid = match moe.scoring {
        Scoring::Softmax => false,
        Scoring::Sigmoid => true,
        Scoring::SparseMixer { .. } => return None,
    };
    Some(Choice {
        sigmoid,
        groups: moe.groups.map(|groups| ExpertGroups {
            count: groups.count,
            kept: groups.chosen,
            two_best: groups.score == GroupScore::TwoBest,
        }),
        renormalize: moe.renormalize,
        scaling: moe.routed_scaling_factor as f32,
    })
}

fn three(of: &Projections) -> [&Tensor; 3] {
    [&of.gate, &of.up, &of.down]
}

/// All stacks that a layer may be made of.
fn stacks(bank: &Bank) -> impl Iterator<Item = &Tensor> {
    let adapters = bank.adapters.iter().flat_map(|of| [&of.a, &of.b]);
    let kept = bank.dense_adapters.iter().flat_map(|of| [&of.a, &of.b]);
    let whole = bank.dense.iter().chain(&bank.bases).chain(&bank.originals);
    whole.chain(adapters).chain(kept).flat_map(three)
}

/// Whatever the layer is made of.
fn ids(router: &Router, bank: &Bank) -> Vec<TensorId> {
    let router = [router.weight()].into_iter().chain(router.correction());
    let vectors = bank.biases.iter().chain(&bank.constants);
    let all = stacks(bank).chain(router).chain(vectors);
    all.map(Tensor::id).collect()
}

impl Bank {
    /// Biases and constants in one, `[n, H]`, and which of them each of the first `positions` has; nothing without.
    fn vectors(&self, positions: usize) -> Result<Option<(Tensor, Vec<Option<usize>>)>> {
        let all: Vec<&Tensor> = self.biases.iter().chain(&self.constants).collect();
        if all.is_empty() {
            return Ok(None);
        }
        let mut of_position = vec![None; positions];
        let with_vectors = self.order.biased.iter().copied();
        let with_vectors = with_vectors.chain(self.order.constant());
        for (vector, position) in with_vectors.enumerate() {
            of_position[position] = Some(vector);
        }
        Ok(Some((Tensor::cat(&all, 0)?, of_position)))
    }

    /// Whether the groups of experts that a token is limited to always have as many as it uses. Else, step by
    /// step, removed experts are chosen and give nothing, which the kernels do not know.
    fn fills_groups(&self, moe: &MoeConfig) -> bool {
        let Some(groups) = &moe.groups else {
            return true;
        };
        let size = moe.num_experts / groups.count;
        let mut present = vec![size; groups.count];
        for expert in self.removed_experts() {
            present[expert / size] -= 1;
        }
        present.sort_unstable();
        present.iter().take(groups.chosen).sum::<usize>() >= moe.top_k
    }

    /// Whether all there is are dense slots, with adapters or without, adapted ones beside whole bases, if any, and
    /// their originals, and constants.
    fn is_plain(&self) -> bool {
        let adapted = self.order.ranks.len();
        let has_others = self.order.mixed > 0
            || self.scales.is_some()
            || self.factored.is_some()
            || self.frozen.is_some()
            || self.base_adapters.is_some();
        // As they are behind a training: then nothing else is of one type either.
        let vectors = self.biases.as_ref().zip(self.constants.as_ref());
        let differ = vectors.is_some_and(|(biases, constants)| biases.dtype() != constants.dtype());
        let fades_in = self.adapters_fade_in && self.beta > 0.0 && self.adapters.is_some();
        !has_others
            && !differ
            && !fades_in
            && (self.adapters.is_some() || self.groups().len() == adapted)
    }
}
