use super::golomb::{Signs, SignsWriter, rice_parameter};
use super::ternary::{Pass, Statistics, signs};
use super::{Header, SCHEMA_VERSION, Update};
use crate::Result;
use proptest::collection::vec;
use proptest::prelude::*;

/// Entries of a vector of -1, 0 and 1.
fn entries(vector: &[i8]) -> Vec<(u64, bool)> {
    let entries = vector.iter().enumerate().filter(|(_, v)| **v != 0);
    entries.map(|(i, v)| (i as u64, *v < 0)).collect()
}

fn encode(entries: &[(u64, bool)], rice: u32) -> Vec<u8> {
    let mut writer = SignsWriter::new(rice);
    entries
        .iter()
        .for_each(|&(i, negative)| writer.push(i, negative));
    writer.finish()
}

/// The code as it is defined, as a text of bits.
fn reference(entries: &[(u64, bool)], rice: u32) -> Vec<u8> {
    let (mut bits, mut previous) = (String::new(), -1);
    for &(index, negative) in entries {
        let gap = (index as i64 - previous - 1) as u64;
        bits += &"1".repeat((gap >> rice) as usize);
        bits.push('0');
        if rice > 0 {
            bits += &format!("{:0width$b}", gap % (1 << rice), width = rice as usize);
        }
        bits.push(if negative { '1' } else { '0' });
        previous = index as i64;
    }
    let bytes = bits.as_bytes().chunks(8);
    let byte = |bits: &[u8]| format!("{:0<8}", std::str::from_utf8(bits).unwrap());
    bytes
        .map(|bits| u8::from_str_radix(&byte(bits), 2).unwrap())
        .collect()
}

/// A pass through a vector in pieces of some size.
fn pieces(tau: &[f32], size: usize) -> Box<Pass<'_>> {
    Box::new(move |f| {
        tau.chunks(size).for_each(f);
        Ok(())
    })
}

fn ternary(tau: &[f32], density: f64, size: usize) -> Result<(Statistics, Signs)> {
    let mut pass = pieces(tau, size);
    let statistics = Statistics::of(&mut *pass)?;
    let signs = signs(&mut *pass, &statistics, density)?;
    Ok((statistics, signs))
}

fn all(signs: &Signs) -> Vec<(u64, bool)> {
    signs.range(0, signs.n()).collect()
}

#[test]
fn a_code_worked_by_hand() {
    // Gaps 0, 2, 0 and 6 at b = 1: `0 0 +`, `10 0 -`, `0 0 +`, `1110 0 -`.
    let vector = [1, 0, 0, -1, 1, 0, 0, 0, 0, 0, 0, -1];
    let entries = entries(&vector);
    assert_eq!(rice_parameter(4, 12), 1);
    assert_eq!(encode(&entries, 1), [0b0001_0010, 0b0011_1001]);
    // At b = 0 a gap is its ones and a zero: `0 +`, `110 -`, `0 +`, `1111110 -`.
    assert_eq!(encode(&entries, 0), [0b0011_0100, 0b1111_1101]);
}

/// `fixtures/methods/make_methods.py` made it with NumPy.
#[test]
fn signs_size_and_stream_are_those_of_the_reference() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../fixtures/methods/compeft.safetensors"
    );
    let file = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
    let floats = |name: &str| file[name].to_vec1::<f32>().unwrap();
    let (tau, values) = (floats("tau"), floats("values"));
    let (density, alpha) = (
        f64::from(floats("density")[0]),
        f64::from(floats("alpha")[0]),
    );
    let (statistics, signs) = ternary(&tau, density, 777).unwrap();
    let size = (alpha * statistics.deviation()) as f32;
    let mut ours = vec![0f32; tau.len()];
    for (index, negative) in all(&signs) {
        ours[index as usize] = if negative { -size } else { size };
    }
    assert_eq!(ours, values);
    let rice = file["rice_parameter"].to_vec1::<i64>().unwrap();
    assert_eq!(i64::from(signs.rice()), rice[0]);
    assert_eq!(signs.stream(), file["stream"].to_vec1::<u8>().unwrap());
}

#[test]
fn the_parameter_is_that_of_the_formula() {
    let of = |kept| rice_parameter(kept, 100);
    assert_eq!([5, 10, 20, 30, 50, 100].map(of), [4, 3, 2, 1, 0, 0]);
    assert_eq!(rice_parameter(1, 1 << 30), 29);
}

#[test]
fn the_largest_are_kept_and_of_equal_ones_the_first() {
    let tau = [0.5, -2.0, 0.0, 2.0, -0.5, 0.5, -2.0, 1e-30];
    let kept = |density| {
        let (_, signs) = ternary(&tau, density, 3).unwrap();
        all(&signs)
    };
    assert_eq!(kept(0.25), [(1, true), (3, false)]);
    assert_eq!(kept(0.5), [(0, false), (1, true), (3, false), (6, true)]);
    // Half of an entry goes to the even count, and a zero has no sign to keep.
    assert_eq!(kept(0.3125), kept(0.25));
    assert_eq!(kept(1.0).len(), 7);
    let message = ternary(&tau, 0.01, 3).unwrap_err().to_string();
    assert!(message.contains("larger"), "{message}");
}

