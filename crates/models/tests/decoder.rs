//! The whole model: batches, padding, the cache, generation, and what is written of it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor, Var};
use lightmoe_models::{
    Adapters, Decoder, GenerateOptions, LanguageModel, ParameterKind, SlotLayout, Tokens, generate,
    multiplied_out,
};
use std::collections::HashSet;
use std::path::Path;
use support::{
    FORMS, Folder, Form, Random, annealing, assert_close, bank_of, begin, config, config_with,
    logits, open, values,
};

/// f32, the same sums in another order.
const TOLERANCE: f64 = 1e-5;

fn mixed(folder: &Folder) -> Decoder {
    let original = folder.original(&config());
    Decoder::load(&folder.compressed(&original, Form::Mixed.slots())).unwrap()
}

fn rows(tensor: &Tensor, first: usize, count: usize) -> Tensor {
    tensor.narrow(0, first, count).unwrap()
}

#[test]
fn a_row_of_a_batch_is_the_row_alone() {
    let folder = Folder::new();
    let (model, ids) = (mixed(&folder), Random::new(4).ids(22));
    let both = logits(&model, &ids, 2);
    for row in 0..2 {
        let alone = logits(&model, &ids[row * 11..][..11], 1);
        assert_close(&rows(&both, row * 11, 11), &alone, TOLERANCE);
    }
}

#[test]
fn padding_on_the_right_changes_nothing_on_the_left() {
    let folder = Folder::new();
    let (model, mut ids) = (mixed(&folder), Random::new(4).ids(12));
    let before = logits(&model, &ids, 1);
    for pad in [1, 17] {
        ids.truncate(7);
        ids.resize(12, pad);
        assert_close(
            &rows(&logits(&model, &ids, 1), 0, 7),
            &rows(&before, 0, 7),
            TOLERANCE,
        );
    }
    // The last position does see them.
    let after = values(&rows(&logits(&model, &ids, 1), 11, 1));
    assert_ne!(after, values(&rows(&before, 11, 1)));
}

#[test]
fn chunks_with_a_cache_equal_one_pass() {
    let folder = Folder::new();
    let model = mixed(&folder);
    let ids = Random::new(4).ids(24);
    let (first, second) = ids.split_at(12);
    let whole = logits(&model, &ids, 2);
    for chunks in [vec![1; 12], vec![5, 1, 4, 2], vec![11, 1], vec![12]] {
        let (mut cache, mut at) = (model.cache(), 0);
        for n in chunks {
            let chunk = [&first[at..at + n], &second[at..at + n]].concat();
            let tokens = Tokens {
                ids: &chunk,
                rows: 2,
            };
            let hidden = model
                .forward(tokens, Some(&mut cache), &mut |_, _, _| Ok(()))
                .unwrap();
            let ours = model.logits(&hidden).unwrap();
            for row in 0..2 {
                let expected = rows(&whole, row * 12 + at, n);
                assert_close(&rows(&ours, row * n, n), &expected, TOLERANCE);
            }
            at += n;
        }
    }
}

#[test]
fn a_cache_keeps_no_history_for_gradients() {
    let folder = Folder::new();
    // Of dense slots alone, so that every token has a graph of one size.
    let mut model = Decoder::load(&folder.original(&config())).unwrap();
    model
        .visit(&mut |_, _, tensor| {
            *tensor = Var::from_tensor(tensor)?.into_inner();
            Ok(())
        })
        .unwrap();
    let mut cache = model.cache();
    let mut step = |ids: &[u32]| {
        let hidden = model.forward(Tokens::one(ids), Some(&mut cache), &mut |_, _, _| Ok(()));
        hidden.unwrap().sum_all().unwrap().sorted_nodes().len()
    };
    let (first, second, third) = (step(&[1]), step(&[2]), step(&[3]));
    assert!(first > 20, "no graph to compare");
    // From the second step on, the joint of the old and the new is there too.
    assert!(second < first + 20, "{first} {second}");
    assert_eq!(third, second);
}

