//! Small random OLMoE checkpoints, original and compressed, in a temporary folder.
#![allow(
    dead_code,
    unused_imports,
    reason = "every test binary uses its own part"
)]

use candle_core::{DType, Device, Tensor};
use lightmoe_models::{
    Bank, BankLayout, Checkpoint, CheckpointWriter, Decoder, FactoredBases, Family, Format,
    LanguageModel, LayerLayout, Manifest, ModelConfig, Projections, Scheme, SlotLayout, Tokens,
    load_experts, names,
};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

mod compare;

pub use compare::{assert_close, values};

pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
pub const DENSE: SlotLayout = SlotLayout::Dense;

pub fn adapted(group: impl Into<Option<usize>>, rank: usize) -> SlotLayout {
    SlotLayout::adapted(group.into(), rank)
}

/// An adapted slot with a bias.
pub fn biased(group: impl Into<Option<usize>>, rank: usize) -> SlotLayout {
    let group = group.into();
    SlotLayout::Adapted {
        group,
        rank,
        bias: true,
    }
}

pub fn mixed(bases: usize, rank: usize) -> SlotLayout {
    SlotLayout::Mixed { bases, rank }
}

/// Two layers of eight experts (`E = 8`, `K = 2`, `H = 16`, `F = 12`, 24 tokens).
pub fn config() -> Value {
    json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
        "norm_topk_prob": false, "tie_word_embeddings": false, "eos_token_id": 0,
    })
}

/// `config` with some keys changed.
pub fn config_with(changes: Value) -> Value {
    let mut config = config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// What the layers of the compressed models look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Two and three groups beside dense slots.
    Mixed,
    /// Adapters alone replace some experts.
    NoBases,
    /// Bases alone: a plain merge.
    Merge,
    /// Every slot of the first layer adapted, none of the second.
    Extremes,
    /// Every form there is beside every other, with ranks that differ.
    Every,
    /// Slots mixed from bases, alone and beside most others.
    Mixture,
}

/// Those whose slots all compute with matrices.
pub const FORMS: [Form; 4] = [Form::Mixed, Form::NoBases, Form::Merge, Form::Extremes];

impl Form {
    /// The slots of layer 0 and 1; groups out of order, so that positions differ from numbers.
    pub fn slots(self) -> [Vec<SlotLayout>; 2] {
        let grouped = |groups: [i64; 8], rank| {
            let slot = |g: i64| usize::try_from(g).map_or(DENSE, |g| adapted(g, rank));
            groups.map(slot).to_vec()
        };
        let few = [adapted(None, 3), DENSE, adapted(None, 3), DENSE];
        match self {
            Self::Mixed => [
                grouped([1, -1, 0, -1, 1, -1, 0, -1], 3),
                grouped([-1, 2, 0, 1, -1, 2, -1, 2], 3),
            ],
            Self::NoBases => [few.repeat(2), few.repeat(2)],
            Self::Merge => [
                grouped([0, -1, 0, -1, 0, -1, 0, -1], 0),
                grouped([1, 2, -1, 0, 0, 1, -1, 2], 0),
            ],
            Self::Every => [
                vec![
                    adapted(1, 3),
                    DENSE,
                    biased(None, 2),
                    adapted(0, 1),
                    SlotLayout::Constant,
                    biased(0, 0),
                    adapted(None, 4),
                    DENSE,
                ],
                vec![
                    SlotLayout::Constant,
                    adapted(None, 1),
                    DENSE,
                    SlotLayout::Removed,
                    biased(0, 2),
                    DENSE,
                    SlotLayout::Removed,
                    adapted(None, 3),
                ],
            ],
            Self::Mixture => [
                vec![mixed(3, 4); 8],
                vec![
                    SlotLayout::Constant,
                    mixed(2, 5),
                    DENSE,
                    SlotLayout::Removed,
                    adapted(0, 2),
                    mixed(2, 5),
                    adapted(None, 1),
                    mixed(2, 5),
                ],
            ],
            Self::Extremes => [grouped([2, 1, 0, 0, 1, 2, 1, 0], 3), vec![DENSE; 8]],
        }
    }

