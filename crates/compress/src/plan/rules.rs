//! The rules of a plan in itself.

use super::{LayerPlan, Plan, SCHEMA_VERSION, SlotForm};

impl Plan {
    /// [`Plan::validate`], the message alone.
    pub(super) fn rules(&self) -> std::result::Result<(), String> {
        if self.schema_version != SCHEMA_VERSION {
            return Err(format!(
                "schema version {}, expected {SCHEMA_VERSION}; plan again with this version",
                self.schema_version
            ));
        }
        let mut next = 0;
        for layer in &self.layers {
            if layer.layer < next || layer.layer >= self.model.layers {
                return Err(format!(
                    "layer {}: layers must ascend and lie below {}; correct its number",
                    layer.layer, self.model.layers
                ));
            }
            next = layer.layer + 1;
            self.validate_layer(layer)
                .map_err(|message| format!("layer {}{message}", layer.layer))?;
        }
        let widest = self.model.widest_rank();
        for (key, rank) in [
            ("rank", self.settings.rank),
            ("kept_rank", self.settings.kept_rank),
            ("base_rank", self.settings.base_rank.unwrap_or(0)),
            ("trained_rank", self.settings.trained_rank.unwrap_or(0)),
        ] {
            if rank > widest {
                return Err(format!(
                    "`{key}` of `settings` is {rank}, expected at most {widest}; lower it"
                ));
            }
        }
        let numbers = [self.settings.alpha, self.settings.max_delta];
        if numbers.iter().any(|number| !number.is_finite()) {
            return Err("`settings` holds a number that is not finite; correct it".to_owned());
        }
        Ok(())
    }

    fn validate_layer(&self, layer: &LayerPlan) -> std::result::Result<(), String> {
        let experts = self.model.num_experts;
        let widest = self.model.widest_rank();
        if layer.slots.len() != experts {
            return Err(format!(
                ": {} slots, expected one for each of {experts} experts; add or remove some",
                layer.slots.len()
            ));
        }
        if layer.groups > experts {
            return Err(format!(
                ": {} groups of {experts} experts; correct `groups`",
                layer.groups
            ));
        }
        if let Some(factored) = &layer.factored {
            let (h, f) = (self.model.hidden_size, self.model.intermediate_size);
            factored
                .check(h, f)
                .map_err(|message| format!(": {message}; correct them"))?;
        }
        let mut dominants = vec![0usize; layer.groups];
        for (position, slot) in layer.slots.iter().enumerate() {
            let fail = |message: String| Err(format!(", slot {position}: {message}"));
            if slot.expert != position {
                return fail(format!(
                    "expert {}, expected {position}; list every expert once, ascending",
                    slot.expert
                ));
            }
            for (what, value) in [("score", slot.score), ("weight", slot.weight())] {
                if !(value.is_finite() && value >= 0.0) {
                    return fail(format!("{what} {value}; give a number from 0"));
                }
            }
            if slot.damage.is_some_and(|damage| !damage.is_finite()) {
                return fail("its damage is no number; plan again".to_owned());
            }
            let (group, rank, dominant) = match slot.form {
                SlotForm::Adapted {
                    group,
                    rank,
                    dominant,
                    ..
                } => (group, rank, dominant),
                SlotForm::Mixed { bases, rank } => {
                    let fits = (1..=experts).contains(&bases) && (1..=widest).contains(&rank);
                    if !fits || layer.mixture() != Some((bases, rank)) {
                        return fail(format!(
                            "mixed from {bases} bases of rank {rank}, expected 1 to {experts} of rank \
                             1 to {widest}, alike in the whole layer; correct them"
                        ));
                    }
                    continue;
                }
                SlotForm::Removed { into: Some(into) } => {
                    let target = layer.slots.get(into).map(|slot| slot.form);
                    if target != Some(SlotForm::Dense) {
                        return fail(format!(
                            "merged into expert {into}, which is not dense; name one that is"
                        ));
                    }
                    continue;
                }
                _ => continue,
            };
            if rank > widest || (rank == 0 && group.is_none()) {
                return fail(format!(
                    "rank {rank}, expected at most {widest}, and above 0 without a group; lower it"
                ));
            }
            match group {
                Some(group) if group >= layer.groups => {
                    return fail(format!(
                        "group {group}, the layer has {}; correct one of them",
                        layer.groups
                    ));
                }
                Some(group) => dominants[group] += usize::from(dominant),
                None if dominant => {
                    return fail("dominant of no group; give it a group".to_owned());
                }
                None => {}
            }
        }
        match dominants.iter().position(|&count| count != 1) {
            Some(group) => Err(format!(
                ": group {group} has {} dominant slots, expected one; mark one of its slots",
                dominants[group]
            )),
            None => Ok(()),
        }
    }
}
