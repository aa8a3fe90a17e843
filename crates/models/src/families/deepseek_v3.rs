//! DeepSeek-V3 and R1 (arXiv 2412.19437; `DeepseekV3ForCausalLM`): DeepSeek-V2 with sigmoid scores,
//! a bias on the scores that choose (and not on those that weigh), and groups by the sum of their
//! two best.

use super::deepseek::beside_shared;
use super::deepseek_v2::latent;
use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{GroupScore, MoeConfig, Scoring};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    keys.one_of("scoring_func", &["sigmoid"])?;
    keys.one_of("topk_method", &["noaux_tc"])?;
    keys.fixed("rope_interleave", true)?;
    // Layers that guess further tokens; they lie behind the model's own and do not run here.
    keys.ignore(&["num_nextn_predict_layers", "num_mtp_layers"]);
    let moe = beside_shared(keys)?;
    let moe = MoeConfig {
        scoring: Scoring::Sigmoid,
        groups: keys.groups(moe.num_experts, moe.top_k, GroupScore::TwoBest)?,
        renormalize: keys.flag("norm_topk_prob", true)?,
        routed_scaling_factor: keys.positive("routed_scaling_factor", Some(2.5))?,
        ..moe
    };
    latent(keys, Family::DeepseekV3, moe)
}
