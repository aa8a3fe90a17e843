//! Every CUDA kernel compiles for Ampere and for Hopper, without spilling registers.
//!
//! Needs NVRTC and no GPU; `cargo xtask test` brings it.

#![cfg(feature = "cuda")]

use lightmoe_kernels::cuda::{ElementKind, SOURCES, compile, compiler_present};

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
    for source in SOURCES {
        for element in [ElementKind::Bf16, ElementKind::F16] {
            for machine in ["sm_80", "sm_90a"] {
                if source.hopper && machine == "sm_80" {
                    continue;
                }
                let binary = compile(&source, element, machine).unwrap();
                assert!(
                    binary.ptx.contains(".visible .entry"),
                    "{}: no kernels",
                    source.name
                );
                assert_eq!(&binary.image[..4], b"\x7fELF", "{}", source.name);
                let spills: Vec<&str> = binary
                    .log
                    .lines()
                    .filter(|line| line.contains("spill"))
                    .collect();
                assert!(
                    !spills.is_empty(),
                    "{}: the compiler does not tell of spills:\n{}",
                    source.name,
                    binary.log
                );
                for line in spills {
                    assert!(
                        line.contains(
                            "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
                        ),
                        "{} {element:?} {machine}: {line}\n{}",
                        source.name,
                        binary.log
                    );
                }
            }
        }
    }
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
