//! LightMoE with other parts than the paper's: what chooses experts, what their bases and adapters start
//! from.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Tensor};
use common::{options, random_checkpoint, small};
use lightmoe_compress::factor::DAMPING;
use lightmoe_compress::methods::{
    AdapterInit, BaseInit, MethodName, PlanOptions, Selection, Target, plan,
};
use lightmoe_compress::observations::{LayerObservations, Observations};
use lightmoe_compress::plan::{Plan, SlotForm};
use lightmoe_compress::{BuildInputs, ObserveOptions, Sensitivity, Statistics, build, observe};
use lightmoe_models::{Checkpoint, names};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const RANK: usize = 2;
const GROUPS: usize = 2;

struct Model {
    folder: TempDir,
    checkpoint: Checkpoint,
    seen: Observations,
}

impl Model {
    /// A random model and all that may be observed of it.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 5, &folder);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let sample = |_| (0..24).map(|_| rng.random_range(3..60)).collect();
        let samples: Vec<Vec<u32>> = (0..16).map(sample).collect();
        let observing = ObserveOptions {
            fingerprint: "parts",
            state: &folder.path().join("state"),
            answers: &[],
            statistics: Statistics {
                moments: true,
                damage: Some(Sensitivity::Fisher),
                ..Statistics::default()
            },
            successor: None,
            max_memory: 1 << 32,
        };
        let seen = observe(&checkpoint, &samples, &observing, &mut |_, _| true).unwrap();
        let path = folder.path().join("seen.safetensors");
        seen.save(&path).unwrap();
        let seen = Observations::load(&path).unwrap();
        Self {
            folder,
            checkpoint,
            seen,
        }
    }

    fn plan(&self, options: &PlanOptions) -> Plan {
        let (config, target) = (self.checkpoint.config(), Target::Ratio(0.2));
        options.check_method(MethodName::Lightmoe, config).unwrap();
        plan(config, &self.seen, target, MethodName::Lightmoe, options).unwrap()
    }

    fn build(&self, plan: &Plan) -> Checkpoint {
        let path = self.folder.path().join("built");
        let inputs = BuildInputs {
            checkpoint: &self.checkpoint,
            plan,
            observations: Some(&self.seen),
            seed: 0,
        };
        build(&inputs, &path, &mut |_, _| true).unwrap();
        Checkpoint::open(&path).unwrap()
    }

    /// The replaced experts, as layer, expert and group.
    fn replaced(plan: &Plan) -> Vec<(usize, usize, usize)> {
        let layers = plan.layers.iter();
        let slots =
            layers.flat_map(|layer| layer.slots.iter().map(move |slot| (layer.layer, slot)));
        let found = slots.filter_map(|(layer, slot)| {
            let group = slot.form.group()?;
            Some((layer, slot.expert, group))
        });
        found.collect()
    }

    /// A projection of an expert of the original, and the second moment of what it was given, as rows.
    fn expert(&self, layer: usize, expert: usize, projection: &str) -> (Matrix, Matrix) {
        let config = self.checkpoint.config();
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        let [input, hidden] = self
            .seen
            .moments()
            .unwrap()
            .layer(layer)
            .unwrap()
            .sums(config, expert)
            .unwrap();
        let (shape, gram) = match projection {
            "down_proj" => ([h, f], hidden),
            _ => ([f, h], input),
        };
        let name = names::expert(layer, expert, projection);
        let w = matrix(&self.checkpoint.tensor(&name, &shape).unwrap());
        (
            w,
            gram.chunks(shape[1])
                .map(|row| row.iter().map(|&v| f64::from(v)).collect())
                .collect(),
        )
    }
}

type Matrix = Vec<Vec<f64>>;

fn matrix(tensor: &Tensor) -> Matrix {
    tensor.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let entry = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, y)| x * y[j]).sum();
    let row = |row: &Vec<f64>| (0..b[0].len()).map(|j| entry(row, j)).collect();
    a.iter().map(row).collect()
}

