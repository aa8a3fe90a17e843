//! Every family through observe, plan, build, recover and export, on the small random checkpoints of
//! the parity fixtures.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_compress::methods::{MethodName, PlanOptions, Target, plan};
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{BuildInputs, ObserveOptions, Statistics, build, observe};
use lightmoe_export::{Card, ExportKind, ExportOptions, export};
use lightmoe_models::{Checkpoint, DType, Decoder, ExpertPacking, LanguageModel, Tokens};
use lightmoe_train::{Recovery, finish_recovery, prepare_recovery};
use std::path::Path;

const IDS: [u32; 12] = [5, 90, 17, 33, 64, 2, 118, 71, 8, 45, 99, 12];

fn logits(model: &Decoder) -> Vec<f32> {
    let tokens = Tokens { ids: &IDS, rows: 1 };
    let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
    let logits = model.logits(&hidden).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn inputs<'a>(checkpoint: &'a Checkpoint, plan: &'a Plan, seed: u64) -> BuildInputs<'a> {
    BuildInputs {
        checkpoint,
        plan,
        observations: None,
        seed,
    }
}

#[track_caller]
fn assert_close(ours: &[f32], expected: &[f32], what: &str) {
    let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let error = ours.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let error = error.fold(0f32, f32::max);
    assert!(error <= 1e-4 * scale, "{what}: {error} of {scale}");
}

#[test]
fn every_family_goes_the_whole_way() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    let mut gone = 0;
    for entry in std::fs::read_dir(parity).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        gone += 1;
        let family = path.file_name().unwrap().to_string_lossy().into_owned();
        let original = Checkpoint::open(&path).unwrap();
        let samples: Vec<Vec<u32>> = (0..40)
            .map(|s| {
                (0..16)
                    .map(|t| (s * 31 + t * 7 + s * t) % 126 + 2)
                    .collect()
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let state = ObserveOptions {
            fingerprint: "families",
            state: &folder.path().join("state"),
            statistics: Statistics::default(),
            answers: &[],
            successor: None,
            max_memory: 1 << 30,
        };
        let seen = observe(&original, &samples, &state, &mut |_, _| true).unwrap();
        let seen = seen.observations;
        let options = PlanOptions {
            rank: 2,
            groups: 2,
            ..PlanOptions::default()
        };
        let (config, target) = (original.config(), Target::Threshold(0.5));
        let plan = plan(config, &seen, target, MethodName::Lightmoe, &options).unwrap();
        let path = folder.path().join("built");
        build(&inputs(&original, &plan, 0), &path, &mut |_, _| true).unwrap();
        let built = Checkpoint::open(&path).unwrap();
        assert_eq!(built.parameters(), plan.parameters.after, "{family}");

        // While nothing has faded, the model is the original.
        let mut model = Decoder::load(&built).unwrap();
        let recovery = Recovery {
            kept_rank: 2,
            base_rank: None,
            trained_rank: None,
            anneal: true,
            adapters_fade_in: false,
            seed: 0,
        };
        prepare_recovery(&mut model, &original, &recovery).unwrap();
        let whole = logits(&Decoder::load(&original).unwrap());
        model.banks_mut().for_each(|bank| bank.anneal(1.0));
        assert_close(&logits(&model), &whole, &format!("{family} at the start"));
        model.banks_mut().for_each(|bank| bank.anneal(0.0));
        finish_recovery(&mut model).unwrap();
        let compressed = logits(&Decoder::load(&built).unwrap());
        assert_close(
            &logits(&model),
            &compressed,
            &format!("{family} at the end"),
        );
        assert_ne!(compressed, whole);

        // Multiplied out it is the original's architecture, however the experts are packed.
        for packing in [
            None,
            Some(ExpertPacking::Fused),
            Some(ExpertPacking::Separate),
        ] {
            let dense = folder.path().join("dense");
            let options = ExportOptions {
                dtype: Some(DType::F32),
                packing,
                ..ExportOptions::new(ExportKind::Dense)
            };
            let card = Card {
                base_model: "parity".into(),
                method: "lightmoe".into(),
                recipe_toml: String::new(),
                table_markdown: String::new(),
            };
            export(&built, &dense, &options, &card, &mut |_, _| true).unwrap();
            let dense = Checkpoint::open(&dense).unwrap();
            let fused = packing == Some(ExpertPacking::Fused);
            assert_eq!(dense.names() == original.names(), !fused, "{family}");
            assert_eq!(dense.scheme().packing == ExpertPacking::Fused, fused);
            let exported = logits(&Decoder::load(&dense).unwrap());
            assert_close(&exported, &compressed, &format!("{family} exported"));
        }

        // A model with stacked experts is built to the same numbers, and stays stacked.
        let fused = folder.path().join("fused");
        let options = ExportOptions {
            packing: Some(ExpertPacking::Fused),
            ..ExportOptions::new(ExportKind::Compact)
        };
        let card = Card::default();
        export(&original, &fused, &options, &card, &mut |_, _| true).unwrap();
        let fused = Checkpoint::open(&fused).unwrap();
        let path = folder.path().join("built-fused");
        build(&inputs(&fused, &plan, 0), &path, &mut |_, _| true).unwrap();
        let again = Checkpoint::open(&path).unwrap();
        assert!(
            again
                .names()
                .iter()
                .any(|n| n.ends_with("experts.gate_up_proj"))
        );
        assert_eq!(again.parameters(), built.parameters(), "{family}");
        assert_eq!(
            logits(&Decoder::load(&again).unwrap()),
            compressed,
            "{family}"
        );
    }
    assert_eq!(gone, 9);
}
