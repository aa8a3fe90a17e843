//! The bank from and to the tensors of a checkpoint.

use crate::bank::components::starts;
use crate::bank::{
    Bank, Factored, MixedSlots, Mixture, Order, Projections, RankedAdapters, Scales,
};
use crate::checkpoint::Checkpoint;
use crate::layout::{LayerLayout, SlotLayout};
use crate::{Error, Result, names};
use candle_core::Tensor;

impl Bank {
    /// A bank of dense slots, and removed ones: the matrices of the dense, by ascending number.
    pub fn of_dense(layout: &LayerLayout, dense: Projections) -> Self {
        Self {
            dense: Some(dense),
            ..Self::empty(layout)
        }
    }

    /// A bank without its weights.
    pub(crate) fn empty(layout: &LayerLayout) -> Self {
        Self {
            order: Order::of(layout),
            dense: None,
            dense_adapters: None,
            bases: None,
            base_adapters: None,
            factored: None,
            factored_bases: layout.factored,
            adapters: None,
            frozen: None,
            scales: None,
            mixed: None,
            constants: None,
            biases: None,
            originals: None,
            beta: 0.0,
            adapters_fade_in: false,
        }
    }

    /// Reads the bank of one layer.
    pub fn load(checkpoint: &Checkpoint, layer: usize, layout: &LayerLayout) -> Result<Self> {
        let mut bank = Self::empty(layout);
        let bases: Vec<usize> = (0..layout.bases()).collect();
        if !bases.is_empty() {
            let name = |g, p: &str| names::base(layer, g, p);
            match &layout.factored {
                None => {
                    bank.bases = Some(load_stack(checkpoint, &bases, whole(checkpoint), name)?);
                }
                Some(shape) => {
                    bank.factored = Some(Factored::load(checkpoint, layer, bases.len(), shape)?);
                }
            }
        }
        if layout.rank() > 0 {
            let (experts, ranks) = (bank.adapted_experts(), &bank.order.ranks);
            bank.adapters = Some(load_adapters(checkpoint, layer, experts, ranks)?);
        }
        if let Some(mixture) = layout.mixture() {
            bank.mixed = Some(load_mixed(
                checkpoint,
                layer,
                bank.mixed_experts(),
                mixture,
            )?);
        }
        if !bank.constant_experts().is_empty() {
            let experts = bank.constant_experts().iter();
            let names: Vec<String> = experts.map(|&e| names::constant(layer, e)).collect();
            bank.constants = Some(checkpoint.stack(&names, &[checkpoint.config().hidden_size])?);
        }
        let biases: Vec<String> = bank
            .biased_experts()
            .map(|expert| names::bias(layer, expert))
            .collect();
        if !biases.is_empty() {
            bank.biases = Some(checkpoint.stack(&biases, &[checkpoint.config().hidden_size])?);
        }
        if let Some(main) = layout.main {
            let (experts, (gate_up, down)) = (bank.len(), whole(checkpoint));
            let read = |projection: &str, width: usize| {
                checkpoint.tensor(&names::scales(layer, projection), &[experts, width])
            };
            bank.scales = Some(Scales {
                main,
                gate: read("gate_proj", gate_up[1])?,
                up: read("up_proj", gate_up[1])?,
                down: read("down_proj", down[1])?,
            });
        }
        bank.dense = load_experts(checkpoint, layer, bank.dense_experts())?;
        Ok(bank)
    }

