//! The bank from and to the tensors of a checkpoint.

use crate::bank::{Adapters, Bank, Projections};
use crate::checkpoint::Checkpoint;
use crate::layout::{LayerLayout, SlotLayout};
use crate::{Error, Result, names};
use candle_core::Tensor;

impl Bank {
    /// The positions of a layout: dense experts first, then adapted ones by group and number.
    pub(crate) fn positions(layout: &LayerLayout) -> (Vec<usize>, Vec<usize>, Vec<usize>) {
        let mut experts: Vec<usize> = (0..layout.slots.len())
            .filter(|&e| layout.slots[e] == SlotLayout::Dense)
            .collect();
        let mut adapted: Vec<_> = layout.adapted().map(|(e, group, _)| (group, e)).collect();
        adapted.sort_unstable();
        let groups = adapted.iter().filter_map(|(group, _)| *group).collect();
        experts.extend(adapted.iter().map(|(_, e)| e));
        let mut position = vec![0; experts.len()];
        for (p, &e) in experts.iter().enumerate() {
            position[e] = p;
        }
        (experts, position, groups)
    }

    /// A bank of nothing but dense slots.
    pub(crate) fn of_dense(layout: &LayerLayout, dense: Projections) -> Self {
        Self {
            dense: Some(dense),
            ..Self::empty(layout)
        }
    }

    /// A bank without its weights.
    pub(crate) fn empty(layout: &LayerLayout) -> Self {
        let (experts, position, groups) = Self::positions(layout);
        Self {
            experts,
            position,
            groups,
            dense: None,
            dense_adapters: None,
            bases: None,
            adapters: None,
            originals: None,
            beta: 0.0,
        }
    }

    /// Reads the bank of one layer.
    pub fn load(checkpoint: &Checkpoint, layer: usize, layout: &LayerLayout) -> Result<Self> {
        let (experts, position, groups) = Self::positions(layout);
        let adapted = layout.adapted().count();
        let (dense, replaced) = experts.split_at(experts.len() - adapted);
        let bases: Vec<usize> = (0..layout.bases()).collect();
        let shared = if bases.is_empty() {
            None
        } else {
            let name = |g, p: &str| names::base(layer, g, p);
            Some(load_stack(checkpoint, &bases, whole(checkpoint), name)?)
        };
        let rank = layout.rank();
        let adapters = if replaced.is_empty() || rank == 0 {
            None
        } else {
            Some(load_adapters(checkpoint, layer, replaced, rank)?)
        };
        Ok(Self {
            dense: load_experts(checkpoint, layer, dense)?,
            dense_adapters: None,
            bases: shared,
            adapters,
            originals: None,
            beta: 0.0,
            experts,
            position,
            groups,
        })
    }

    /// The tensors of the bank under the names of the checkpoint. Such a checkpoint has no adapters
    /// of dense slots and no originals: a bank that still computes with them is an error.
    pub fn tensors(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        if self.dense_adapters.is_some() || self.blended()?.is_some() {
            return Err(Error::Invalid(format!(
                "layer {layer} still computes with adapters of kept experts or with originals; \
                 merge the adapters and anneal to zero before writing it"
            )));
        }
        let mut out = Vec::new();
        let mut unstack = |stack: &Projections, ids: &[usize], suffix: &str, of_base: bool| {
            for (i, &id) in ids.iter().enumerate() {
                for (projection, tensor) in stack.named() {
                    let projection = format!("{projection}{suffix}");
                    let name = if of_base {
                        names::base(layer, id, &projection)
                    } else {
                        names::expert(layer, id, &projection)
                    };
                    out.push((name, tensor.get(i)?));
                }
            }
            Ok::<_, candle_core::Error>(())
        };
        if let Some(dense) = &self.dense {
            unstack(dense, self.dense_experts(), "", false)?;
        }
        if let Some(bases) = &self.bases {
            let ids: Vec<usize> = (0..bases.gate.dim(0)?).collect();
            unstack(bases, &ids, "", true)?;
        }
        if let Some(adapters) = &self.adapters {
            unstack(&adapters.a, self.adapted_experts(), ".lora_A", false)?;
            unstack(&adapters.b, self.adapted_experts(), ".lora_B", false)?;
        }
        Ok(out)
    }
}

/// Stacks the three matrices of the given experts; `None` for no experts.
pub fn load_experts(
    checkpoint: &Checkpoint,
    layer: usize,
    experts: &[usize],
) -> Result<Option<Projections>> {
    if experts.is_empty() {
        return Ok(None);
    }
    load_stack(checkpoint, experts, whole(checkpoint), |e, p| {
        names::expert(layer, e, p)
    })
    .map(Some)
}

/// Shapes of gate and up, and of down.
type Shapes = ([usize; 2], [usize; 2]);

fn whole(checkpoint: &Checkpoint) -> Shapes {
    let (h, f) = (
        checkpoint.config().hidden_size,
        checkpoint.config().moe.intermediate_size,
    );
    ([f, h], [h, f])
}

fn load_stack(
    checkpoint: &Checkpoint,
    ids: &[usize],
    (gate_up, down): Shapes,
    name: impl Fn(usize, &str) -> String,
) -> Result<Projections> {
    let stack = |projection: &str, shape: [usize; 2]| {
        let all: Vec<String> = ids.iter().map(|&id| name(id, projection)).collect();
        checkpoint.stack(&all, &shape)
    };
    Ok(Projections {
        gate: stack("gate_proj", gate_up)?,
        up: stack("up_proj", gate_up)?,
        down: stack("down_proj", down)?,
    })
}

fn load_adapters(
    checkpoint: &Checkpoint,
    layer: usize,
    experts: &[usize],
    rank: usize,
) -> Result<Adapters> {
    let ([f, h], _) = whole(checkpoint);
    let stack = |shapes: Shapes, suffix: &str| {
        load_stack(checkpoint, experts, shapes, |e, p| {
            names::expert(layer, e, &format!("{p}.{suffix}"))
        })
    };
    Ok(Adapters {
        a: stack(([rank, h], [rank, f]), "lora_A")?,
        b: stack(([f, rank], [h, rank]), "lora_B")?,
    })
}
