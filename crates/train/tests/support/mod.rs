//! A small original model, what is built from it, and a training of a few steps.
#![allow(dead_code, reason = "every test binary uses its own part")]

use candle_core::{DType, Device, Tensor};
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{
    BankLayout, Checkpoint, CheckpointWriter, Decoder, FactoredBases, Family, Format,
    LanguageModel, LayerLayout, Manifest, ModelConfig, ParameterKind, Placement, Scheme,
    SlotLayout, Tokens, load_experts,
};
use lightmoe_train::{
    Annealing, AnnealingShape, Curve, Decay, Folders, Group, LearningRate, Outcome, Point,
    Recovery, Result, RowPruning, TrainBatch, TrainOptions, prepare_recovery, train, unfold_bases,
};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

pub const VOCABULARY: usize = 24;
pub const STEPS: usize = 40;
pub const RANK: usize = 3;
/// Of factored bases: 2 of 12 and 3 of 16 rows stay.
pub const SHAPE: FactoredBases = FactoredBases {
    rank: 2,
    gate_up_rows: 2,
    down_rows: 3,
};

/// Adapters on kept experts, and all of the rest.
pub const RECOVERY: Recovery = Recovery {
    kept_rank: RANK,
    base_rank: None,
    trained_rank: None,
    anneal: true,
    adapters_fade_in: false,
    seed: 2,
};

/// An original and the model built from it: of eight experts a layer every other one is replaced,
/// by two bases with adapters.
pub struct Models {
    pub folder: TempDir,
    pub original: Checkpoint,
    pub built: Checkpoint,
}

impl Models {
    pub fn new() -> Self {
        Self::sized(12, 5)
    }

    /// With experts of another width.
    pub fn sized(inner: usize, seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": inner,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5, "norm_topk_prob": false, "tie_word_embeddings": false,
            "eos_token_id": 0,
        });
        let parsed = ModelConfig::from_json(&config, Path::new("config.json")).unwrap();
        let model = Decoder::random(&parsed, seed).unwrap();
        let original = write(&folder.path().join("original"), &config, &of(&model));
        let adapted = |group| SlotLayout::adapted(Some(group), RANK);
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
    pub fn prepared(&self, anneal: bool) -> Decoder {
        self.prepared_on(&Placement::default(), anneal)
    }

    /// The same elsewhere, or of other numbers.
    pub fn prepared_on(&self, placement: &Placement, anneal: bool) -> Decoder {
        let recovery = Recovery { anneal, ..RECOVERY };
        self.prepared_by(placement, &recovery)
    }

    /// The same in another way.
    pub fn prepared_by(&self, placement: &Placement, recovery: &Recovery) -> Decoder {
        self.prepared_from(&self.built, placement, recovery)
    }

    /// Another compressed model.
    pub fn prepared_from(
        &self,
        built: &Checkpoint,
        placement: &Placement,
        recovery: &Recovery,
    ) -> Decoder {
        let mut model = Decoder::load(&built.on(placement)).unwrap();
        prepare_recovery(&mut model, &self.original.on(placement), recovery).unwrap();
        model
    }

    /// A model of the same original whose experts all share two factored bases.
    pub fn factored(&self) -> Checkpoint {
        let parsed = self.original.config();
        let slots = (0..8).map(|expert| SlotLayout::adapted(Some(expert % 2), 0));
        let layer = LayerLayout {
            factored: Some(SHAPE),
            ..LayerLayout::from(slots.collect::<Vec<_>>())
        };
        let mut layout = BankLayout::dense(parsed);
        layout.layers = (0..2).map(|l| (l, layer.clone())).collect();
        let config = layout.annotate(parsed).unwrap();
        let path = self.folder.path().join("factored");
        write(&path, &config, &|name, shape| match name {
            _ if name.contains(".index.") => {
                Tensor::arange(0, shape[0] as u32, &Device::Cpu).unwrap()
            }
            _ if name.contains(".bases.") => gaussian(&mut stream(1, name), 0.25, shape).unwrap(),
            _ => self.original.tensor(name, shape).unwrap(),
        })
    }

    /// A model of the same original with constants, and with biases beside bases, adapters and both.
    pub fn with_vectors(&self) -> Checkpoint {
        let parsed = self.original.config();
        let biased = |group, rank| SlotLayout::Adapted {
            group,
            rank,
            bias: true,
        };
        let slots = vec![
            biased(Some(0), RANK),
            SlotLayout::Dense,
            SlotLayout::Constant,
            SlotLayout::adapted(Some(0), 2),
            biased(None, RANK),
            SlotLayout::Constant,
            biased(Some(1), 0),
            SlotLayout::Dense,
        ];
        let mut layout = BankLayout::dense(parsed);
        layout.layers = (0..2)
            .map(|l| (l, LayerLayout::from(slots.clone())))
            .collect();
        let config = layout.annotate(parsed).unwrap();
        let path = self.folder.path().join("vectors");
        let made = [
            (".bases.", 0.25),
            (".lora_", 0.25),
            (".bias", 0.05),
            (".constant", 0.05),
        ];
        write(
            &path,
            &config,
            &|name, shape| match made.iter().find(|(part, _)| name.contains(part)) {
                Some((_, spread)) => gaussian(&mut stream(1, name), *spread, shape).unwrap(),
                None => self.original.tensor(name, shape).unwrap(),
            },
        )
    }

    /// The factored model at the beginning of a recovery: two experts of a layer are what its bases
    /// stand for.
    pub fn unfolded(&self, factored: &Checkpoint) -> Decoder {
        // What the bases stand for is read on the host.
        let mut model = Decoder::load(factored).unwrap();
        unfold_bases(&mut model, &mut |l| {
            Ok(load_experts(&self.original, l, &[0, 5])?.unwrap())
        })
        .unwrap();
        model
    }

    pub fn folders(&self, name: &str) -> Folders {
        Folders {
            state: self.folder.path().join(name).join("state"),
            logs: self.folder.path().join(name).join("logs"),
        }
    }
}

