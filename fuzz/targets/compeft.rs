//! `update.compeft`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_export::compeft::Update;

fuzz_target!(|file: &[u8]| {
    let Ok(update) = Update::decode(file) else {
        return;
    };
    let header = update.header();
    assert!(header.value() > 0.0 && (1..=header.n).contains(&header.kept));
    let written = update.encode().expect("read before");
    let again = Update::decode(&written).expect("written by us");
    assert_eq!(again, update);
});
