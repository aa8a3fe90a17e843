//! Whole layers and their tables on a GPU against a plain reference in double precision.
//!
//! All memory holds NaN before a kernel writes it. Without a GPU the tests say that they were skipped;
//! LIGHTMOE_GPU makes a missing one a failure. What has `quick` in its name is quick enough for a memory
//! checker.

mod arguments;
#[cfg(feature = "linked")]
mod between;
mod gradients;
mod numbers;
mod packing;
mod reference;
#[cfg(feature = "linked")]
mod tensors;
#[cfg(feature = "linked")]
mod trained;
mod vectors;
#[cfg(feature = "linked")]
mod whole;

use super::block::{Block, Shape};
use super::device::Gpu;
use super::grouped::Path;
use super::route::{NONE, choose, router_logits};
use super::workspace::Workspace;
use super::{Choice, ExpertGroups};
use crate::Dispatch;
use half::{bf16, f16};
use reference::{Layer, Number, cut, random, seeded, values};

/// Set where a missing GPU must not go unseen.
const REQUIRED: &str = "LIGHTMOE_GPU";

fn gpu() -> Option<Gpu> {
    match Gpu::new(0) {
        Ok(gpu) => Some(gpu.poisoned()),
        Err(error) => {
            assert!(std::env::var_os(REQUIRED).is_none(), "{error}");
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// A layer and how many of its adapted slots have no base.
fn layer<T: Number>(seed: u64, shape: Shape, without: usize, choice: Choice) -> Layer {
    Layer::random::<T>(seed, shape, without, choice, choice.sigmoid)
}

const SOFTMAX: Choice = Choice {
    sigmoid: false,
    groups: None,
    renormalize: false,
    scaling: 1.0,
};

/// DeepSeek's choice: logistic scores with a correction, limited to groups, renormalised and scaled.
const LIMITED: Choice = Choice {
    sigmoid: true,
    groups: Some(ExpertGroups {
        count: 4,
        kept: 2,
        two_best: true,
    }),
    renormalize: true,
    scaling: 2.5,
};

/// Sizes with ragged tails, one token, all experts chosen, no dense, no adapted, no base, kept experts that are
/// adapted.
const SHAPES: [(Shape, usize); 8] = [
    (shape(72, 40, 8, 3, [5, 3], 1, 8), 0),
    (shape(64, 136, 16, 4, [6, 8], 3, 24), 2),
    (shape(128, 64, 4, 4, [4, 0], 0, 0), 0),
    (shape(64, 128, 12, 2, [0, 12], 4, 32), 0),
    (shape(256, 88, 8, 1, [4, 4], 0, 16), 4),
    (shape(520, 264, 70, 8, [33, 37], 2, 64), 0),
    (keeping(5, shape(64, 72, 9, 3, [0, 9], 2, 16)), 1),
    (keeping(3, shape(72, 64, 6, 2, [2, 3], 0, 8)), 0),
];

/// The same with that many kept experts among the adapted ones.
const fn keeping(kept: usize, shape: Shape) -> Shape {
    Shape { kept, ..shape }
}

/// `[dense, adapted]`
const fn shape(
    hidden: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
    [dense, adapted]: [usize; 2],
    groups: usize,
    rank: usize,
) -> Shape {
    Shape {
        hidden,
        inner,
        experts,
        top_k,
        dense,
        adapted,
        kept: 0,
        groups,
        rank,
        ranked: None,
    }
}

/// `‖a − b‖ / ‖b‖`, infinite where a number is missing.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| b * b).sum();
    let distance = (sum / norm).sqrt();
    if distance.is_finite() {
        distance
    } else {
        f64::INFINITY
    }
}

/// The choices in the tables, after the tables were held against a sort on the host.
fn choices<T: Number>(
    gpu: &Gpu,
    layer: &Layer,
    work: &Workspace<T>,
    tokens: usize,
) -> Vec<Vec<(usize, f64)>> {
    let Shape {
        top_k,
        dense,
        adapted,
        groups,
        ..
    } = layer.shape;
    let (rows, tables) = (tokens * top_k, &work.tables);
    let read = |t| gpu.download::<u32>(t).unwrap();
    let (chosen, gates) = (read(&tables.chosen), gpu.download(&tables.gates).unwrap());
    let positions = layer.shape.positions();
    let identity: Vec<usize> = (0..positions).collect();
    let sorted = Dispatch::new(&chosen[..rows], top_k, &identity, positions);
    let starts: Vec<u32> = sorted.starts.iter().map(|&s| s as u32).collect();
    assert_eq!(read(&tables.starts)[..=positions], starts[..], "starts");
    assert_eq!(
        read(&tables.row_tokens)[..rows],
        sorted.tokens[..],
        "tokens of rows"
    );
    let row_gates = gpu.download(&tables.row_gates).unwrap();
    let row_of = read(&tables.row_of);
    for (row, &choice) in sorted.pairs.iter().enumerate() {
        assert_eq!(
            row_of[choice as usize], row as u32,
            "row of choice {choice}"
        );
        assert_eq!(row_gates[row], gates[choice as usize], "gate of row {row}");
    }
    if adapted > 0 {
        let based: Vec<usize> = layer.group_of.iter().flatten().copied().collect();
        let first = dense + layer.shape.kept;
        let pairs = sorted.token_groups(first, first + based.len(), &based);
        let mut of_row = vec![NONE; rows];
        of_row[sorted.starts[first]..sorted.starts[first + based.len()]]
            .copy_from_slice(&pairs.pair_of_row);
        check_pairs(gpu, work, rows, groups, &pairs, &of_row, &sorted.tokens);
    }
    let choice = |i: usize| (chosen[i] as usize, f64::from(gates[i]));
    (0..tokens)
        .map(|t| (t * top_k..(t + 1) * top_k).map(choice).collect())
        .collect()
}

/// The order of pairs within a group is free on the host and by token on the GPU: they are compared by
/// what they mean.
fn check_pairs<T: Number>(
    gpu: &Gpu,
    work: &Workspace<T>,
    rows: usize,
    groups: usize,
    host: &crate::TokenGroups,
    host_of_row: &[u32],
    row_tokens: &[u32],
) {
    let read = |t| gpu.download::<u32>(t).unwrap();
    let tables = &work.tables;
    let (starts, tokens) = (read(&tables.pair_starts), read(&tables.pair_tokens));
    let (of_row, first) = (read(&tables.pair_of_row), read(&tables.pair_of));
    for (group, segment) in host.segments.iter().enumerate() {
        assert_eq!(
            starts[group] as usize, segment.start,
            "first pair of group {group}"
        );
    }
    assert_eq!(starts[groups] as usize, host.tokens.len(), "pairs");
    for row in 0..rows {
        assert_eq!(
            of_row[row] == NONE,
            host_of_row[row] == NONE,
            "pair of row {row}"
        );
        if of_row[row] == NONE {
            continue;
        }
        let group = |pair: u32, starts: &[u32]| starts.iter().filter(|&&s| s <= pair).count() - 1;
        let host_starts: Vec<u32> = host.segments.iter().map(|s| s.start as u32).collect();
        assert_eq!(
            tokens[of_row[row] as usize], row_tokens[row],
            "token of row {row}'s pair"
        );
        assert_eq!(
            group(of_row[row], &starts[..groups.max(1)]),
            group(host_of_row[row], &host_starts),
            "group of row {row}'s pair"
        );
    }
    let mut firsts: Vec<u32> = first[..rows]
        .iter()
        .copied()
        .filter(|&p| p != NONE)
        .collect();
    firsts.sort_unstable();
    assert!(
        firsts.iter().copied().eq(0..host.tokens.len() as u32),
        "first choices: {firsts:?}"
    );
}

/// How a layer runs.
#[derive(Debug, Clone, Copy)]
enum Way {
    Decode,
    Grouped(Path),
    /// By choices that were made before.
    Given,
}

fn run<T: Number>(
    gpu: &Gpu,
    layer: &Layer,
    block: &Block<T>,
    tokens: usize,
    way: Way,
    seed: u64,
) -> Vec<T> {
    let mut rng = seeded(seed);
    let x: Vec<T> = random(&mut rng, tokens * layer.shape.hidden, 1);
    let on_gpu = gpu.upload(&x).unwrap();
    let mut work = Workspace::annealed(gpu, layer.shape, tokens).unwrap();
    let mut out = gpu.alloc::<T>(x.len()).unwrap();
    let done = match way {
        Way::Given => {
            router_logits(gpu, block, &on_gpu, tokens, &mut work.logits).unwrap();
            let logits = work.logits.slice(..tokens * layer.shape.experts);
            let (chosen, gates) = choose::<T>(gpu, &layer.frame(gpu), &logits, tokens).unwrap();
            let routed = block.route_given(gpu, &chosen, &gates, tokens, &mut work);
            routed.and_then(|()| {
                let queued = &mut |_| Ok(());
                block.forward_routed(gpu, &on_gpu, tokens, &mut work, &mut out, queued)
            })
        }
        Way::Decode => block.forward(gpu, &on_gpu, tokens, &mut work, &mut out),
        Way::Grouped(path) => {
            work.path = path;
            block.forward_grouped(gpu, &on_gpu, tokens, &mut work, &mut out)
        }
    };
    done.unwrap();
    let given = gpu.download(&out).unwrap();
    let choices = choices(gpu, layer, &work, tokens);
    let x = values(&x);
    for (t, (x, choice)) in x.chunks(layer.shape.hidden).zip(&choices).enumerate() {
        let expected = layer.choose(&layer.logits(x));
        for ((position, gate), (p, g)) in choice.iter().zip(&expected) {
            assert!(
                position == p && (gate - g).abs() < 2e-3 * g,
                "{way:?}: token {t} has {choice:?}, the reference {expected:?}"
            );
        }
    }
    let expected = layer.forward(&x, &choices);
    for (t, (given, expected)) in values(&given)
        .chunks(layer.shape.hidden)
        .zip(expected.chunks(layer.shape.hidden))
        .enumerate()
    {
        let distance = distance(given, expected);
        assert!(
            distance < 1e-2,
            "{way:?}, {tokens} tokens of {:?}: token {t} is off by {distance:.1e}",
            layer.shape
        );
    }
    given
}

/// All shapes with these numbers of tokens.
fn all_shapes<T: Number>(tokens: &[usize], way: Way) {
    let Some(gpu) = gpu() else { return };
    for (i, &(shape, without)) in SHAPES.iter().enumerate() {
        let layer = layer::<T>(i as u64, shape, without, SOFTMAX);
        let block = layer.upload::<T>(&gpu);
        for &tokens in tokens {
            let seed = (100 * i + tokens) as u64;
            let first = run(&gpu, &layer, &block, tokens, way, seed);
            let second = run(&gpu, &layer, &block, tokens, way, seed);
            let same = first
                .iter()
                .zip(&second)
                .all(|(a, b)| a.value().to_bits() == b.value().to_bits());
            assert!(same, "{way:?}: two runs differ");
        }
    }
}

#[test]
fn small_batches_decode() {
    all_shapes::<bf16>(&[1, 3, 8, 17, 32], Way::Decode);
}

#[test]
fn small_batches_decode_in_f16() {
    all_shapes::<f16>(&[1, 9], Way::Decode);
}

#[test]
fn small_batches_group_with_mma() {
    all_shapes::<bf16>(&[1, 5, 40, 300], Way::Grouped(Path::Mma));
}

#[test]
fn small_batches_group_with_mma_in_f16() {
    all_shapes::<f16>(&[33], Way::Grouped(Path::Mma));
}

/// Slots of ranks of their own, wider than 128 and none among them.
#[test]
fn quick_adapters_have_ranks_of_their_own() {
    let Some(gpu) = gpu() else { return };
    for (seed, shape, without) in [
        (31, shape(72, 40, 8, 3, [3, 5], 1, 264), 0),
        (32, shape(64, 136, 9, 4, [0, 9], 2, 136), 3),
        (33, shape(264, 72, 6, 2, [2, 4], 0, 48), 4),
    ] {
        let mut layer = layer::<bf16>(seed, shape, without, SOFTMAX);
        let ranks = cut(&mut layer, &[shape.rank, 8, 0, 72, 16]);
        layer.shape.ranked = Some(ranks.iter().sum());
        let block = layer.upload_ranked::<bf16>(&gpu, &ranks);
        for tokens in [1, 40, 150] {
            run(&gpu, &layer, &block, tokens, Way::Decode, seed);
        }
    }
}

#[test]
fn quick_choices_are_made_before() {
    all_shapes::<bf16>(&[1, 5, 40], Way::Given);
}

#[test]
fn small_batches_group_on_hopper() {
    if gpu().is_some_and(|gpu| gpu.is_hopper()) {
        all_shapes::<bf16>(&[1, 5, 40, 300], Way::Grouped(Path::Hopper));
    } else {
        eprintln!("SKIPPED: no Hopper GPU");
    }
}

#[test]
fn small_batches_group_on_hopper_in_f16() {
    if gpu().is_some_and(|gpu| gpu.is_hopper()) {
        all_shapes::<f16>(&[33], Way::Grouped(Path::Hopper));
    } else {
        eprintln!("SKIPPED: no Hopper GPU");
    }
}

/// While the replaced experts have a share, whole batches of any size run by sorted rows.
#[test]
fn quick_layers_are_annealed() {
    let Some(gpu) = gpu() else { return };
    for (i, &(shape, without)) in SHAPES.iter().enumerate() {
        let mut layer = layer::<bf16>(i as u64, shape, without, SOFTMAX);
        for beta in [0.4, 1.0] {
            layer.beta = beta;
            let block = layer.upload::<bf16>(&gpu);
            for (tokens, way) in [(3, Way::Decode), (70, Way::Grouped(Path::best(&gpu)))] {
                run(&gpu, &layer, &block, tokens, way, tokens as u64);
            }
        }
    }
}

/// With some experts removed.
#[test]
fn quick_choices_are_limited_to_groups() {
    let Some(gpu) = gpu() else { return };
    let shape = shape(64, 32, 32, 6, [20, 9], 2, 8);
    let layer = layer::<bf16>(7, shape, 1, LIMITED);
    let block = layer.upload::<bf16>(&gpu);
    for (tokens, way) in [(4, Way::Decode), (100, Way::Grouped(Path::Mma))] {
        run(&gpu, &layer, &block, tokens, way, tokens as u64);
    }
}

/// A layer of OLMoE's width, where tiles are full and groups are deep.
#[test]
fn wide_layers_agree_with_the_reference() {
    let Some(gpu) = gpu() else { return };
    let shape = shape(2048, 1024, 16, 4, [8, 8], 2, 32);
    let layer = layer::<bf16>(11, shape, 0, SOFTMAX);
    let block = layer.upload::<bf16>(&gpu);
    let mut ways = vec![(32, Way::Decode), (600, Way::Grouped(Path::Mma))];
    if gpu.is_hopper() {
        ways.push((600, Way::Grouped(Path::Hopper)));
    }
    for (tokens, way) in ways {
        run(&gpu, &layer, &block, tokens, way, 1);
    }
}

#[test]
fn a_captured_graph_gives_the_same() {
    let Some(gpu) = gpu() else { return };
    let layer = layer::<bf16>(3, SHAPES[1].0, SHAPES[1].1, SOFTMAX);
    let block = layer.upload::<bf16>(&gpu);
    for tokens in [4, 64] {
        let direct = run(&gpu, &layer, &block, tokens, Way::Decode, 5);
        let mut rng = seeded(5);
        let x: Vec<bf16> = random(&mut rng, tokens * layer.shape.hidden, 1);
        let x = gpu.upload(&x).unwrap();
        let mut work = Workspace::new(&gpu, layer.shape, tokens).unwrap();
        let mut out = gpu.alloc(tokens * layer.shape.hidden).unwrap();
        gpu.synchronize().unwrap();
        let graph = gpu
            .capture(|| block.forward(&gpu, &x, tokens, &mut work, &mut out))
            .unwrap();
        // What waits between kernels is all that little work has to wait for.
        assert!(
            tokens > 32 || graph.launches() <= 3,
            "{} launches",
            graph.launches()
        );
        for _ in 0..3 {
            // SAFETY: the graph holds on to all that it uses, and nothing else was queued meanwhile.
            unsafe { graph.launch() }.unwrap();
        }
        drop(graph);
        let replayed = gpu.download(&out).unwrap();
        assert!(
            direct
                .iter()
                .zip(&replayed)
                .all(|(a, b)| a.to_bits() == b.to_bits()),
            "{tokens} tokens: the graph gives something else"
        );
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let Some(gpu) = gpu() else { return };
    let layer = layer::<bf16>(3, SHAPES[0].0, 0, SOFTMAX);
    let block = layer.upload::<bf16>(&gpu);
    let mut work = Workspace::new(&gpu, layer.shape, 2).unwrap();
    let x = gpu.alloc(3 * layer.shape.hidden).unwrap();
    let mut out = gpu.alloc(3 * layer.shape.hidden).unwrap();
    let error = block
        .forward(&gpu, &x, 3, &mut work, &mut out)
        .unwrap_err()
        .to_string();
    assert!(error.contains("workspace is for 2 tokens"), "{error}");
    let error = block
        .forward(&gpu, &x, 2, &mut work, &mut out)
        .unwrap_err()
        .to_string();
    assert!(error.contains("[2, 72] was expected"), "{error}");
}
