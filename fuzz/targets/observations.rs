//! `observations.safetensors`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_compress::observations::Observations;

fuzz_target!(|file: &[u8]| {
    let Ok(observations) = Observations::decode(file) else {
        return;
    };
    for layer in &observations.layers {
        let shares = layer.importance();
        assert!(shares.iter().all(|share| (0.0..=1.0).contains(share)));
    }
    observations.router_norms();
    let written = observations.encode().expect("read before");
    let again = Observations::decode(&written).expect("written by us");
    assert_eq!(again, observations);
});
