//! Models on a GPU, or as 16-bit floats, say, learn and write what f32 on the CPU does, as far as their numbers
//! go.
//!
//! With `LIGHTMOE_GPU` in the environment, and CUDA in the program, on the first GPU; and on the CPU with the
//! feature `composed` of the kernels, which alone take 16-bit floats there.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor};
use lightmoe_kernels::{as_rows, linear};
use lightmoe_models::{
    Checkpoint, CheckpointWriter, Decoder, Family, Format, GenerateOptions, LanguageModel,
    Manifest, ParameterKind, Placement, Scheme, Tokens, generate,
};
use lightmoe_train::{Point, Recovery, finish_recovery};
use support::{Models, RECOVERY, bits, finish, interrupt, logits, of, options, parameters, write};

/// Where models can be, and how far what they say may be from f32 on the CPU.
fn placements() -> Vec<(Placement, f32)> {
    let mut all = Vec::new();
    let half = Tensor::ones((1, 1), DType::BF16, &Device::Cpu).unwrap();
    if linear(&half, &half).is_ok() {
        all.push((Device::Cpu, DType::F32, 1e-5));
        all.push((Device::Cpu, DType::BF16, 0.05));
        all.push((Device::Cpu, DType::F16, 0.05));
    } else {
        all.push((Device::Cpu, DType::BF16, 0.05));
    }
    if std::env::var_os("LIGHTMOE_GPU").is_some() {
        let gpu = Device::new_cuda_with_stream(0).unwrap();
        all.push((gpu.clone(), DType::F32, 1e-3));
        all.push((gpu.clone(), DType::BF16, 0.05));
        all.push((gpu, DType::F16, 0.05));
    }
    let placement = |(device, dtype, within)| (Placement { device, dtype }, within);
    all.into_iter().map(placement).collect()
}

/// Whether what is trained is computed with in the type of the other weights.
fn rows_are_as_weights(place: &Placement) -> bool {
    let one = Tensor::ones(1, place.dtype, &place.device).unwrap();
    as_rows(&one).unwrap().dtype() == place.dtype
}

/// Experts of a width that the kernels of GPUs do not take, and of one that they take.
fn all_models() -> [Models; 2] {
    [Models::new(), Models::sized(16, 6)]
}