#[test]
fn what_cannot_be_run_is_an_error_that_says_what_to_do() {
    let folder = Folder::new();
    let model = mixed(&folder);
    let other = folder.original(&config_with(serde_json::json!({"num_hidden_layers": 1})));
    let mut short = Decoder::load(&other).unwrap().cache();
    let fail = |ids: &[u32], rows, cache: Option<&mut _>, word: &str| {
        let tokens = Tokens { ids, rows };
        let result = model.forward(tokens, cache, &mut |_, _, _| Ok(()));
        let message = result.unwrap_err().to_string();
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    };
    fail(&[], 1, None, "at least one token");
    fail(&[1, 2, 3], 2, None, "2 rows");
    fail(&[1], 0, None, "0 rows");
    fail(&[1, 24], 1, None, "tokenizer");
    fail(&[1; 33], 1, None, "shorten");
    fail(&[1], 1, Some(&mut short), "another model");
}

fn options() -> GenerateOptions {
    GenerateOptions::greedy(9, Vec::new())
}

#[test]
fn generation_of_a_batch_is_that_of_its_rows() {
    let folder = Folder::new();
    let model = mixed(&folder);
    // Some are longer: they are read on while the others have their answers begun.
    let prompts: Vec<_> = (0..8)
        .map(|seed| Random::new(seed).ids(5 + seed as usize % 3 * 4))
        .collect();
    let together = generate(&model, &prompts, &options(), &mut |_| true).unwrap();
    for (prompt, ours) in prompts.iter().zip(&together) {
        let alone = generate(
            &model,
            std::slice::from_ref(prompt),
            &options(),
            &mut |_| true,
        )
        .unwrap();
        assert_eq!(&alone[0], ours);
        // And that of a loop that knows no cache.
        let mut ids = prompt.clone();
        for &token in ours {
            let all = values(&logits(&model, &ids, 1));
            let last = &all[all.len() - 24..];
            let best = (0..24).max_by(|&a, &b| last[a].total_cmp(&last[b]));
            assert_eq!(best, Some(token as usize));
            ids.push(token);
        }
    }
    let firsts: HashSet<u32> = together.iter().map(|row| row[0]).collect();
    assert_eq!(
        firsts.len(),
        6,
        "the prompts make no difference: {together:?}"
    );
}

#[test]
fn generation_stops_where_it_should() {
    let folder = Folder::new();
    let model = mixed(&folder);
    let prompts: Vec<_> = (0..3).map(|seed| Random::new(seed).ids(5)).collect();
    let free = generate(&model, &prompts, &options(), &mut |_| true).unwrap();
    let mut options = options();
    // After a token that ends an answer, which is not returned; the other rows go on.
    options.ends = vec![99, free[0][3]];
    let cut = |row: &[u32]| {
        row.iter()
            .copied()
            .take_while(|&t| t != free[0][3])
            .collect()
    };
    let expected: Vec<Vec<u32>> = free.iter().map(|row| cut(row)).collect();
    assert!(expected[0].len() < 9);
    let stopped = generate(&model, &prompts, &options, &mut |_| true).unwrap();
    assert_eq!(stopped, expected);
    // Where the caller says so.
    options.ends.clear();
    let mut seen = Vec::new();
    let each = &mut |token| {
        seen.push(token);
        seen.len() < 4
    };
    let stopped = generate(&model, &prompts, &options, each).unwrap();
    assert_eq!((&stopped[0][..], &seen[..]), (&free[0][..4], &free[0][..4]));
    // At the end of the context.
    options.max_new_tokens = 1000;
    let full = generate(&model, &prompts, &options, &mut |_| true).unwrap();
    assert_eq!(full[0].len(), 32 - 5);
    for prompt in [vec![1; 32], vec![]] {
        generate(&model, &[prompt], &options, &mut |_| true).unwrap_err();
    }
    let uneven = [vec![1; 30], vec![1]];
    let rows = generate(&model, &uneven, &options, &mut |_| true).unwrap();
    assert_eq!((rows[0].len(), rows[1].len()), (2, 31));
}

#[test]
fn sampling_follows_its_seed() {
    let folder = Folder::new();
    let model = mixed(&folder);
    let prompt = [Random::new(1).ids(5)];
    let sample = |seed, top_p| {
        let options = GenerateOptions {
            temperature: 1.5,
            top_p,
            seed,
            ..options()
        };
        generate(&model, &prompt, &options, &mut |_| true).unwrap()
    };
    assert_eq!(sample(1, Some(0.9)), sample(1, Some(0.9)));
    assert!((2..6).any(|seed| sample(seed, None) != sample(1, None)));
    let greedy = generate(&model, &prompt, &options(), &mut |_| true).unwrap();
    assert_eq!(sample(1, Some(1e-6)), greedy);
}

