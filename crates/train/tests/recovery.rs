//! The recovery of a small compressed model: what changes, what stays, and going on after a stop.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{DType, Device, Tensor};
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{
    BankLayout, Checkpoint, CheckpointWriter, Decoder, Family, Format, LanguageModel, LayerLayout,
    Manifest, ModelConfig, ParameterKind, Scheme, SlotLayout, Tokens,
};
use lightmoe_train::{
    Annealing, AnnealingShape, Curve, Decay, Folders, Group, LearningRate, Outcome, Point,
    Recovery, Result, RowPruning, TrainBatch, TrainOptions, finish_recovery, prepare_recovery,
    train,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const VOCABULARY: usize = 24;
const STEPS: usize = 40;
const RANK: usize = 3;

/// An original and the model built from it: of eight experts a layer every other one is replaced,
/// by two bases with adapters.
struct Models {
    folder: TempDir,
    original: Checkpoint,
    built: Checkpoint,
}

impl Models {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5, "norm_topk_prob": false, "tie_word_embeddings": false,
            "eos_token_id": 0,
        });
        let parsed = ModelConfig::from_json(&config, Path::new("config.json")).unwrap();
        let model = Decoder::random(&parsed, 5).unwrap();
        let original = write(&folder.path().join("original"), &config, &of(&model));
        let adapted = |group| SlotLayout::Adapted {
            group: Some(group),
            rank: RANK,
        };
        let slots = [adapted(0), SlotLayout::Dense, adapted(1), SlotLayout::Dense].repeat(2);
        let mut layout = BankLayout::dense(&parsed);
        for l in 0..2 {
            let slots = slots.clone();
            layout.layers.insert(l, LayerLayout::from(slots));
        }
        let config = layout.annotate(&parsed).unwrap();
        let built = write(&folder.path().join("built"), &config, &|name, shape| {
            if name.contains("lora_B") {
                return Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
            }
            if name.contains("lora_A") {
                return gaussian(&mut stream(1, name), 0.25, shape).unwrap();
            }
            // Each base is one of its members.
            let own = name
                .replace("bases.1", "experts.2")
                .replace("bases.0", "experts.0");
            original.tensor(&own, shape).unwrap()
        });
        Self {
            folder,
            original,
            built,
        }
    }

    /// The built model at the beginning of a recovery.
    fn prepared(&self, anneal: bool) -> Decoder {
        let mut model = Decoder::load(&self.built).unwrap();
        let recovery = Recovery {
            kept_rank: RANK,
            base_rank: None,
            trained_rank: None,
            anneal,
            seed: 2,
        };
        prepare_recovery(&mut model, &self.original, &recovery).unwrap();
        model
    }

    fn folders(&self, name: &str) -> Folders {
        Folders {
            state: self.folder.path().join(name).join("state"),
            logs: self.folder.path().join(name).join("logs"),
        }
    }
}

/// The tensors of a model by their names.
fn of(model: &Decoder) -> impl Fn(&str, &[usize]) -> Tensor {
    let tensors: BTreeMap<String, Tensor> = model.tensors().unwrap().into_iter().collect();
    move |name, _| tensors[name].clone()
}

fn write(
    path: &Path,
    config: &serde_json::Value,
    get: &dyn Fn(&str, &[usize]) -> Tensor,
) -> Checkpoint {
    let parsed = ModelConfig::from_json(config, path).unwrap();
    let layout = BankLayout::of(&parsed, path).unwrap();
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let mut writer = CheckpointWriter::for_model(path, &format, &parsed, &layout).unwrap();
    for (name, shape) in Manifest::of(&parsed, &layout).unwrap().tensors {
        writer.push(&name, &get(&name, &shape)).unwrap();
    }
    writer.finish(config).unwrap();
    Checkpoint::open(path).unwrap()
}

fn options() -> TrainOptions {
    TrainOptions {
        steps: STEPS,
        learning_rate: LearningRate {
            peak: 0.02,
            warmup: 0.1,
            flat_until: 0.0,
            decay: Decay::Linear,
            final_share: 0.0,
        },
        beta1: 0.9,
        beta2: 0.999,
        clip_norm: 1.0,
        balance: 0.0,
        annealing: Annealing {
            shape: AnnealingShape::Linear,
            end_ratio: 0.5,
            gamma: 3.0,
        },
        pruning: RowPruning::default(),
        groups: vec![Group {
            kinds: vec![ParameterKind::Base, ParameterKind::Adapter],
            weight_decay: 0.0,
        }],
        checkpoint_every: 5,
        fingerprint: "this run".into(),
    }
}