    /// The tensors of the bank under the names of the checkpoint. Such a checkpoint has no adapters
    /// of dense slots and no originals: a bank that still computes with them is an error.
    pub fn tensors(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        if self.trains() || self.blended()?.is_some() {
            return Err(Error::Invalid(format!(
                "layer {layer} still computes with what only training has, or with originals; \
                 finish the recovery before writing it"
            )));
        }
        let mut out = Vec::new();
        let mut unstack = |stack: &Projections, ids: &[usize], name: Naming| {
            for (i, &id) in ids.iter().enumerate() {
                for (projection, tensor) in stack.named() {
                    out.push((name(layer, id, projection), tensor.get(i)?));
                }
            }
            Ok::<_, candle_core::Error>(())
        };
        if let Some(dense) = &self.dense {
            unstack(dense, self.dense_experts(), names::expert)?;
        }
        if let Some(bases) = &self.bases {
            let ids: Vec<usize> = (0..bases.gate.dim(0)?).collect();
            unstack(bases, &ids, names::base)?;
        }
        if let Some(factored) = &self.factored {
            out.extend(factored.tensors(layer)?);
        }
        if let Some(adapters) = &self.adapters {
            for (i, &expert) in self.adapted_experts().iter().enumerate() {
                let components = adapters.of(i);
                if components.is_empty() {
                    continue;
                }
                let own = |w: &Tensor| w.narrow(0, components.start, components.len());
                let mut push = |side: &str, projection: &str, tensor: Tensor| {
                    let name = names::expert(layer, expert, &format!("{projection}.{side}"));
                    out.push((name, tensor));
                };
                for (projection, tensor) in adapters.a.named() {
                    push("lora_A", projection, own(tensor)?);
                }
                for (projection, tensor) in adapters.b.named() {
                    push("lora_B", projection, own(tensor)?.t()?.contiguous()?);
                }
            }
        }
        for (projection, scales) in self.scales.iter().flat_map(Scales::named) {
            out.push((names::scales(layer, projection), scales.clone()));
        }
        if let Some(mixed) = &self.mixed {
            for (projection, mixture) in mixed.named() {
                for basis in 0..mixture.bases.dim(0)? {
                    let name = names::basis(layer, basis, projection);
                    out.push((name, mixture.bases.get(basis)?));
                }
            }
            for (i, &expert) in self.mixed_experts().iter().enumerate() {
                let mut push = |part: &str, stack: &Tensor| {
                    out.push((names::expert(layer, expert, part), stack.get(i)?));
                    Ok::<_, candle_core::Error>(())
                };
                for (projection, mixture) in mixed.named() {
                    push(&format!("{projection}.transform"), &mixture.transforms)?;
                    push(&format!("{projection}.mixing"), &mixture.weights)?;
                }
                push("down_proj", &mixed.down)?;
            }
        }
        if let Some(constants) = &self.constants {
            for (i, &expert) in self.constant_experts().iter().enumerate() {
                out.push((names::constant(layer, expert), constants.get(i)?));
            }
        }
        if let Some(biases) = &self.biases {
            for (i, expert) in self.biased_experts().enumerate() {
                out.push((names::bias(layer, expert), biases.get(i)?));
            }
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

/// One matrix of an expert of a compressed checkpoint, base and adapter multiplied out.
///
/// # Errors
/// [`Error::Invalid`] if the expert has none: its output is a constant, or it was removed.
pub fn multiplied_out(
    checkpoint: &Checkpoint,
    (layer, expert): (usize, usize),
    projection: &str,
    [rows, columns]: [usize; 2],
) -> Result<Tensor> {
    let slots = checkpoint.layout().layers.get(&layer);
    let slot = slots.and_then(|layout| layout.slots.get(expert));
    let own = |suffix: &str, shape: &[usize]| {
        let name = names::expert(layer, expert, &format!("{projection}{suffix}"));
        checkpoint.tensor(&name, shape)
    };
    let (group, rank) = match slot {
        Some(SlotLayout::Mixed { .. }) if !names::MIXED.contains(&projection) => {
            return own("", &[rows, columns]);
        }
        Some(&SlotLayout::Mixed { bases, rank }) => {
            let mixture = load_mixture(checkpoint, layer, &[expert], (bases, rank), projection)?;
            return Ok(mixture.products()?.get(0)?);
        }
        Some(SlotLayout::Dense) => return own("", &[rows, columns]),
        Some(&SlotLayout::Adapted {
            group,
            rank,
            bias: false,
        }) => (group, rank),
        Some(SlotLayout::Adapted { .. }) => {
            return Err(Error::Invalid(format!(
                "expert {expert} of layer {layer} has a bias, which no expert of the family has; export the \
                 model as `compact`"
            )));
        }
        _ => {
            return Err(Error::Invalid(format!(
                "expert {expert} of layer {layer} has no matrices any more; export the model as \
                 `compact`"
            )));
        }
    };
    let factored = slots.and_then(|layout| layout.factored);
    let base = group.map(|g| match &factored {
        None => checkpoint.tensor(&names::base(layer, g, projection), &[rows, columns]),
        Some(shape) => Factored::base(checkpoint, (layer, g), projection, (shape, [rows, columns])),
    });
    let product = (rank > 0).then(|| {
        let (a, b) = (
            own(".lora_A", &[rank, columns])?,
            own(".lora_B", &[rows, rank])?,
        );
        Ok::<_, Error>(b.matmul(&a)?)
    });
    match (base.transpose()?, product.transpose()?) {
        (Some(base), Some(product)) => Ok((base + product)?),
        (Some(one), None) | (None, Some(one)) => Ok(one),
        (None, None) => Err(Error::Invalid(format!(
            "expert {expert} of layer {layer} has neither base nor adapter; build the model again"
        ))),
    }
}

/// The matrices of mixed slots over `mixture` = (bases, rank).
fn load_mixed(
    checkpoint: &Checkpoint,
    layer: usize,
    experts: &[usize],
    mixture: (usize, usize),
) -> Result<MixedSlots> {
    let [gate, up] = names::MIXED.map(|p| load_mixture(checkpoint, layer, experts, mixture, p));
    let (_, down) = whole(checkpoint);
    let names = experts
        .iter()
        .map(|&e| names::expert(layer, e, "down_proj"));
    Ok(MixedSlots {
        gate: gate?,
        up: up?,
        down: checkpoint.stack(&names.collect::<Vec<_>>(), &down)?,
        down_adapters: None,
    })
}

/// Bases, transforms and mixing weights of one of the two matrices of `experts`.
fn load_mixture(
    checkpoint: &Checkpoint,
    layer: usize,
    experts: &[usize],
    (bases, rank): (usize, usize),
    projection: &str,
) -> Result<Mixture> {
    let ([f, h], _) = whole(checkpoint);
    let stack = |part: &str, shape: &[usize]| {
        let part = format!("{projection}.{part}");
        let names = experts.iter().map(|&e| names::expert(layer, e, &part));
        checkpoint.stack(&names.collect::<Vec<_>>(), shape)
    };
    let names = (0..bases).map(|basis| names::basis(layer, basis, projection));
    Ok(Mixture::new(
        checkpoint.stack(&names.collect::<Vec<_>>(), &[rank, h])?,
        stack("mixing", &[bases])?,
        stack("transform", &[f, rank])?,
    ))
}

/// The name of a matrix by layer, expert or base, and projection.
type Naming = fn(usize, usize, &str) -> String;

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

/// The adapters of `experts`, of these ranks.
fn load_adapters(
    checkpoint: &Checkpoint,
    layer: usize,
    experts: &[usize],
    ranks: &[usize],
) -> Result<RankedAdapters> {
    let ([f, h], _) = whole(checkpoint);
    let read = |expert: usize, projection: &str, side: &str, shape: [usize; 2]| {
        let name = names::expert(layer, expert, &format!("{projection}.{side}"));
        checkpoint.tensor(&name, &shape)
    };
    let slots = || experts.iter().zip(ranks).filter(|(_, rank)| **rank > 0);
    let a = |projection: &str, width: usize| -> Result<Tensor> {
        let each = slots().map(|(&e, &rank)| read(e, projection, "lora_A", [rank, width]));
        Ok(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?)
    };
    let b = |projection: &str, width: usize| -> Result<Tensor> {
        let each = slots().map(|(&e, &rank)| {
            Ok(read(e, projection, "lora_B", [width, rank])?
                .t()?
                .contiguous()?)
        });
        Ok(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?)
    };
    Ok(RankedAdapters {
        a: Projections {
            gate: a("gate_proj", h)?,
            up: a("up_proj", h)?,
            down: a("down_proj", f)?,
        },
        b: Projections {
            gate: b("gate_proj", f)?,
            up: b("up_proj", f)?,
            down: b("down_proj", h)?,
        },
        starts: starts(ranks.iter().copied()),
    })
}

impl Order {
    /// The positions of a layout.
    pub(crate) fn of(layout: &LayerLayout) -> Self {
        let mut experts: Vec<usize> = layout.of_form(SlotLayout::Dense).collect();
        let dense = experts.len();
        // By group and number, those without a group last.
        let mut adapted: Vec<_> = layout.adapted().collect();
        adapted.sort_unstable_by_key(|&(e, group, _)| (group.is_none(), group, e));
        experts.extend(adapted.iter().map(|(e, _, _)| e));
        experts.extend(layout.mixed());
        let mixed = experts.len() - dense - adapted.len();
        experts.extend(layout.of_form(SlotLayout::Constant));
        let constants = experts.len() - dense - adapted.len() - mixed;
        experts.extend(layout.of_form(SlotLayout::Removed));
        let mut position = vec![0; experts.len()];
        for (p, &e) in experts.iter().enumerate() {
            position[e] = p;
        }
        let mut biased: Vec<usize> = layout.biased().map(|expert| position[expert]).collect();
        biased.sort_unstable();
        Self {
            experts,
            position,
            biased,
            groups: adapted.iter().filter_map(|(_, group, _)| *group).collect(),
            ranks: adapted.iter().map(|(_, _, rank)| *rank).collect(),
            dense,
            mixed,
            constants,
        }
    }
}
