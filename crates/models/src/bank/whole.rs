//! Layers that a GPU runs whole, from the router to the sum of the experts.

use super::{Bank, Projections};
use crate::Result;
use crate::config::{GroupScore, MoeConfig, Scoring};
use crate::router::Router;
use candle_core::{Tensor, TensorId};
use lightmoe_kernels::{AdapterParts, Choice, ExpertGroups, LayerParts, WholeLayer};
use std::sync::{Arc, Mutex, PoisonError};

/// A layer as a GPU runs it, made when it is first wanted, and again when its tensors are others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Whole(Arc<Mutex<Option<Made>>>);

#[derive(Debug)]
struct Made {
    of: Vec<TensorId>,
    /// Nothing where it cannot be run so.
    layer: Option<Arc<WholeLayer>>,
}

impl Whole {
    /// The layer of this router and bank, for rows like `x: [T, H]`; nothing where it must run step by step.
    pub(crate) fn layer(
        &self,
        x: &Tensor,
        router: &Router,
        bank: &Bank,
        moe: &MoeConfig,
    ) -> Result<Option<Arc<WholeLayer>>> {
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
        let of = ids(router, bank);
        let fits = |layer: &Arc<WholeLayer>| !x.track_op() && x.dtype() == layer.dtype();
        if let Some(made) = made.as_ref().filter(|made| made.of == of) {
            return Ok(made.layer.clone().filter(fits));
        }
        let positions = bank.order.adapted().end;
        let position = bank.order.position.iter();
        let position: Vec<_> = position.map(|&p| (p < positions).then_some(p)).collect();
        let mut groups: Vec<_> = bank.groups().iter().copied().map(Some).collect();
        groups.resize(bank.order.ranks.len(), None);
        let adapters = bank.adapters.as_ref().map(|adapters| AdapterParts {
            a: stacks(&adapters.a),
            b: stacks(&adapters.b),
            starts: &adapters.starts,
        });
        let layer = WholeLayer::new(&LayerParts {
            router: router.weight(),
            correction: router.correction(),
            choice,
            top_k: moe.top_k,
            position: &position,
            dense: bank.dense.as_ref().map(stacks),
            bases: bank.bases.as_ref().map(stacks),
            groups: &groups,
            adapters,
        })?;
        let layer = layer.map(Arc::new);
        *made = Some(Made {
            of,
            layer: layer.clone(),
        });
        Ok(layer.filter(fits))
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

fn stacks(of: &Projections) -> [&Tensor; 3] {
    [&of.gate, &of.up, &of.down]
}

/// Whatever the layer is made of.
fn ids(router: &Router, bank: &Bank) -> Vec<TensorId> {
    let adapters = bank.adapters.iter().flat_map(|of| [&of.a, &of.b]);
    let all = bank.dense.iter().chain(&bank.bases).chain(adapters);
    let router = [router.weight()].into_iter().chain(router.correction());
    let all = all.flat_map(stacks).chain(router);
    all.map(Tensor::id).collect()
}

impl Bank {
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

    /// Whether all there is are dense slots, and adapted ones beside whole bases, if any, whose originals have
    /// no share.
    fn is_plain(&self) -> bool {
        let adapted = self.order.ranks.len();
        let has_others = self.order.mixed > 0
            || self.order.constants > 0
            || self.scales.is_some()
            || self.factored.is_some();
        let is_whole = self.adapters.is_some() || self.groups().len() == adapted;
        !has_others && !self.trains() && is_whole && (self.beta <= 0.0 || adapted == 0)
    }
}