    pub fn has_adapters(self) -> bool {
        self != Self::Merge
    }
}

/// Layers whose bases are factored: under every slot of the first, beside other forms in the second.
pub fn factored_layers() -> [LayerLayout; 2] {
    let layer = |slots: Vec<SlotLayout>, rank, gate_up_rows, down_rows| LayerLayout {
        factored: Some(FactoredBases {
            rank,
            gate_up_rows,
            down_rows,
        }),
        ..LayerLayout::from(slots)
    };
    let second = vec![
        adapted(0, 0),
        DENSE,
        adapted(1, 3),
        SlotLayout::Constant,
        adapted(0, 2),
        adapted(None, 4),
        DENSE,
        adapted(1, 0),
    ];
    [
        layer(
            [1, 0, 0, 2, 1, 0, 2, 1].map(|g| adapted(g, 0)).to_vec(),
            4,
            2,
            3,
        ),
        layer(second, 3, 1, 16),
    ]
}

/// Random numbers: normal weights near zero, norms near one.
pub struct Random(pub ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub fn tensor(&mut self, shape: &[usize], center: f32, spread: f32) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| center + self.0.random_range(-spread..spread))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// `count` places of `rows`, ascending.
    pub fn places(&mut self, count: usize, rows: usize) -> Tensor {
        let mut all: Vec<u32> = (0..rows as u32).collect();
        all.shuffle(&mut self.0);
        all.truncate(count);
        all.sort_unstable();
        Tensor::new(all, &Device::Cpu).unwrap()
    }

    pub fn ids(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.0.random_range(0..24)).collect()
    }

    /// `k` different experts for each token.
    pub fn choices(&mut self, tokens: usize, experts: usize, k: usize) -> Vec<u32> {
        let mut chosen = Vec::new();
        for _ in 0..tokens {
            let mut all: Vec<u32> = (0..experts as u32).collect();
            all.shuffle(&mut self.0);
            chosen.extend(&all[..k]);
        }
        chosen
    }
}