proptest! {
    #[test]
    fn any_sparse_signs_come_back(
        vector in vec(prop_oneof![5 => Just(0i8), 1 => Just(1i8), 1 => Just(-1i8)], 1..300),
        rice in 0u32..7,
        ends in (0u64..300, 0u64..300),
    ) {
        let (entries, n) = (entries(&vector), vector.len() as u64);
        let stream = encode(&entries, rice);
        prop_assert_eq!(&stream, &reference(&entries, rice));
        let signs = Signs::decode(n, entries.len() as u64, rice, stream).unwrap();
        prop_assert_eq!(all(&signs), entries.clone());
        let (start, end) = (ends.0.min(ends.1), ends.0.max(ends.1));
        let inside = |(index, _): &(u64, bool)| (start..end).contains(index);
        let expected: Vec<_> = entries.into_iter().filter(inside).collect();
        prop_assert_eq!(signs.range(start, end).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_damaged_stream_is_refused_or_read_within_its_bounds(
        stream in vec(any::<u8>(), 0..64),
        (n, kept, rice) in (1u64..200, 1u64..40, 0u32..70),
    ) {
        if let Ok(signs) = Signs::decode(n, kept, rice, stream.clone()) {
            let read = all(&signs);
            prop_assert_eq!(read.len() as u64, kept);
            prop_assert!(read.is_sorted_by(|a, b| a.0 < b.0) && read.iter().all(|e| e.0 < n));
            prop_assert_eq!(encode(&read, rice), stream);
        }
    }

    #[test]
    fn selection_and_deviation_are_those_of_the_whole_vector(
        tau in vec(prop_oneof![Just(0.25f32), Just(-0.25), Just(0.0), -1f32..1.0, -1e-3f32..1e-3], 1..200),
        density in 0.01f64..1.0,
        size in 1usize..80,
    ) {
        let n = tau.len() as f64;
        let mut order: Vec<usize> = (0..tau.len()).filter(|&i| tau[i] != 0.0).collect();
        order.sort_by(|&a, &b| tau[b].abs().total_cmp(&tau[a].abs()));
        order.truncate((density * n).round_ties_even() as usize);
        order.sort_unstable();
        let Ok((statistics, signs)) = ternary(&tau, density, size) else {
            prop_assert!(order.is_empty());
            return Ok(());
        };
        let expected: Vec<_> = order.iter().map(|&i| (i as u64, tau[i] < 0.0)).collect();
        prop_assert_eq!(all(&signs), expected);
        let mean = tau.iter().map(|&t| f64::from(t)).sum::<f64>() / n;
        let squares = tau.iter().map(|&t| (f64::from(t) - mean).powi(2)).sum::<f64>();
        prop_assert!((statistics.deviation() - (squares / n).sqrt()).abs() < 1e-12);
    }
}

#[test]
fn a_range_far_behind_is_found() {
    let entries: Vec<(u64, bool)> = (0..30_000).map(|i| (3 * i + i % 3, i % 7 == 0)).collect();
    let stream = encode(&entries, 1);
    let signs = Signs::decode(100_000, 30_000, 1, stream).unwrap();
    for start in [0, 12_287, 12_288, 50_000, 89_999, 90_500] {
        let expected: Vec<_> = entries
            .iter()
            .filter(|(i, _)| (start..start + 500).contains(i))
            .copied()
            .collect();
        assert_eq!(
            signs.range(start, start + 500).collect::<Vec<_>>(),
            expected
        );
    }
}

/// Six numbers in two tensors, two of them kept.
fn update() -> Update {
    let header = Header {
        schema_version: SCHEMA_VERSION,
        fingerprint: "ab".repeat(32),
        density: 0.3,
        alpha: 2.0,
        sigma: 0.125,
        n: 6,
        kept: 2,
        rice_parameter: 1,
        tensors: vec![("a".into(), vec![2, 2]), ("b".into(), vec![2])],
    };
    let stream = encode(&[(1, true), (5, false)], 1);
    Update::new(header, Signs::decode(6, 2, 1, stream).unwrap()).unwrap()
}

#[test]
fn a_file_is_read_back_and_every_damage_refused() {
    let update = update();
    assert_eq!(update.header().value(), 0.25);
    let bytes = update.encode().unwrap();
    assert_eq!(Update::decode(&bytes).unwrap(), update);
    for end in 0..bytes.len() {
        assert!(Update::decode(&bytes[..end]).is_err(), "{end}");
    }
    let text = String::from_utf8(bytes.clone()).unwrap();
    for (from, to, words) in [
        (
            r#"\"schema_version\":1"#,
            r#"\"schema_version\":2"#,
            "version 2",
        ),
        (r#"\"density\":0.3"#, r#"\"density\":9.3"#, "density of 9.3"),
        (r#"\"alpha\":2.0"#, r#"\"alpha\":0.0"#, "above 0"),
        (r#"\"n\":6"#, r#"\"n\":7"#, "2 entries of 7"),
        (r#"\"kept\":2"#, r#"\"kept\":7"#, "7 entries of 6"),
        (r#"\"kept\":2"#, r#"\"kept\":1"#, "used"),
        (
            r#"\"rice_parameter\":1"#,
            r#"\"rice_parameter\":9"#,
            "entry 0",
        ),
        (r#"[\"b\",[2]]"#, r#"[\"a\",[2]]"#, "by name"),
        (r#"[2,2]"#, r#"[9,9]"#, "entries"),
        ("compeft", "compost", "--pack compeft"),
        (r#""stream""#, r#""scream""#, "stream"),
        (r#""U8""#, r#""I8""#, "u8"),
    ] {
        let damaged = text.replacen(from, to, 1);
        assert_ne!(damaged, text, "{from}");
        let message = Update::decode(damaged.as_bytes()).unwrap_err();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn another_alpha_changes_the_size_alone() {
    let update = update();
    let other = update.with_alpha(4.0).unwrap();
    assert_eq!(other.header().value(), 0.5);
    assert_eq!(other.with_alpha(2.0).unwrap(), update);
    for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
        assert!(update.with_alpha(alpha).is_err(), "{alpha}");
    }
}
