//! Every tensor of a model, by name and shape, from its configuration and layout alone.

use crate::config::ModelConfig;
use crate::decoder::Ends;
use crate::layer::Layer;
use crate::layout::{BankLayout, LayerLayout, SlotLayout};
use crate::{Error, Result, bank::Bank, names};
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// A tensor's name and shape.
pub type NamedShape = (String, Vec<usize>);

/// The tensors of a model under our names, in the order in which they are written.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// The forms of its experts.
    pub layout: BankLayout,
    /// Name and shape.
    pub tensors: Vec<NamedShape>,
    /// The element type of those that have one of their own, whatever the others have.
    pub types: BTreeMap<String, DType>,
}

impl Manifest {
    /// The tensors of the model `config` with the expert banks `layout`.
    ///
    /// # Errors
    /// If the layout does not fit the model.
    pub fn of(config: &ModelConfig, layout: &BankLayout) -> Result<Self> {
        layout.check(config).map_err(|message| {
            Error::Invalid(format!("the layout does not fit the model: {message}"))
        })?;
        let tensors = RefCell::new(Vec::new());
        // Whatever builds a part of a model also says what it is made of.
        let record = |name: String, shape: &[usize]| -> Result<Tensor> {
            tensors.borrow_mut().push((name, shape.to_vec()));
            Ok(Tensor::zeros(0, DType::F32, &Device::Cpu)?)
        };
        Ends::build(config, &|name, shape| record(names::whole(name), shape))?;
        for number in 0..config.num_layers {
            let slots = layout.layers.get(&number);
            let bank = slots.map(|slots| || Ok(Bank::empty(slots)));
            let get = |rest: &str, shape: &[usize]| record(names::layer(number, rest), shape);
            Layer::build(config, &get, bank)?;
            if let Some(slots) = slots {
                tensors.borrow_mut().extend(experts(config, number, slots));
            }
        }
        let tensors = tensors.into_inner();
        let indices = tensors.iter().filter(|(name, _)| names::is_index(name));
        Ok(Self {
            layout: layout.clone(),
            types: indices
                .map(|(name, _)| (name.clone(), DType::U32))
                .collect(),
            tensors,
        })
    }

    /// The tensors before and behind the layers, and those of each layer.
    pub fn parts(&self) -> (&[NamedShape], Vec<&[NamedShape]>) {
        let of = |(name, _): &NamedShape| names::layer_of(name);
        let mut parts = self.tensors.chunk_by(|a, b| of(a) == of(b)).peekable();
        let ends = parts.next_if(|part| of(&part[0]).is_none());
        (ends.unwrap_or_default(), parts.collect())
    }

    /// Numbers in all tensors.
    pub fn parameters(&self) -> u64 {
        let sizes = self.tensors.iter();
        sizes
            .map(|(_, shape)| shape.iter().product::<usize>() as u64)
            .sum()
    }
}

/// The tensors of the bank of layer `number`.
fn experts(config: &ModelConfig, number: usize, layout: &LayerLayout) -> Vec<NamedShape> {
    let (h, f) = (config.hidden_size, config.moe.intermediate_size);
    let mut all = Vec::new();
    let shapes = [[f, h], [f, h], [h, f]];
    for group in 0..layout.bases() {
        for (projection, [out, width]) in names::PROJECTIONS.iter().zip(shapes) {
            let mut push = |suffix: &str, shape: &[usize]| {
                let name = names::base(number, group, &format!("{projection}{suffix}"));
                all.push((name, shape.to_vec()));
            };
            let Some(factored) = &layout.factored else {
                push("", &[out, width]);
                continue;
            };
            let rows = factored.rows(projection);
            push(".lora_A", &[factored.rank, width]);
            push(".lora_B", &[out, factored.rank]);
            push(".rows", &[rows, width]);
            push(".index", &[rows]);
        }
    }
    if layout.main.is_some() {
        for (projection, [_, width]) in names::PROJECTIONS.iter().zip(shapes) {
            let shape = vec![layout.slots.len(), width];
            all.push((names::scales(number, projection), shape));
        }
    }
    if let Some((bases, rank)) = layout.mixture() {
        for basis in 0..bases {
            for projection in names::MIXED {
                all.push((names::basis(number, basis, projection), vec![rank, h]));
            }
        }
    }
    for expert in layout.of_form(SlotLayout::Constant) {
        all.push((names::constant(number, expert), vec![h]));
    }
    for expert in layout.biased() {
        all.push((names::bias(number, expert), vec![h]));
    }
    for (expert, slot) in layout.slots.iter().enumerate() {
        for (projection, [out, width]) in names::PROJECTIONS.iter().zip(shapes) {
            let mut push = |suffix: &str, shape: &[usize]| {
                let name = names::expert(number, expert, &format!("{projection}{suffix}"));
                all.push((name, shape.to_vec()));
            };
            match *slot {
                SlotLayout::Dense => push("", &[out, width]),
                SlotLayout::Mixed { bases, rank } if names::MIXED.contains(projection) => {
                    push(".transform", &[out, rank]);
                    push(".mixing", &[bases]);
                }
                SlotLayout::Mixed { .. } => push("", &[out, width]),
                SlotLayout::Adapted { rank: 0, .. }
                | SlotLayout::Constant
                | SlotLayout::Removed => {}
                SlotLayout::Adapted { rank, .. } => {
                    push(".lora_A", &[rank, width]);
                    push(".lora_B", &[out, rank]);
                }
            }
        }
    }
    all
}