/// Every tensor that a checkpoint of this layout has.
pub fn tensors(config: &ModelConfig, layout: &BankLayout, seed: u64) -> Vec<(String, Tensor)> {
    let mut random = Random::new(seed);
    let (v, h, f) = (
        config.vocab_size,
        config.hidden_size,
        config.moe.intermediate_size,
    );
    let (q, kv) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let (mut out, mut indices) = (Vec::new(), Vec::new());
    let mut weight = |name: String, shape: &[usize], spread: f32| {
        out.push((name, random.tensor(shape, 0.0, spread)));
    };
    weight(names::whole(names::EMBED), &[v, h], 1.0);
    if !config.tie_word_embeddings {
        weight(names::whole(names::HEAD), &[v, h], 1.0);
    }
    let shape = |p: &str| if p == "down_proj" { [h, f] } else { [f, h] };
    for (&l, layer) in &layout.layers {
        weight(names::layer(l, "self_attn.q_proj"), &[q, h], 0.5);
        weight(names::layer(l, "self_attn.k_proj"), &[kv, h], 0.5);
        weight(names::layer(l, "self_attn.v_proj"), &[kv, h], 0.5);
        weight(names::layer(l, "self_attn.o_proj"), &[h, q], 0.5);
        weight(names::layer(l, "mlp.gate"), &[layer.slots.len(), h], 1.0);
        for p in PROJECTIONS {
            let [rows, columns] = shape(p);
            if layer.main.is_some() {
                weight(names::scales(l, p), &[layer.slots.len(), columns], 1.0);
            }
            for g in 0..layer.bases() {
                let Some(factored) = &layer.factored else {
                    weight(names::base(l, g, p), &[rows, columns], 0.5);
                    continue;
                };
                let name = |part: &str| names::base(l, g, &format!("{p}.{part}"));
                weight(name("lora_A"), &[factored.rank, columns], 0.5);
                weight(name("lora_B"), &[rows, factored.rank], 0.5);
                weight(name("rows"), &[factored.rows(p), columns], 0.5);
                indices.push((name("index"), factored.rows(p), rows));
            }
            if let Some((bases, rank)) = layer.mixture().filter(|_| p != "down_proj") {
                (0..bases).for_each(|b| weight(names::basis(l, b, p), &[rank, h], 1.5));
            }
            for (e, slot) in layer.slots.iter().enumerate() {
                match *slot {
                    SlotLayout::Dense => weight(names::expert(l, e, p), &[rows, columns], 0.5),
                    SlotLayout::Removed => {}
                    SlotLayout::Constant if p == "up_proj" => {
                        weight(names::constant(l, e), &[h], 0.5);
                    }
                    SlotLayout::Constant => {}
                    SlotLayout::Mixed { bases, rank } if p != "down_proj" => {
                        let name = |part: &str| names::expert(l, e, &format!("{p}.{part}"));
                        weight(name("transform"), &[rows, rank], 0.5);
                        weight(name("mixing"), &[bases], 1.0);
                    }
                    SlotLayout::Mixed { .. } => {
                        weight(names::expert(l, e, p), &[rows, columns], 0.5);
                    }
                    SlotLayout::Adapted { rank, bias, .. } => {
                        if bias && p == "down_proj" {
                            weight(names::bias(l, e), &[h], 0.5);
                        }
                        if rank == 0 {
                            continue;
                        }
                        let name = |ab: &str| names::expert(l, e, &format!("{p}.lora_{ab}"));
                        weight(name("A"), &[rank, columns], 0.5);
                        weight(name("B"), &[rows, rank], 0.5);
                    }
                }
            }
        }
    }
    for (name, count, rows) in indices {
        out.push((name, random.places(count, rows)));
    }
    let mut norm = |name: String, width: usize| {
        out.push((name, random.tensor(&[width], 1.0, 0.3)));
    };
    norm(names::whole(names::FINAL_NORM), h);
    for &l in layout.layers.keys() {
        norm(names::layer(l, "input_layernorm"), h);
        norm(names::layer(l, "post_attention_layernorm"), h);
        norm(names::layer(l, "self_attn.q_norm"), q);
        norm(names::layer(l, "self_attn.k_norm"), kv);
    }
    out
}

/// A folder that lives as long as the test.
pub struct Folder {
    pub dir: TempDir,
}

impl Folder {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes tensors and config as the checkpoint `name`.
    pub fn write(&self, name: &str, tensors: &[(String, Tensor)], config: &Value) -> PathBuf {
        let path = self.path(name);
        let writer = begin(&path, DType::F32, tensors);
        for (name, tensor) in tensors {
            writer.push(name, tensor).unwrap();
        }
        writer.finish(config).unwrap();
        path
    }

    /// A random original model.
    pub fn original(&self, config: &Value) -> Checkpoint {
        let parsed = ModelConfig::from_json(config, Path::new("config.json")).unwrap();
        let tensors = tensors(&parsed, &BankLayout::dense(&parsed), 1);
        open(&self.write("original", &tensors, config))
    }

    /// A compressed model: what is not an expert is as in the original, and so are dense slots.
    pub fn compressed(&self, original: &Checkpoint, slots: [Vec<SlotLayout>; 2]) -> Checkpoint {
        self.of_layers(original, slots.map(LayerLayout::from))
    }

    /// The same of whole layouts of the layers.
    pub fn of_layers(&self, original: &Checkpoint, layers: [LayerLayout; 2]) -> Checkpoint {
        let mut layout = BankLayout::dense(original.config());
        layout.layers = layers.into_iter().enumerate().collect();
        let config = layout.annotate(original.config()).unwrap();
        let mut all = tensors(original.config(), &layout, 2);
        for (name, tensor) in &mut all {
            if original.names().contains(&name.as_str()) {
                *tensor = original.tensor(name, tensor.dims()).unwrap();
            }
        }
        open(&self.write("compressed", &all, &config))
    }
}

pub fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

