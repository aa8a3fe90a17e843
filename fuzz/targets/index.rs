//! `model.safetensors.index.json`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_models::parse_index;
use std::path::Path;

fuzz_target!(|text: &str| {
    let Ok(index) = parse_index(text) else {
        return;
    };
    assert!(!index.is_empty());
    for shard in index.values() {
        // No shard leads out of the folder.
        let path = Path::new("model").join(shard);
        assert_eq!(path.parent(), Some(Path::new("model")), "{shard}");
        assert!(path.file_name().is_some_and(|name| name == shard.as_str()));
    }
});