/// Four sequences that count up by three; only the beginning differs.
fn batch(step: usize) -> Result<TrainBatch> {
    let (rows, len) = (4, 10);
    let token = |row: usize, i: usize| ((step * 7 + row * 5 + 3 * i) % VOCABULARY) as u32;
    Ok(TrainBatch {
        tokens: (0..rows * len).map(|i| token(i / len, i % len)).collect(),
        rows,
        loss_mask: (0..rows * len).map(|i| i % len >= 2).collect(),
    })
}

/// Trains to the end and returns the curve.
#[track_caller]
fn finish(model: &mut Decoder, options: &TrainOptions, folders: &Folders) -> Vec<Point> {
    let outcome = train(model, options, folders, &batch, None, &mut |_| true).unwrap();
    assert_eq!(outcome, Outcome::Finished);
    Curve::read(&folders.logs).unwrap()
}

/// Trains until step `last` is done.
#[track_caller]
fn interrupt(model: &mut Decoder, folders: &Folders, last: usize) {
    let each = &mut |p: &Point| p.step < last;
    let outcome = train(model, &options(), folders, &batch, None, each).unwrap();
    assert_eq!(outcome, Outcome::Interrupted);
}

/// The message of a training that fails.
#[track_caller]
fn failure(
    model: &mut Decoder,
    options: &TrainOptions,
    folders: &Folders,
    batch: &dyn Fn(usize) -> Result<TrainBatch>,
) -> String {
    train(model, options, folders, batch, None, &mut |_| true)
        .expect_err("nothing was noticed")
        .to_string()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Every parameter with its kind and its bits.
fn parameters(model: &mut Decoder) -> BTreeMap<String, (ParameterKind, Vec<u32>)> {
    let mut all = BTreeMap::new();
    let see = &mut |name: &str, kind, tensor: &mut Tensor| {
        all.insert(name.to_owned(), (kind, bits(tensor)));
        Ok(())
    };
    model.visit(see).unwrap();
    all
}

fn logits(model: &Decoder) -> Vec<f32> {
    let batch = batch(0).unwrap();
    let tokens = Tokens {
        ids: &batch.tokens,
        rows: batch.rows,
    };
    let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
    let logits = model.logits(&hidden).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn originals(model: &Decoder) -> usize {
    model.banks().filter(|b| b.originals.is_some()).count()
}

#[test]
fn training_lowers_the_loss_and_changes_what_it_should() {
    use ParameterKind::{Adapter, Base, Router};
    let models = Models::new();
    for router in [false, true] {
        let mut options = options();
        let mut trained = vec![Base, Adapter];
        trained.extend(router.then_some(Router));
        options.groups[0].kinds = trained.clone();
        let mut model = models.prepared(true);
        let before = parameters(&mut model);
        let name = format!("router-{router}");
        let curve = finish(&mut model, &options, &models.folders(&name));
        let after = parameters(&mut model);
        assert_eq!(before.len(), after.len());
        for (name, (kind, bits)) in &before {
            let changed = after[name].1 != *bits;
            assert_eq!(changed, trained.contains(kind), "{name}");
        }
        let mean =
            |points: &[Point]| points.iter().map(|p| p.loss).sum::<f64>() / points.len() as f64;
        let (first, last) = (mean(&curve[..5]), mean(&curve[STEPS - 5..]));
        assert!(last < 0.9 * first, "{first} → {last}");
        let steps: Vec<usize> = curve.iter().map(|p| p.step).collect();
        assert_eq!(steps, (0..STEPS).collect::<Vec<_>>());
    }
}

#[test]
fn originals_go_when_beta_is_zero_and_the_written_model_is_the_trained_one() {
    let models = Models::new();
    let mut model = models.prepared(true);
    assert_eq!(originals(&model), 2);
    // β is 1 − step/20.
    interrupt(&mut model, &models.folders("early"), 19);
    assert_eq!(originals(&model), 2);
    let mut model = models.prepared(true);
    interrupt(&mut model, &models.folders("late"), 20);
    assert_eq!(originals(&model), 0);

    let mut model = models.prepared(true);
    let curve = finish(&mut model, &options(), &models.folders("whole"));
    assert_eq!((curve[0].beta, curve[10].beta), (1.0, 0.5));
    assert!(curve[20..].iter().all(|p| p.beta == 0.0));
    assert_eq!(originals(&model), 0);
    let trained = logits(&model);
    finish_recovery(&mut model).unwrap();
    let path = models.folder.path().join("recovered");
    let written = write(&path, &models.built.config().raw, &of(&model));
    assert_eq!(written.names(), models.built.names());
    let reloaded = logits(&Decoder::load(&written).unwrap());
    let largest = trained.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in trained.iter().zip(&reloaded) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} is not {b}");
    }
    assert_ne!(trained, logits(&Decoder::load(&models.built).unwrap()));
}