/// The tensors of a model by their names.
pub fn of(model: &Decoder) -> impl Fn(&str, &[usize]) -> Tensor {
    let tensors: BTreeMap<String, Tensor> = model.tensors().unwrap().into_iter().collect();
    move |name, _| tensors[name].clone()
}

pub fn write(
    path: &Path,
    config: &serde_json::Value,
    get: &dyn Fn(&str, &[usize]) -> Tensor,
) -> Checkpoint {
    let parsed = ModelConfig::from_json(config, path).unwrap();
    let layout = BankLayout::of(&parsed, path).unwrap();
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let writer = CheckpointWriter::for_model(path, &format, &parsed, &layout).unwrap();
    for (name, shape) in Manifest::of(&parsed, &layout).unwrap().tensors {
        writer.push(&name, &get(&name, &shape)).unwrap();
    }
    writer.finish(config).unwrap();
    Checkpoint::open(path).unwrap()
}

pub fn options() -> TrainOptions {
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
        micro_batch: 0,
        recompute: false,
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
pub fn batch(step: usize) -> Result<TrainBatch> {
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
pub fn finish(model: &mut Decoder, options: &TrainOptions, folders: &Folders) -> Vec<Point> {
    let outcome = train(model, options, folders, &batch, None, &mut |_| true).unwrap();
    assert_eq!(outcome, Outcome::Finished);
    Curve::read(&folders.logs).unwrap()
}

/// Trains until step `last` is done.
#[track_caller]
pub fn interrupt(model: &mut Decoder, options: &TrainOptions, folders: &Folders, last: usize) {
    let each = &mut |p: &Point| p.step < last;
    let outcome = train(model, options, folders, &batch, None, each).unwrap();
    assert_eq!(outcome, Outcome::Interrupted);
}

pub fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Every parameter with its kind and its bits.
pub fn parameters(model: &mut Decoder) -> BTreeMap<String, (ParameterKind, Vec<u32>)> {
    let mut all = BTreeMap::new();
    let see = &mut |name: &str, kind, tensor: &mut Tensor| {
        all.insert(name.to_owned(), (kind, bits(tensor)));
        Ok(())
    };
    model.visit(see).unwrap();
    all
}

pub fn logits(model: &Decoder) -> Vec<f32> {
    let batch = batch(0).unwrap();
    let tokens = Tokens {
        ids: &batch.tokens,
        rows: batch.rows,
    };
    let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
    let logits = model.logits(&hidden).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// The message of a training that fails.
#[track_caller]
pub fn failure(
    model: &mut Decoder,
    options: &TrainOptions,
    folders: &Folders,
    batch: &dyn Fn(usize) -> Result<TrainBatch>,
) -> String {
    train(model, options, folders, batch, None, &mut |_| true)
        .expect_err("nothing was noticed")
        .to_string()
}
