//! Continuous batching: prompts that take the places of others have the answers that they have alone.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Tensor, Var};
use lightmoe_models::{
    Cache, Checkpoint, Decoder, Ends, GenerateOptions, LanguageModel, Layer, LayerLayout,
    ModelConfig, Next, Observer, Placement, Result, Step, Tokens, generate_rows,
};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use support::{Folder, Form, Random, config, config_with, factored_layers};

/// A model that counts what it reads: rows and tokens of each pass. It also keeps what it says of each next
/// token, to the bit.
struct Counting {
    model: Decoder,
    passes: Mutex<Vec<(usize, usize)>>,
    said: Mutex<BTreeSet<Vec<u32>>>,
}

impl LanguageModel for Counting {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn ends(&self) -> &Ends {
        self.model.ends()
    }

    fn layer(&self, number: usize) -> Result<Cow<'_, Layer>> {
        self.model.layer(number)
    }

    fn forward(
        &self,
        tokens: Tokens<'_>,
        cache: Option<&mut Cache>,
        observe: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let mut passes = self.passes.lock().unwrap();
        passes.push((tokens.rows, tokens.ids.len() / tokens.rows));
        self.model.forward(tokens, cache, observe)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.model.logits(hidden)?;
        let rows = logits.to_vec2::<f32>()?.into_iter();
        let rows = rows.map(|row| row.into_iter().map(f32::to_bits).collect());
        self.said.lock().unwrap().extend(rows);
        Ok(logits)
    }
}