fn difference(a: &Matrix, b: &Matrix) -> Matrix {
    let row = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(x, y)| x - y).collect();
    a.iter().zip(b).map(row).collect()
}

/// `tr(E·G·Eᵀ)`
fn loss(error: &Matrix, gram: &Matrix) -> f64 {
    let moved = product(error, gram);
    let rows = error.iter().zip(&moved);
    rows.map(|(e, m)| e.iter().zip(m).map(|(x, y)| x * y).sum::<f64>())
        .sum()
}

fn base(
    built: &Checkpoint,
    (layer, group): (usize, usize),
    projection: &str,
    w: &Matrix,
) -> Matrix {
    let name = names::base(layer, group, projection);
    matrix(&built.tensor(&name, &[w.len(), w[0].len()]).unwrap())
}

/// Whether the replaced experts are those of least value, but for the one that is kept where its group
/// would have no other.
fn chosen_by(
    plan: &Plan,
    seen: &Observations,
    value: impl Fn(&LayerObservations) -> Vec<f64>,
) -> bool {
    plan.layers.iter().zip(&seen.layers).all(|(layer, seen)| {
        let values = value(seen);
        let (kept, gone): (Vec<_>, Vec<_>) = layer
            .slots
            .iter()
            .partition(|slot| slot.form == SlotForm::Dense);
        let highest = gone.iter().map(|s| values[s.expert]).fold(0.0, f64::max);
        let lower = kept.iter().filter(|s| values[s.expert] < highest).count();
        lower <= GROUPS - layer.groups
    })
}

#[test]
fn experts_are_chosen_by_what_is_asked_for_and_weigh_by_the_base() {
    let model = Model::new();
    let gate = |seen: &LayerObservations| seen.importance();
    let reap = |seen: &LayerObservations| seen.outputs.as_ref().unwrap().gated.clone();
    let damage = |seen: &LayerObservations| {
        let damage = seen.damage.as_ref().unwrap();
        (0..8).map(|e| damage.of_ranks(e)[RANK]).collect()
    };
    let mass = |seen: &LayerObservations| seen.damage.as_ref().unwrap().mass.clone();
    let with = |select, base| PlanOptions {
        select,
        base,
        max_delta: 0.0,
        ..options(RANK, GROUPS)
    };
    let usual = model.plan(&with(Selection::Gate, BaseInit::GateWeighted));
    assert!(chosen_by(&usual, &model.seen, gate));
    assert!(
        usual
            .layers
            .iter()
            .flat_map(|l| &l.slots)
            .all(|s| s.weight.is_none())
    );
    let ours = model.plan(&with(Selection::Reap, BaseInit::FisherWeighted));
    assert!(chosen_by(&ours, &model.seen, reap));
    let ours = [
        ours,
        model.plan(&with(Selection::Damage, BaseInit::ReapWeighted)),
    ];
    assert!(chosen_by(&ours[1], &model.seen, damage));
    assert!(
        ours.iter()
            .any(|plan| Model::replaced(plan) != Model::replaced(&usual))
    );
    for (plan, by) in ours.iter().zip([&mass as &dyn Fn(&_) -> Vec<f64>, &reap]) {
        for (layer, seen) in plan.layers.iter().zip(&model.seen.layers) {
            let values = by(seen);
            let total: f64 = values.iter().sum();
            for slot in &layer.slots {
                assert!((slot.weight() - values[slot.expert] / total).abs() < 1e-12);
            }
        }
    }
    // What another selection ranks by does not weigh.
    let plan = model.plan(&with(Selection::Damage, BaseInit::GateWeighted));
    for (layer, seen) in plan.layers.iter().zip(&model.seen.layers) {
        let weights: Vec<f64> = layer.slots.iter().map(|slot| slot.weight()).collect();
        assert_eq!(weights, seen.importance());
    }
    for (select, base) in [
        (Selection::Reap, BaseInit::GateWeighted),
        (Selection::Gate, BaseInit::FisherWeighted),
    ] {
        let refused = with(select, base).check_method(MethodName::D2moe, model.checkpoint.config());
        assert!(refused.unwrap_err().to_string().contains("`select`"));
    }
}