fn write(model: &Decoder, path: &Path, config: &serde_json::Value) -> Decoder {
    let writer = begin(path, DType::F32, &model.tensors().unwrap());
    model.write(&writer).unwrap();
    writer.finish(config).unwrap();
    Decoder::load(&open(path)).unwrap()
}

#[test]
fn a_written_model_is_the_model() {
    let folder = Folder::new();
    for tied in [false, true] {
        let changes = serde_json::json!({"tie_word_embeddings": tied});
        let original = folder.original(&config_with(changes));
        for form in FORMS.into_iter().chain([Form::Every]) {
            let checkpoint = folder.compressed(&original, form.slots());
            let (model, ids) = (Decoder::load(&checkpoint).unwrap(), Random::new(6).ids(12));
            let copy = write(&model, &folder.path("copy"), &model.config().raw);
            assert_eq!(
                values(&logits(&copy, &ids, 1)),
                values(&logits(&model, &ids, 1))
            );
            assert_eq!(open(&folder.path("copy")).names(), checkpoint.names());
        }
    }
}

/// Adapters that do something, on every dense slot and every base.
fn attach_adapters(model: &mut Decoder) {
    let (config, mut random) = (model.config().clone(), Random::new(9));
    for (l, bank) in model.banks_mut().enumerate() {
        let experts = bank.dense_experts().to_vec();
        bank.dense_adapters = Adapters::fresh(&config, l, &experts, (2, 1), &Device::Cpu).unwrap();
        let bases: Vec<usize> = (0..bank.base_count()).collect();
        bank.base_adapters = Adapters::fresh(&config, l, &bases, (3, 2), &Device::Cpu).unwrap();
        for adapters in [&mut bank.dense_adapters, &mut bank.base_adapters] {
            for (_, b) in adapters.iter_mut().flat_map(|a| a.b.named_mut()) {
                *b = random.tensor(b.dims(), 0.0, 0.5);
            }
        }
    }
}

/// Factors of which some components are frozen compute, and are written, as before; the frozen ones
/// are not among the parameters.
#[test]
fn frozen_components_change_nothing_but_what_trains() {
    let folder = Folder::new();
    for form in FORMS {
        let original = folder.original(&config());
        let compressed = folder.compressed(&original, form.slots());
        let ids = Random::new(6).ids(12);
        for trained in [0, 1, 2, 9] {
            let mut model = Decoder::load(&compressed).unwrap();
            let expected = logits(&model, &ids, 1);
            let slots = compressed.layout().layers.values();
            let ranks = slots.flat_map(|layout| layout.adapted().map(|(_, _, rank)| rank));
            let wanted: usize = ranks.map(|rank| rank.min(trained)).sum();
            for bank in model.banks_mut() {
                bank.freeze_components(trained).unwrap();
            }
            assert_close(&logits(&model, &ids, 1), &expected, TOLERANCE);
            let mut found = 0;
            let visit = &mut |name: &str, _: ParameterKind, tensor: &mut Tensor| {
                if name.contains("replaced.lora_A.gate_proj") {
                    found += tensor.dim(0)?;
                }
                Ok(())
            };
            model.visit(visit).unwrap();
            assert_eq!(found, wanted);
            for bank in model.banks_mut() {
                bank.join_components().unwrap();
            }
            assert_eq!(values(&logits(&model, &ids, 1)), values(&expected));
        }
    }
}

#[test]
fn merged_adapters_of_kept_experts_compute_the_same() {
    let folder = Folder::new();
    for form in FORMS {
        let original = folder.original(&config());
        let compressed = folder.compressed(&original, form.slots());
        let (mut model, ids) = (Decoder::load(&compressed).unwrap(), Random::new(6).ids(12));
        let bare = logits(&model, &ids, 1);
        attach_adapters(&mut model);
        let expected = logits(&model, &ids, 1);
        assert_ne!(values(&expected), values(&bare), "the adapters do nothing");
        for bank in model.banks_mut() {
            bank.merge_adapters().unwrap();
            assert!(bank.dense_adapters.is_none() && bank.base_adapters.is_none());
        }
        assert_close(&logits(&model, &ids, 1), &expected, TOLERANCE);
        let copy = write(&model, &folder.path("copy"), &model.config().raw);
        assert_close(&logits(&copy, &ids, 1), &expected, TOLERANCE);
        // Merging again changes nothing.
        let before = values(&logits(&model, &ids, 1));
        bank_of(&mut model, 1).merge_adapters().unwrap();
        assert_eq!(values(&logits(&model, &ids, 1)), before);
    }
}