impl Counting {
    fn new(model: Decoder) -> Self {
        Self {
            model,
            passes: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// A small random one.
    fn random(family: &str, more: &Value) -> Self {
        let mut raw = json!({
            "model_type": family, "vocab_size": 24, "hidden_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        });
        raw.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
        Self::new(Decoder::random(&config, 3).unwrap())
    }

    /// That of a family in `fixtures/parity`.
    fn fixture(family: &str) -> Self {
        let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
        Self::new(Decoder::load(&Checkpoint::open(&parity.join(family)).unwrap()).unwrap())
    }

    /// Answers as long as `length` says of each prompt, and rows and tokens of each pass.
    fn answers(
        &self,
        prompts: &[Vec<u32>],
        at_once: usize,
        length: impl Fn(usize) -> usize,
    ) -> (Vec<Vec<u32>>, Vec<(usize, usize)>) {
        let options = GenerateOptions {
            at_once,
            ..GenerateOptions::greedy(100, Vec::new())
        };
        let each = &mut |prompt: usize, step: Step<'_>| {
            Ok(match step {
                Step::Token(answer) if answer.len() == length(prompt) => Next::EndRow,
                _ => Next::Continue,
            })
        };
        let answers = generate_rows(self, prompts, &options, each).unwrap();
        (answers, std::mem::take(&mut *self.passes.lock().unwrap()))
    }

    /// Answers to many prompts, some at a time, against those to each alone.
    fn check(&self, longest: usize) {
        let mut random = Random::new(7);
        // Some fill the context, one ends with its first token.
        let mut prompts: Vec<Vec<u32>> =
            (0..19).map(|i| random.ids(1 + i * 11 % longest)).collect();
        let context = self.config().max_position_embeddings;
        prompts[3] = random.ids(context - 2);
        prompts[12] = random.ids(context - 9);
        let length = |prompt: usize| 1 + prompt * 5 % 13;
        let alone = |i: usize| {
            self.answers(&prompts[i..][..1], 1, |_| length(i))
                .0
                .remove(0)
        };
        let alone: Vec<Vec<u32>> = (0..prompts.len()).map(alone).collect();
        let said = std::mem::take(&mut *self.said.lock().unwrap());
        assert_eq!((alone[0].len(), alone[3].len()), (1, 2));
        assert_eq!(alone[12].len(), 9);
        let tokens: BTreeSet<u32> = alone.iter().flatten().copied().collect();
        assert!(
            tokens.len() > 5,
            "the prompts make no difference: {alone:?}"
        );
        for at_once in [0, 1, 2, 5, 16, usize::MAX] {
            let (answers, passes) = self.answers(&prompts, at_once, length);
            assert_eq!(answers, alone, "{at_once} at once");
            let together = std::mem::take(&mut *self.said.lock().unwrap());
            // Other processors have no code of their own for a few rows.
            let is_exact = cfg!(target_arch = "x86_64");
            assert!(
                together == said || !is_exact,
                "{at_once} at once move last digits"
            );
            let rows = passes.iter().map(|pass| pass.0).max().unwrap();
            assert!(rows <= at_once.max(1), "{rows} rows");
        }
    }
}

#[test]
fn grouped_attention_with_and_without_a_window() {
    let olmoe = json!({"intermediate_size": 8, "num_experts": 4});
    Counting::random("olmoe", &olmoe).check(30);
    let windowed = json!({"intermediate_size": 8, "num_local_experts": 4, "sliding_window": 6});
    Counting::random("mixtral", &windowed).check(30);
}

#[test]
fn latent_attention() {
    Counting::fixture("deepseek_v2").check(40);
    Counting::fixture("deepseek_v3").check(40);
}

/// The angles depend on the whole length, within and beyond the original context.
#[test]
fn long_rope() {
    Counting::fixture("phimoe").check(90);
}

/// Kept and replaced experts of every form.
#[test]
fn compressed_layers() {
    let folder = Folder::new();
    let original = folder.original(&config_with(json!({"max_position_embeddings": 64})));
    let check = |compressed: &Checkpoint| {
        for dtype in [DType::F32, DType::BF16] {
            let placement = Placement {
                dtype,
                ..Placement::default()
            };
            Counting::new(Decoder::load(&compressed.on(&placement)).unwrap()).check(30);
        }
    };
    for form in [Form::Mixed, Form::Merge, Form::Every, Form::Mixture] {
        check(&folder.compressed(&original, form.slots()));
    }
    // Products as short as some that `gemm` rounds in another way.
    let mut factored = factored_layers();
    if let Some(bases) = &mut factored[0].factored {
        bases.rank = 2;
    }
    let scaling = LayerLayout {
        main: Some(1),
        ..LayerLayout::dense(original.config().moe.num_experts)
    };
    for layers in [factored, [scaling.clone(), scaling]] {
        check(&folder.of_layers(&original, layers));
    }
}

#[test]
fn a_place_is_not_left_empty_while_a_prompt_waits() {
    let experts = json!({"intermediate_size": 8, "num_experts": 4});
    let model = Counting::random("olmoe", &experts);
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| Random::new(i).ids(5 + i as usize)).collect();
    // Of two places, one has the long answer and the other the short ones, a token less than steps
    // because the first comes with the reading.
    let length = |prompt: usize| if prompt == 0 { 22 } else { 4 };
    let (answers, passes) = model.answers(&prompts, 2, length);
    assert_eq!(answers[0].len(), 22);
    let reading: Vec<(usize, usize)> = passes.iter().copied().filter(|p| p.1 > 1).collect();
    assert_eq!(reading[0], (2, 6));
    assert_eq!(
        &reading[1..],
        (7..13).map(|length| (1, length)).collect::<Vec<_>>()
    );
    let steps: Vec<usize> = passes.iter().filter(|p| p.1 == 1).map(|p| p.0).collect();
    assert_eq!(steps, [2; 21]);
}

#[test]
fn a_stop_ends_all_answers() {
    let experts = json!({"intermediate_size": 8, "num_experts": 4});
    let model = Counting::random("olmoe", &experts);
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| Random::new(i).ids(5)).collect();
    let options = GenerateOptions {
        at_once: 2,
        ..GenerateOptions::greedy(6, Vec::new())
    };
    // At the first token of a prompt that came later, while another is at work.
    let each = &mut |prompt: usize, step: Step<'_>| {
        Ok(match (prompt, step) {
            (0, Step::Token([_, _, _])) => Next::EndRow,
            (2, Step::Token([_])) => Next::Stop,
            _ => Next::Continue,
        })
    };
    let answers = generate_rows(&model, &prompts, &options, each).unwrap();
    let lengths: Vec<usize> = answers.iter().map(Vec::len).collect();
    assert_eq!(lengths, [3, 3, 1, 0, 0]);
}

/// More tokens than run at once have the bits that they have in parts, and gradients as ever.
#[test]
fn many_tokens_run_in_parts() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let layers = Form::Mixed.slots().map(LayerLayout::from);
    let model = Decoder::load(&folder.of_layers(&original, layers)).unwrap();
    let bank = model.layers[0].bank().unwrap();
    let (tokens, k) = (4096 + 70, 2);
    let mut random = Random::new(9);
    let x = random.tensor(&[tokens, 16], 0.0, 1.0);
    let gates = random.tensor(&[tokens * k], 0.5, 0.4);
    let chosen = random.choices(tokens, 8, k);
    let all = bank.forward(&x, &gates, &chosen).unwrap();
    let last = bank
        .forward(
            &x.narrow(0, 4000, 166).unwrap(),
            &gates.narrow(0, 4000 * k, 166 * k).unwrap(),
            &chosen[4000 * k..],
        )
        .unwrap();
    let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
    assert_eq!(rows(&all)[4000..], rows(&last));
    let trained = Var::from_tensor(&x).unwrap();
    let y = bank.forward(&trained, &gates, &chosen).unwrap();
    assert_eq!(rows(&y), rows(&all));
    let grads = y.sum_all().unwrap().backward().unwrap();
    let dx = rows(grads.get(&trained).unwrap());
    assert!(dx.iter().all(|row| row.iter().any(|&v| v != 0.0)));
}
