//! Stacks of parameters against what they are made of.

use super::super::device::{Element, Gpu};
use super::super::pack::{From, Job, Source, pack};
use super::gpu;
use super::reference::{Number, values};
use half::{bf16, f16};

/// Components of three slots, of which the second has none; `[slots + 1]`.
const STARTS: [u32; 4] = [0, 5, 5, 14];
const RANK: usize = 16;
const WIDTH: usize = 24;

/// Number `i` of component `component` of all.
fn number(component: usize, i: usize) -> f32 {
    component as f32 + i as f32 / 32.0
}

/// What a stack `[slots, RANK, WIDTH]` should be, where slot `s` has the components `of(s)`.
fn stack<T: Number>(slots: usize, of: impl Fn(usize) -> (usize, usize)) -> Vec<f64> {
    let mut all = Vec::new();
    for slot in 0..slots {
        let (first, end) = of(slot);
        for component in first..first + RANK {
            let there = component < end;
            all.extend((0..WIDTH).map(|i| match there {
                true => T::of(number(component, i)).value(),
                false => 0.0,
            }));
        }
    }
    all
}

fn transposed(stack: &[f64]) -> Vec<f64> {
    let slots = stack.chunks(RANK * WIDTH);
    let of_slot = |slot: &[f64]| {
        let at = |i: usize| slot[i % RANK * WIDTH + i / RANK];
        (0..slot.len()).map(at).collect::<Vec<_>>()
    };
    slots.flat_map(of_slot).collect()
}

fn check<T: Number + Element>(gpu: &Gpu) {
    let starts = gpu.upload(&STARTS).unwrap();
    let components: Vec<f32> = (0..14 * WIDTH)
        .map(|i| number(i / WIDTH, i % WIDTH))
        .collect();
    let wide = gpu.upload(&components).unwrap();
    let narrow: Vec<T> = components.iter().map(|&v| T::of(v)).collect();
    let narrow = gpu.upload(&narrow).unwrap();
    // Two slots of seven components each, these last.
    let columns: Vec<f32> = (0..14 * WIDTH)
        .map(|i| number(i / (7 * WIDTH) * 7 + i % 7, i / 7 % WIDTH))
        .collect();
    let columns = gpu.upload(&columns).unwrap();
    let ranked = Source::Ranked(gpu.address(&starts));
    let [wide, narrow] = [
        From::Wide(gpu.address(&wide)),
        From::Narrow(gpu.address(&narrow)),
    ];
    let columns = From::Wide(gpu.address(&columns));
    let of_starts = |slot: usize| (STARTS[slot] as usize, STARTS[slot + 1] as usize);
    let alike = |slot: usize| (7 * slot, 7 * slot + 7);
    let cases = [
        (wide, ranked, stack::<T>(3, of_starts)),
        (narrow, ranked, stack::<T>(3, of_starts)),
        (wide, Source::Rows(7), stack::<T>(2, alike)),
        (columns, Source::Columns(7), stack::<T>(2, alike)),
        (From::Zeros, Source::Rows(7), stack::<T>(2, |_| (0, 0))),
    ];
    type Way = fn(From, Source, super::super::device::Address, [usize; 3]) -> Job;
    let mut made = Vec::new();
    let mut jobs = Vec::new();
    for (from, source, expected) in &cases {
        let slots = expected.len() / (RANK * WIDTH);
        for (way, expected) in [
            (Job::rows as Way, expected.clone()),
            (Job::columns, transposed(expected)),
        ] {
            let mut to = gpu.alloc::<T>(expected.len()).unwrap();
            let at = gpu.address_mut(&mut to);
            jobs.push(way(*from, *source, at, [slots, RANK, WIDTH]));
            made.push((to, expected));
        }
    }
    // SAFETY: all have the sizes that the jobs say.
    unsafe { pack::<T>(gpu, &jobs) }.unwrap();
    for (i, (given, expected)) in made.iter().enumerate() {
        let given = values(&gpu.download(given).unwrap());
        assert!(given == *expected, "stack {i}: {given:?}, not {expected:?}");
    }
}

#[test]
fn quick_stacks_are_packed() {
    let Some(gpu) = gpu() else { return };
    check::<bf16>(&gpu);
    check::<f16>(&gpu);
}
