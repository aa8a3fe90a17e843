//! Every CUDA kernel compiles for Ampere and for Hopper, without spilling registers.
//!
//! Needs NVRTC and no GPU; `cargo xtask test` brings it.

#![cfg(feature = "cuda")]

use lightmoe_kernels::cuda::{ElementKind, SOURCES, compile, compiler_present};
use rayon::prelude::*;

/// What the compiler says of every kernel that keeps to its registers.
const NO_SPILLS: &str = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";

/// Set where a missing compiler must not go unseen.
const REQUIRED: &str = "LIGHTMOE_NVRTC";

fn skip() -> bool {
    let missing = !compiler_present();
    assert!(
        !missing || std::env::var_os(REQUIRED).is_none(),
        "NVRTC was brought, but cannot be loaded"
    );
    if missing {
        eprintln!("SKIPPED: no NVRTC, so no CUDA kernel was compiled");
    }
    missing
}

#[test]
fn every_kernel_compiles_without_spills() {
    if skip() {
        return;
    }
    let elements = [ElementKind::Bf16, ElementKind::F16];
    let kinds = elements
        .into_iter()
        .flat_map(|e| [(e, "sm_80"), (e, "sm_90a")]);
    let all: Vec<_> = kinds
        .flat_map(|(element, machine)| SOURCES.map(|source| (source, element, machine)))
        .filter(|(source, _, machine)| *machine == "sm_90a" || !source.hopper)
        .collect();
    all.par_iter().for_each(|(source, element, machine)| {
        let binary = compile(source, *element, machine).unwrap();
        let what = format!("{} {element:?} {machine}", source.name);
        assert!(binary.ptx.contains(".visible .entry"), "{what}: no kernels");
        assert_eq!(&binary.image[..4], b"\x7fELF", "{what}");
        let lines: Vec<&str> = binary
            .log
            .lines()
            .filter(|line| line.contains("spill"))
            .collect();
        assert!(
            !lines.is_empty(),
            "{what}: nothing about spills in\n{}",
            binary.log
        );
        for line in lines {
            assert!(line.contains(NO_SPILLS), "{what}: {line}\n{}", binary.log);
        }
    });
}

#[test]
fn a_kernel_that_does_not_compile_is_named() {
    if skip() {
        return;
    }
    let error = compile(&SOURCES[0], ElementKind::Bf16, "sm_1")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`router`") && error.contains("sm_1"),
        "{error}"
    );
}
