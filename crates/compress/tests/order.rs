//! In which order a model's experts stand means nothing: from observing to the built model, the same becomes of
//! each.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::DType;
use common::predictions::{built, divergence, log_probabilities, samples, with};
use common::{budgeted, observed, options, random_checkpoint, small, upcycled};
use lightmoe_compress::methods::{PlanOptions, Target};
use lightmoe_compress::ranks::RankRule;
use lightmoe_compress::{Sensitivity, Statistics};
use lightmoe_models::{Checkpoint, Decoder};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::fs;
use tempfile::TempDir;

/// Where the experts of each place come from.
const ORDER: [usize; 8] = [3, 0, 6, 1, 7, 2, 5, 4];

/// The same model with its experts, and the rows of its routers, in another order.
fn reordered(checkpoint: &Checkpoint, folder: &TempDir) -> Checkpoint {
    let bytes = fs::read(checkpoint.dir().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut moved: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, view) in file.tensors() {
        let mut data = view.data().to_vec();
        if name.ends_with("mlp.gate.weight") {
            let row = data.len() / ORDER.len();
            let rows = ORDER.iter().flat_map(|&e| &view.data()[e * row..][..row]);
            data = rows.copied().collect();
        }
        let name = match name.split_once(".experts.") {
            None => name,
            Some((layer, rest)) => {
                let (expert, matrix) = rest.split_once('.').unwrap();
                let from: usize = expert.parse().unwrap();
                let to = ORDER.iter().position(|&e| e == from).unwrap();
                format!("{layer}.experts.{to}.{matrix}")
            }
        };
        moved.push((name, view.shape().to_vec(), data));
    }
    let views = moved.iter().map(|(name, shape, data)| {
        let view = TensorView::new(safetensors::Dtype::BF16, shape.clone(), data);
        (name.clone(), view.unwrap())
    });
    let path = folder.path().join("model");
    fs::create_dir(&path).unwrap();
    let target = path.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &target).unwrap();
    fs::copy(
        checkpoint.dir().join("config.json"),
        path.join("config.json"),
    )
    .unwrap();
    Checkpoint::open(&path).unwrap()
}

#[test]
fn the_same_becomes_of_every_expert() {
    let [apart, related] = [(), ()].map(|()| tempfile::tempdir().unwrap());
    let models = [
        random_checkpoint(&small(2, 8), DType::BF16, 3, &apart),
        upcycled(&small(2, 8), 0.3, &related),
    ];
    for (one, folder) in models.iter().zip([&apart, &related]) {
        let elsewhere = tempfile::tempdir().unwrap();
        let other = reordered(one, &elsewhere);
        let statistics = Statistics {
            bias: true,
            ..with(Sensitivity::Fisher)
        };
        let seen = [
            observed(one, &samples(1), statistics, folder),
            observed(&other, &samples(1), statistics, &elsewhere),
        ];
        let mut bases = 0;
        for (ratio, ranks, bias) in [
            (0.4, RankRule::Budget, false),
            (0.6, RankRule::Budget, false),
            (0.6, RankRule::Budget, true),
            (0.4, RankRule::Uniform, false),
            (0.4, RankRule::Importance, false),
        ] {
            let options = PlanOptions {
                ranks,
                bias,
                ..options(1, 1)
            };
            let planned = |checkpoint: &Checkpoint, seen| {
                budgeted(checkpoint.config(), seen, Target::Ratio(ratio), &options)
            };
            let (before, after) = (planned(one, &seen[0]), planned(&other, &seen[1]));
            for (before, after) in before.layers.iter().zip(&after.layers) {
                for (to, &from) in ORDER.iter().enumerate() {
                    assert_eq!(after.slots[to].form, before.slots[from].form);
                }
                bases += before.groups;
            }
            let predictions = |checkpoint, plan, seen, folder| {
                let built = built(checkpoint, plan, seen, folder);
                log_probabilities(&Decoder::load(&built).unwrap(), &samples(1))
            };
            let found = [
                predictions(one, &before, &seen[0], folder),
                predictions(&other, &after, &seen[1], &elsewhere),
            ];
            let apart = divergence(&found[0], &found[1]).abs();
            assert!(apart < 1e-4, "{ratio}: {apart}");
        }
        // The second model's experts have something in common.
        assert_eq!(bases > 0, std::ptr::eq(one, &models[1]));
    }
}