#[test]
fn without_annealing_the_originals_are_never_there() {
    let models = Models::new();
    let mut options = options();
    options.annealing.end_ratio = 0.0;
    let anneal = options.annealing.beta(0, STEPS) > 0.0;
    assert!(!anneal);
    let mut model = models.prepared(anneal);
    assert_eq!(originals(&model), 0);
    let curve = finish(&mut model, &options, &models.folders("run"));
    assert!(curve.iter().all(|p| p.beta == 0.0));
}

#[test]
fn a_stopped_training_goes_on_to_the_same_bits() {
    let models = Models::new();
    let whole = models.folders("whole");
    let mut expected = models.prepared(true);
    finish(&mut expected, &options(), &whole);
    // While β falls, at a checkpoint, after β is zero, and before the last step.
    for last in [7, 9, 26, STEPS - 2] {
        let folders = models.folders(&format!("stopped-{last}"));
        interrupt(&mut models.prepared(true), &folders, last);
        assert_eq!(Curve::read(&folders.logs).unwrap().len(), last + 1);
        // What a kill leaves: a curve that is ahead of the checkpoint, its last line torn.
        let curve = folders.logs.join("loss.jsonl");
        let ahead = format!("{}{{\"step\":", fs::read_to_string(&curve).unwrap());
        fs::write(&curve, ahead).unwrap();
        let mut model = models.prepared(true);
        finish(&mut model, &options(), &folders);
        assert!(
            parameters(&mut model) == parameters(&mut expected),
            "{last}"
        );
        let file = |folders: &Folders| fs::read(folders.logs.join("loss.jsonl")).unwrap();
        assert!(file(&folders) == file(&whole), "{last}");
    }
    // A finished one has nothing left to do.
    let mut model = models.prepared(true);
    finish(&mut model, &options(), &whole);
    assert!(parameters(&mut model) == parameters(&mut expected));
    assert_eq!(originals(&model), 0);
}

#[test]
fn a_checkpoint_of_another_run_or_a_damaged_one_is_refused() {
    let models = Models::new();
    let folders = models.folders("run");
    interrupt(&mut models.prepared(true), &folders, 7);
    let mut other = options();
    other.fingerprint = "another run".into();
    let message = failure(&mut models.prepared(true), &other, &folders, &batch);
    for word in ["state.safetensors", "other settings", "remove it"] {
        assert!(message.contains(word), "{message}");
    }
    let path = folders.state.join("state.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let message = failure(&mut models.prepared(true), &options(), &folders, &batch);
    assert!(message.contains("state.safetensors"), "{message}");
}

#[test]
fn what_goes_wrong_is_said() {
    let models = Models::new();
    let mut wild = options();
    wild.learning_rate.peak = 1e30;
    let folders = models.folders("wild");
    let message = failure(&mut models.prepared(true), &wild, &folders, &batch);
    for word in ["step 1", "learning rate"] {
        assert!(message.contains(word), "{message}");
    }
    let silent = |step| {
        let mut batch = batch(step)?;
        batch.loss_mask.fill(false);
        Ok(batch)
    };
    let folders = models.folders("silent");
    let message = failure(&mut models.prepared(true), &options(), &folders, &silent);
    assert!(message.contains("no target tokens"), "{message}");
    let mut nothing = options();
    nothing.groups.clear();
    let folders = models.folders("nothing");
    let message = failure(&mut models.prepared(true), &nothing, &folders, &batch);
    assert!(message.contains("nothing to train"), "{message}");
}
