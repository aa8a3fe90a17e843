//! The bank against the formula for random choices of experts.

use super::formula::check;
use super::support::{Folder, Form, config, factored_layers};
use lightmoe_models::{LayerLayout, SlotLayout};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Any number of the eight experts for each token, up to all, in any order: positions without rows, with one, and with
/// those of all tokens.
fn choices() -> impl Strategy<Value = (usize, Vec<u32>)> {
    (1usize..=8, 1usize..12).prop_flat_map(|(k, tokens)| {
        let order = Just((0..8).collect::<Vec<u32>>()).prop_shuffle();
        let of_token = order.prop_map(move |order| order[..k].to_vec());
        let all = prop::collection::vec(of_token, tokens);
        (Just(k), all.prop_map(|all| all.concat()))
    })
}

#[test]
fn any_routing_gives_what_the_formula_gives() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let forms = [Form::Mixed, Form::Every, Form::Mixture];
    let layers = forms.map(|form| form.slots().map(LayerLayout::from));
    let layers = layers.into_iter().chain([factored_layers()]);
    let all: Vec<_> = layers.map(|of| folder.of_layers(&original, of)).collect();
    let beta = prop_oneof![Just(0.0), Just(1.0), 0.0..1.0];
    let cases = (0..all.len(), 0usize..2, beta, choices());
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(100)
    };
    let held = TestRunner::new(config).run(&cases, |(of, layer, beta, (k, chosen))| {
        // No router chooses nothing but experts that are gone.
        let slots = &all[of].layout().layers[&layer].slots;
        let is_gone = |&e: &u32| slots[e as usize] == SlotLayout::Removed;
        prop_assume!(!chosen.iter().all(is_gone));
        check((&all[of], &original), (layer, beta), &chosen, k);
        Ok(())
    });
    held.unwrap();
}