/// The compressed model in the middle of its training: originals attached, at share `beta`.
pub fn annealing(compressed: &Checkpoint, original: &Checkpoint, beta: f64) -> Decoder {
    let mut model = Decoder::load(compressed).unwrap();
    for (l, bank) in model.banks_mut().enumerate() {
        let replaced = bank.adapted_experts().to_vec();
        bank.originals = load_experts(original, l, &replaced).unwrap();
        bank.anneal(beta);
    }
    model
}

/// The experts of a layer.
pub fn bank_of(model: &mut Decoder, layer: usize) -> &mut Bank {
    model.layers[layer].bank_mut().unwrap()
}

/// Every stack of a bank, those that `Decoder::visit` does not show included.
pub fn stacks(bank: &mut Bank) -> Vec<&mut Projections> {
    let mut all = Vec::new();
    all.extend(&mut bank.dense);
    all.extend(&mut bank.bases);
    all.extend(&mut bank.originals);
    if let Some(factored) = &mut bank.factored {
        all.extend([
            &mut factored.factors.a,
            &mut factored.factors.b,
            &mut factored.rows,
        ]);
    }
    all.extend(bank.adapters.iter_mut().flat_map(|a| [&mut a.a, &mut a.b]));
    let kept = bank.dense_adapters.iter_mut();
    all.extend(kept.flat_map(|a| [&mut a.a, &mut a.b]));
    all
}

/// Every tensor of a bank's mixtures that `Decoder::visit` shows while they are whole.
pub fn mixtures(bank: &mut Bank) -> Vec<&mut Tensor> {
    let mut all = Vec::new();
    if let Some(mixed) = &mut bank.mixed {
        for mixture in [&mut mixed.gate, &mut mixed.up] {
            all.extend([
                &mut mixture.bases,
                &mut mixture.weights,
                &mut mixture.transforms,
            ]);
        }
        all.push(&mut mixed.down);
    }
    all
}

/// Logits `[B · T, V]` of one forward pass without a cache.
pub fn logits(model: &Decoder, ids: &[u32], rows: usize) -> Tensor {
    let tokens = Tokens { ids, rows };
    let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
    model.logits(&hidden).unwrap()
}

/// A random model's tensors.
pub fn original_tensors(folder: &Folder) -> Vec<(String, Tensor)> {
    Decoder::load(&folder.original(&config()))
        .unwrap()
        .tensors()
        .unwrap()
}

/// The tensors of a model, whatever they are.
pub fn manifest(tensors: &[(String, Tensor)]) -> Manifest {
    let all = tensors.iter();
    let indices = tensors.iter().filter(|(name, _)| names::is_index(name));
    Manifest {
        layout: BankLayout {
            schema_version: 1,
            layers: Default::default(),
        },
        tensors: all
            .map(|(name, t)| (name.clone(), t.dims().to_vec()))
            .collect(),
        types: indices
            .map(|(name, _)| (name.clone(), DType::U32))
            .collect(),
    }
}

/// A writer of these tensors under OLMoE's names.
pub fn begin(path: &Path, dtype: DType, tensors: &[(String, Tensor)]) -> CheckpointWriter {
    let format = Format::new(dtype, Scheme::published(Family::Olmoe));
    CheckpointWriter::new(path, &format, &manifest(tensors), &[]).unwrap()
}

pub fn write_sharded(path: &Path, tensors: &[(String, Tensor)], dtype: DType, shard_bytes: u64) {
    let format = Format {
        shard_bytes,
        ..Format::new(dtype, Scheme::published(Family::Olmoe))
    };
    let writer = CheckpointWriter::new(path, &format, &manifest(tensors), &[]).unwrap();
    for (name, tensor) in tensors {
        writer.push(name, tensor).unwrap();
    }
    writer.finish(&config()).unwrap();
}

/// Names in a folder, sorted.
pub fn files(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

pub fn index_json(path: &Path) -> Value {
    let text = fs::read_to_string(path.join("model.safetensors.index.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Where element `i` of a tensor lies in a safetensors file.
pub fn element(path: &Path, name: &str, dtype: DType, i: usize) -> usize {
    let bytes = fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = json[name]["data_offsets"][0].as_u64().unwrap() as usize;
    8 + header + start + i * dtype.size_in_bytes()
}
