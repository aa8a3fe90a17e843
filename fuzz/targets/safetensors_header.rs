//! The header of a safetensors file, as a checkpoint's files and the Hub's remote files are opened.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_models::{count_numbers, header_length, parse_header};
use safetensors::tensor::Metadata;

fuzz_target!(|file: &[u8]| {
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
        return;
    };
    let size = file.len() as u64;
    let Ok(length) = header_length(*prefix, size) else {
        return;
    };
    let (header, tensors) = rest.split_at(usize::try_from(length).expect("below the file's size"));
    if parse_header(header, tensors.len() as u64).is_ok() {
        check(header, tensors.len() as u64);
    }
    // A sparse file may be of any size, so the header may describe more than the input can hold.
    let described = serde_json::from_slice::<Metadata>(header).map(|m| m.data_len() as u64);
    if let Ok(data) = described
        && i64::try_from(data).is_ok()
    {
        check(header, data);
    }
});

/// What a checkpoint makes of the header of a file with `data` bytes of tensors.
fn check(header: &[u8], data: u64) {
    let metadata = parse_header(header, data).expect("the length fits");
    count_numbers(&metadata);
    for name in metadata.offset_keys() {
        let info = metadata.info(&name).expect("listed");
        let (start, end) = info.data_offsets;
        assert!(start <= end && end as u64 <= data, "{name} lies outside");
        let numbers: usize = info.shape.iter().product();
        let bits = numbers.checked_mul(info.dtype.bitsize());
        assert_eq!(bits, (end - start).checked_mul(8), "{name}");
    }
}
