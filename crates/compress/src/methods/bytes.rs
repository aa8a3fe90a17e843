//! What the files of a result take, and plans that stay within so many bytes.

use lightmoe_models::{BankLayout, DType, Extra, Format, Manifest, Scheme};

use super::PlanModel;
use crate::plan::Plan;
use crate::{Error, Result};

/// How often a plan is made anew, with fewer bytes, until its files take no more than was asked for: what a
/// plan leaves comes in steps of experts or ranks, and how long headers are is known only with it.
const TRIES: usize = 24;

/// The files that `build` writes: of the types and names that the weights have where they are at hand, else of
/// the element type that the configuration names.
pub(super) struct Files<'a> {
    model: PlanModel<'a>,
    format: Format,
    extras: Vec<Extra>,
}

impl<'a> Files<'a> {
    pub(super) fn of(model: PlanModel<'a>) -> Result<Self> {
        let (format, extras) = match model.weights {
            Some(weights) => {
                let of = weights.checkpoint;
                (Format::new(of.dtype(), of.scheme()), of.extras()?)
            }
            None => {
                let format = Format::new(
                    model.config.file_dtype(),
                    Scheme::published(model.config.family),
                );
                (format, Vec::new())
            }
        };
        Ok(Self {
            model,
            format,
            extras,
        })
    }

    /// Bytes of a parameter of an expert.
    pub(super) fn of_parameter(&self) -> u64 {
        self.format.dtype.size_in_bytes() as u64
    }

    /// Bytes of all tensors that are in no routed expert.
    pub(super) fn beside_experts(&self) -> Result<u64> {
        let config = self.model.config;
        let manifest = self.manifest(&BankLayout::dense(config))?;
        let numbers = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let size = |dtype: DType| dtype.size_in_bytes() as u64;
        let own = manifest.tensors.iter().map(|(name, shape)| {
            let dtype = manifest.types.get(name).copied();
            numbers(shape) * size(dtype.unwrap_or(self.format.dtype))
        });
        let carried = self.extras.iter();
        let carried = carried.map(|extra| numbers(&extra.shape) * size(extra.dtype));
        let experts = config.parameters().routed_experts * self.of_parameter();
        Ok(own.chain(carried).sum::<u64>().saturating_sub(experts))
    }

    fn manifest(&self, layout: &BankLayout) -> Result<Manifest> {
        let mut manifest = Manifest::of(self.model.config, layout)?;
        if let Some(weights) = self.model.weights {
            weights.checkpoint.keep_types(&mut manifest)?;
        }
        Ok(manifest)
    }

    fn of_layout(&self, layout: &BankLayout) -> Result<u64> {
        let manifest = self.manifest(layout)?;
        Ok(self.format.file_bytes(&manifest, &self.extras)?)
    }

    /// Bytes of the files of weights that `build` writes for a plan.
    pub(super) fn bytes(&self, plan: &Plan) -> Result<u64> {
        self.of_layout(&plan.layout(self.model.config))
    }

    /// The share of all parameters to save so that about so many bytes are left.
    pub(super) fn ratio(&self, bytes: u64) -> Result<f64> {
        let config = self.model.config;
        let saved = self
            .of_layout(&BankLayout::dense(config))?
            .saturating_sub(bytes);
        Ok(saved as f64 / (self.of_parameter() * config.parameters().total()) as f64)
    }

    /// Of what `planned` makes of ever fewer bytes, the first plan whose files take no more than `most`. Where `best`
    /// asks for it, planning takes no time, and of the amounts between that one and the last that were too many the
    /// largest is looked for.
    pub(super) fn within(
        &self,
        most: u64,
        best: bool,
        planned: impl Fn(u64) -> Result<Plan>,
    ) -> Result<Plan> {
        let (mut asked, mut step, mut too_many) = (most, 0, most);
        let mut found: Option<(u64, Plan)> = None;
        for _ in 0..TRIES {
            let plan = planned(asked)?;
            let over = self.bytes(&plan)?.saturating_sub(most);
            match over {
                0 => found = Some((asked, plan)),
                _ => too_many = asked,
            }
            asked = match &found {
                Some((fits, _)) if best && too_many - fits > self.of_parameter() => {
                    fits + (too_many - fits) / 2
                }
                Some(_) => break,
                None => {
                    step = over.max(2 * step);
                    asked.saturating_sub(step)
                }
            };
        }
        found.map(|(_, plan)| plan).ok_or_else(|| {
            Error::Invalid(format!(
                "no plan was found that leaves at most {most} bytes; give more, or a ratio"
            ))
        })
    }
}