#[test]
fn a_base_by_least_squares_solves_its_equations_and_loses_less_than_the_mean() {
    let model = Model::new();
    let with = |base| PlanOptions {
        base,
        ..options(RANK, GROUPS)
    };
    let plan = model.plan(&with(BaseInit::LeastSquares));
    let members = Model::replaced(&plan);
    let mean = model.build(&model.plan(&with(BaseInit::GateWeighted)));
    let bases: Vec<Matrix> = members
        .iter()
        .flat_map(|&(l, e, g)| {
            let mean = &mean;
            let model = &model;
            names::PROJECTIONS.map(move |p| base(mean, (l, g), p, &model.expert(l, e, p).0))
        })
        .collect();
    let built = model.build(&plan);
    let (mut ours, mut theirs) = (0.0, 0.0);
    for (number, &(l, e, g)) in members.iter().enumerate() {
        for (i, p) in names::PROJECTIONS.into_iter().enumerate() {
            let (w, gram) = model.expert(l, e, p);
            let (base, mean) = (base(&built, (l, g), p, &w), &bases[number * 3 + i]);
            ours += loss(&difference(&w, &base), &gram);
            theirs += loss(&difference(&w, mean), &gram);
            if members[..number].iter().any(|&(a, _, b)| (a, b) == (l, g)) {
                continue;
            }
            // Σ (B − W)·G + λ·(B − mean) = 0, once for each group.
            let of_group = members.iter().filter(|(a, _, b)| (*a, *b) == (l, g));
            let pairs: Vec<(Matrix, Matrix)> =
                of_group.map(|&(l, e, _)| model.expert(l, e, p)).collect();
            let n = gram.len();
            let trace: f64 = pairs
                .iter()
                .map(|(_, gram)| (0..n).map(|i| gram[i][i]).sum::<f64>())
                .sum();
            let lambda = DAMPING * trace / n as f64;
            let mut left = difference(&base, mean);
            left.iter_mut().flatten().for_each(|v| *v *= lambda);
            let mut size = 0.0f64;
            for (w, gram) in &pairs {
                let part = product(&difference(&base, w), gram);
                for (sum, v) in left.iter_mut().flatten().zip(part.iter().flatten()) {
                    *sum += v;
                    size = size.max(v.abs());
                }
            }
            let most = left
                .iter()
                .flatten()
                .fold(0.0f64, |most, v| most.max(v.abs()));
            assert!(
                most < 1e-4 * size,
                "layer {l}, group {g}, {p}: {most} of {size}"
            );
        }
    }
    assert!(ours < 0.95 * theirs, "{ours} against {theirs}");
}

#[test]
fn whitened_adapters_hold_what_the_base_lacks() {
    let model = Model::new();
    let with = |adapters| PlanOptions {
        adapters,
        ..options(RANK, GROUPS)
    };
    let lost = |adapters| -> f64 {
        let plan = model.plan(&with(adapters));
        let built = model.build(&plan);
        let members = Model::replaced(&plan);
        let errors = members
            .iter()
            .flat_map(|&(l, e, g)| names::PROJECTIONS.map(|p| (l, e, g, p)));
        errors
            .map(|(l, e, g, p)| {
                let (w, gram) = model.expert(l, e, p);
                let part = |side: &str, shape: [usize; 2]| {
                    let name = names::expert(l, e, &format!("{p}.{side}"));
                    matrix(&built.tensor(&name, &shape).unwrap())
                };
                let (a, b) = (
                    part("lora_A", [RANK, w[0].len()]),
                    part("lora_B", [w.len(), RANK]),
                );
                let base = base(&built, (l, g), p, &w);
                loss(&difference(&difference(&w, &base), &product(&b, &a)), &gram)
            })
            .sum()
    };
    let (fresh, whitened) = (lost(AdapterInit::Fresh), lost(AdapterInit::Whitened));
    let truncated = lost(AdapterInit::Truncated);
    assert!(
        whitened < truncated && truncated < fresh,
        "{whitened}, {truncated}, {fresh}"
    );
}
