//! From a built checkpoint to a model in recovery, and from there to the recovered one.

use crate::Result;
use lightmoe_models::{
    Adapters, Checkpoint, Decoder, LanguageModel, Layer, Projections, load_experts,
};

/// What recovery adds to a built model while it trains.
#[derive(Debug, Clone, Copy)]
pub struct Recovery {
    /// Rank of the adapters on kept experts, and on the down matrices of mixed ones; zero for none. They
    /// are merged at the end.
    pub kept_rank: usize,
    /// Rank of the adapters of shared bases, merged at the end; `None` trains the bases themselves.
    pub base_rank: Option<usize>,
    /// How many components of each adapted or mixed slot train, the last ones; `None` for all.
    pub trained_rank: Option<usize>,
    /// Whether β starts above zero, so that the replaced experts are needed.
    pub anneal: bool,
    /// Whether adapters fade in as these fade out.
    pub adapters_fade_in: bool,
    /// Seed of the fresh adapters.
    pub seed: u64,
}

/// Adds fresh adapters to the kept experts of `model`, and to its bases if they do not train
/// themselves (they change nothing yet), and the replaced experts of the `original` checkpoint, with full
/// weight, where annealing wants them.
pub fn prepare_recovery(model: &mut Decoder, original: &Checkpoint, r: &Recovery) -> Result<()> {
    let (config, device) = (model.config().clone(), model.ends().device().clone());
    for l in config.moe_layers() {
        let Some(bank) = model.layers[l].bank_mut() else {
            continue;
        };
        let kept = bank.dense_experts().to_vec();
        bank.dense_adapters = Adapters::fresh(&config, l, &kept, (r.kept_rank, r.seed), &device)?;
        if let Some(rank) = r.base_rank {
            // Beside the experts' own numbers, so that no two adapters start alike.
            let first = bank.len();
            let bases: Vec<usize> = (first..first + bank.base_count()).collect();
            bank.base_adapters = Adapters::fresh(&config, l, &bases, (rank, r.seed), &device)?;
        }
        let mixed = bank.mixed_experts().to_vec();
        if let Some(slots) = &mut bank.mixed {
            let fresh = Adapters::fresh(&config, l, &mixed, (r.kept_rank, r.seed), &device)?;
            slots.down_adapters = fresh.map(|adapters| (adapters.a.down, adapters.b.down));
        }
        if let Some(rank) = r.trained_rank {
            bank.freeze_components(rank)?;
        }
        bank.adapters_fade_in = r.adapters_fade_in;
        if r.anneal {
            bank.originals = load_experts(original, l, bank.adapted_experts())?;
            bank.anneal(if bank.originals.is_some() { 1.0 } else { 0.0 });
        }
    }
    Ok(())
}

/// Lets factored bases begin as what they stand for: `bases` gives those of a layer as whole matrices, gate
/// and up `[M, F, H]`, down `[M, H, F]`, and is asked for layers with factored bases alone.
///
/// # Errors
/// What `bases` brings.
pub fn unfold_bases(
    model: &mut Decoder,
    bases: &mut dyn FnMut(usize) -> Result<Projections>,
) -> Result<()> {
    for (l, layer) in model.layers.iter_mut().enumerate() {
        if let Some(bank) = layer
            .bank_mut()
            .filter(|bank| bank.factored_bases().is_some())
        {
            bank.unfold_bases(&bases(l)?)?;
        }
    }
    Ok(())
}

/// Drops the replaced experts, merges the adapters of kept ones and of bases, puts factors together
/// again, and takes the rows of factored bases out that are left.
///
/// # Errors
/// If factored bases have more rows than they keep, because the training did not come to its end.
pub fn finish_recovery(model: &mut Decoder) -> Result<()> {
    // Else experts would be there twice, before and after their adapters were added.
    model.layers.iter().for_each(Layer::release);
    for bank in model.banks_mut() {
        bank.anneal(0.0);
        bank.fold_bases()?;
        bank.merge_adapters()?;
        bank.join_components()?;
    }
    Ok(())
}