/// In the root mean square: with few digits a token chooses another expert now and then, and is far away.
#[track_caller]
fn close(ours: &[f32], expected: &[f32], within: f32, what: &Placement) {
    assert_eq!(ours.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let error = squares(&mut ours.iter().zip(expected).map(|(a, b)| a - b)).sqrt();
    let whole = squares(&mut expected.iter().copied()).sqrt();
    assert!(error <= within * whole, "{error} of {whole} on {what:?}");
}

#[test]
fn they_say_the_same() {
    for models in all_models() {
        for (place, within) in placements() {
            for checkpoint in [&models.original, &models.built, &models.factored()] {
                let expected = logits(&Decoder::load(checkpoint).unwrap());
                let model = Decoder::load(&checkpoint.on(&place)).unwrap();
                close(&logits(&model), &expected, within, &place);
            }
            let expected = logits(&models.prepared(true));
            let model = models.prepared_on(&place, true);
            close(&logits(&model), &expected, within, &place);
        }
    }
}

/// Where nobody asks what routers decided a GPU runs layers whole, if their routers have no more digits than
/// 16-bit files.
#[test]
fn they_say_the_same_where_nobody_looks() {
    let models = Models::sized(16, 6);
    for (place, within) in placements() {
        let compressed = [&models.built, &models.with_vectors()];
        for (i, checkpoint) in [&models.original].into_iter().chain(compressed).enumerate() {
            let path = models
                .folder
                .path()
                .join(format!("rounded-{i}-{:?}", place.dtype));
            let rounded = write(&path, &checkpoint.config().raw, &|name, shape| {
                let numbers = checkpoint.tensor(name, shape).unwrap();
                let numbers = numbers.to_dtype(DType::BF16).unwrap();
                numbers.to_dtype(DType::F32).unwrap()
            });
            let expected = logits(&Decoder::load(&rounded).unwrap());
            let model = Decoder::load(&rounded.on(&place)).unwrap();
            close(&logits(&model), &expected, within, &place);
            // Few tokens and many, which other kernels take, in turn.
            for rows in [1, 3, 1, 2] {
                let ids: Vec<u32> = (0..rows * 20).map(|i| (i * 7 % 24) as u32).collect();
                let tokens = Tokens { ids: &ids, rows };
                let of = |hidden: Tensor| -> Vec<f32> {
                    let hidden = hidden.to_dtype(DType::F32).unwrap();
                    hidden.flatten_all().unwrap().to_vec1().unwrap()
                };
                let seen = of(model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap());
                let unseen = of(model.hidden_states(tokens, None).unwrap());
                close(&unseen, &seen, within, &place);
            }
        }
    }
}

/// Token by token from a cache, of prompts of different lengths.
#[test]
fn they_go_on_the_same() {
    for models in all_models() {
        let prompts = [vec![1, 2, 3, 4, 5], vec![7], vec![9, 8, 7]];
        for (place, within) in placements() {
            let model = Decoder::load(&models.original.on(&place)).unwrap();
            let options = GenerateOptions::greedy(8, Vec::new());
            let answers = generate(&model, &prompts, &options, &mut |_| true).unwrap();
            for (prompt, answer) in prompts.iter().zip(answers) {
                // What was generated is what a whole pass finds likeliest, or as likely but for rounding.
                let all = [&prompt[..], &answer].concat();
                let tokens = Tokens::one(&all);
                let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
                let rows: Vec<Vec<f32>> = model.logits(&hidden).unwrap().to_vec2().unwrap();
                for (i, &token) in answer.iter().enumerate() {
                    let row = &rows[prompt.len() - 1 + i];
                    let best = row.iter().copied().fold(f32::MIN, f32::max);
                    let scale = row.iter().fold(0f32, |most, v| most.max(v.abs()));
                    assert!(best - row[token as usize] <= within * scale, "{place:?}");
                }
            }
        }
    }
}

#[test]
fn they_learn_the_same() {
    for models in all_models() {
        let losses = |curve: &[Point]| curve.iter().map(|p| p.loss as f32).collect::<Vec<_>>();
        let last_components = Recovery {
            trained_rank: Some(1),
            anneal: false,
            ..RECOVERY
        };
        let bases_by_adapters = Recovery {
            base_rank: Some(2),
            adapters_fade_in: true,
            ..RECOVERY
        };
        for (way, recovery) in [RECOVERY, last_components, bases_by_adapters]
            .iter()
            .enumerate()
        {
            let mut options = options();
            options.annealing.end_ratio *= f64::from(u8::from(recovery.anneal));
            let host = models.folders(&format!("host-{way}"));
            let mut model = models.prepared_by(&Placement::default(), recovery);
            let expected = losses(&finish(&mut model, &options, &host));
            for (i, (place, within)) in placements().into_iter().enumerate() {
                let folders = models.folders(&format!("place-{way}-{i}"));
                let mut model = models.prepared_by(&place, recovery);
                let curve = losses(&finish(&mut model, &options, &folders));
                // Rounding grows with the steps.
                close(&curve[..10], &expected[..10], 2.0 * within, &place);
                close(&curve, &expected, 20.0 * within.min(0.01), &place);
                let trained = logits(&model);
                finish_recovery(&mut model).unwrap();
                let path = models.folder.path().join(format!("recovered-{way}-{i}"));
                let config = &models.built.config().raw;
                let written = write(&path, config, &of(&model));
                let reloaded = logits(&Decoder::load(&written.on(&place)).unwrap());
                // The numbers that were trained, as files give them to a model here: nothing trains, so
                // that it runs as a model from files does.
                model
                    .visit(&mut |_, kind, tensor| {
                        *tensor = match kind {
                            ParameterKind::Router => place.exact().put(&tensor.detach())?,
                            _ => place.put(&tensor.detach())?,
                        };
                        Ok(())
                    })
                    .unwrap();
                close(&reloaded, &logits(&model), 1e-5, &place);
                // On the CPU they were f32 until then.
                if rows_are_as_weights(&place) {
                    close(&reloaded, &trained, within, &place);
                }
            }
        }
    }
}

/// Biases train beside constants that do not, while originals fade out or without any, and go on after a stop.
#[test]
fn biases_learn_the_same() {
    let models = Models::sized(16, 6);
    let built = models.with_vectors();
    for anneal in [false, true] {
        let recovery = Recovery { anneal, ..RECOVERY };
        let mut options = options();
        options.annealing.end_ratio *= f64::from(u8::from(anneal));
        let mut model = models.prepared_from(&built, &Placement::default(), &recovery);
        let before = parameters(&mut model);
        let host = models.folders(&format!("vectors-{anneal}"));
        let expected = finish(&mut model, &options, &host);
        let after = parameters(&mut model);
        for (name, (_, bits)) in &before {
            let vectors = name.ends_with("biases") || name.ends_with("constants");
            let changed = after[name].1 != *bits;
            assert!(!vectors || changed == name.ends_with("biases"), "{name}");
        }
        let mut stopped = models.prepared_from(&built, &Placement::default(), &recovery);
        let folders = models.folders(&format!("stopped-vectors-{anneal}"));
        interrupt(&mut stopped, &options, &folders, 7);
        let mut stopped = models.prepared_from(&built, &Placement::default(), &recovery);
        assert_eq!(finish(&mut stopped, &options, &folders), expected);
        assert_eq!(parameters(&mut stopped), after);
        let losses = |curve: &[Point]| curve.iter().map(|p| p.loss as f32).collect::<Vec<_>>();
        for (i, (place, within)) in placements().into_iter().enumerate() {
            let mut model = models.prepared_from(&built, &place, &recovery);
            let folders = models.folders(&format!("vectors-{anneal}-{i}"));
            let curve = losses(&finish(&mut model, &options, &folders));
            close(&curve[..10], &losses(&expected)[..10], 2.0 * within, &place);
        }
    }
}

#[test]
fn a_stopped_training_goes_on_to_the_same_bits() {
    for models in all_models() {
        for (i, (place, _)) in placements().into_iter().enumerate() {
            let mut whole = models.prepared_on(&place, true);
            finish(
                &mut whole,
                &options(),
                &models.folders(&format!("whole-{i}")),
            );
            let folders = models.folders(&format!("stopped-{i}"));
            interrupt(
                &mut models.prepared_on(&place, true),
                &options(),
                &folders,
                7,
            );
            let mut model = models.prepared_on(&place, true);
            finish(&mut model, &options(), &folders);
            let all = |model: &mut Decoder| {
                let mut all = Vec::new();
                let see = &mut |_: &str, _, tensor: &mut Tensor| {
                    all.push(bits(&tensor.to_dtype(DType::F32)?));
                    Ok(())
                };
                model.visit(see).unwrap();
                all
            };
            assert!(all(&mut model) == all(&mut whole), "{place:?}");
        }
    }
}

/// Files of f32 that were read as 16-bit floats keep what did not move.
#[test]
fn what_did_not_train_keeps_its_digits() {
    for models in all_models() {
        for (i, (place, _)) in placements().into_iter().enumerate() {
            let start = models.built.on(&place);
            let mut model = Decoder::load(&start).unwrap();
            let mut moved = Vec::new();
            let see = &mut |name: &str, kind, tensor: &mut Tensor| {
                if kind == ParameterKind::Adapter {
                    *tensor = (tensor.to_dtype(DType::F32)? + 0.125)?;
                    moved.push(name.to_owned());
                }
                Ok(())
            };
            model.visit(see).unwrap();
            assert!(!moved.is_empty());
            let path = models.folder.path().join(format!("over-{i}"));
            let config = models.built.config();
            let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
            let layout = models.built.layout();
            let writer = CheckpointWriter::for_model(&path, &format, config, layout).unwrap();
            model.write_over(&writer, &start).unwrap();
            writer.finish(&config.raw).unwrap();
            let written = Checkpoint::open(&path).unwrap();
            for (name, shape) in Manifest::of(config, layout).unwrap().tensors {
                let of = |checkpoint: &Checkpoint| bits(&checkpoint.tensor(&name, &shape).unwrap());
                let is_adapter = name.contains("lora_");
                assert_eq!(
                    of(&written) != of(&models.built),
                    is_adapter,
                    "{name} {place:?}"
                );
            }
        }
    }
}