#[test]
fn a_model_that_is_more_than_its_checkpoint_is_not_written() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    let annealing = annealing(&compressed, &original, 0.1);
    let mut adapted = Decoder::load(&compressed).unwrap();
    attach_adapters(&mut adapted);
    for model in [annealing, adapted] {
        let message = model.tensors().unwrap_err().to_string();
        assert!(message.contains("finish the recovery"), "{message}");
    }
}

/// A removed expert is as if the router had no row for it.
#[test]
fn a_removed_expert_is_not_chosen() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let removed = [1, 2, 6];
    let mut slots = vec![SlotLayout::Dense; 8];
    removed.iter().for_each(|&e| slots[e] = SlotLayout::Removed);
    let layout = [slots.clone(), slots];
    let pruned = Decoder::load(&folder.compressed(&original, layout)).unwrap();
    // The same model without those rows and matrices.
    let mut raw = original.config().raw.clone();
    raw["num_experts"] = 5.into();
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let kept: Vec<usize> = (0..8).filter(|e| !removed.contains(e)).collect();
    for (name, tensor) in Decoder::load(&original).unwrap().tensors().unwrap() {
        if name.contains(".mlp.gate.") {
            let rows: Vec<u32> = kept.iter().map(|&e| e as u32).collect();
            let rows = Tensor::new(rows, tensor.device()).unwrap();
            tensors.push((name, tensor.index_select(&rows, 0).unwrap()));
            continue;
        }
        let expert = name.split_once(".experts.").map(|(layer, rest)| {
            let (e, rest) = rest.split_once('.').unwrap();
            (
                layer.to_owned(),
                e.parse::<usize>().unwrap(),
                rest.to_owned(),
            )
        });
        match expert {
            None => tensors.push((name, tensor)),
            Some((layer, e, rest)) => {
                let Some(place) = kept.iter().position(|&k| k == e) else {
                    continue;
                };
                tensors.push((format!("{layer}.experts.{place}.{rest}"), tensor));
            }
        }
    }
    let smaller = Decoder::load(&open(&folder.write("smaller", &tensors, &raw))).unwrap();
    let ids = Random::new(6).ids(20);
    let tokens = Tokens { ids: &ids, rows: 1 };
    pruned
        .forward(tokens, None, &mut |_, _, routing| {
            let chosen = &routing.unwrap().chosen;
            assert!(chosen.iter().all(|&e| !removed.contains(&(e as usize))));
            Ok(())
        })
        .unwrap();
    let (ours, expected) = (logits(&pruned, &ids, 1), logits(&smaller, &ids, 1));
    assert_close(&ours, &expected, TOLERANCE);
}

/// Multiplied out, matrix by matrix, the model is a plain one that computes the same.
#[test]
fn a_multiplied_out_model_computes_the_same() {
    let folder = Folder::new();
    let original = folder.original(&config());
    for form in FORMS {
        let compressed = folder.compressed(&original, form.slots());
        let mut all = Decoder::load(&original).unwrap().tensors().unwrap();
        for (name, tensor) in &mut all {
            let Some((layer, rest)) = name.split_once(".mlp.experts.") else {
                *tensor = compressed.tensor(name, tensor.dims()).unwrap();
                continue;
            };
            let (expert, projection) = rest.split_once('.').unwrap();
            let layer = layer.rsplit('.').next().unwrap().parse().unwrap();
            let place = (layer, expert.parse().unwrap());
            let shape = <[usize; 2]>::try_from(tensor.dims()).unwrap();
            let projection = projection.strip_suffix(".weight").unwrap();
            *tensor = multiplied_out(&compressed, place, projection, shape).unwrap();
        }
        let path = folder.write("dense", &all, &original.config().raw);
        let (dense, ids) = (Decoder::load(&open(&path)).unwrap(), Random::new(6).ids(12));
        let model = Decoder::load(&compressed).unwrap();
        assert_close(
            &logits(&dense, &ids, 1),
            &logits(&model, &ids, 1),
            TOLERANCE,
        );
    }
    // What no matrices compute has no dense form.
    let compressed = folder.compressed(&original, Form::Every.slots());
    for place in [(0, 2), (0, 4), (1, 3), (1, 4)] {
        let refused = multiplied_out(&compressed, place, "up_proj", [12, 16]).unwrap_err();
        assert!(refused.to_string().contains("compact"), "{refused}");
    }
}
