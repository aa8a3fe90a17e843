//! What recovery changed, packed and put back on a small compressed model with random weights.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Tensor};
use lightmoe_export::Error;
use lightmoe_export::compeft::{Delta, Update, unpack};
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{BankLayout, Checkpoint, ExpertPacking, Family, Format, Manifest, Scheme};
use std::fs;
use std::path::{Path, PathBuf};
use support::{config, factored, largest, layout, logits, of_layout, random, written};

/// A router that is f32 whatever the rest.
const ROUTER: &str = "model.layers.1.mlp.gate.weight";

struct Setup {
    root: tempfile::TempDir,
    start: Checkpoint,
    recovered: Checkpoint,
}

/// Whether recovery trains it.
fn is_trained(name: &str) -> bool {
    name == ROUTER || name.contains(".mlp.bases.") || name.contains(".mlp.experts.")
}

impl Setup {
    fn new(dtype: DType, packing: ExpertPacking) -> Self {
        let root = tempfile::tempdir().unwrap();
        let family = Family::Olmoe;
        let format = Format::new(dtype, Scheme { family, packing });
        let mut manifest = Manifest::of(&config(), &layout()).unwrap();
        manifest.types.insert(ROUTER.to_owned(), DType::F32);
        let start = written(&root.path().join("start"), &format, &manifest, random);
        let trained = |name: &str, shape: &[usize]| {
            let before = random(name, shape);
            let change = gaussian(&mut stream(3, name), 0.02, shape).unwrap();
            match is_trained(name) {
                true => (before + change).unwrap(),
                false => before,
            }
        };
        let recovered = written(&root.path().join("recovered"), &format, &manifest, trained);
        Self {
            root,
            start,
            recovered,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn pack(&self, density: f64, alpha: f64) -> Result<Update, Error> {
        Delta::between(&self.start, &self.recovered, &mut go_on)?.pack(density, alpha, &mut go_on)
    }

    fn unpack(&self, base: &Path, update: &Update) -> Result<Checkpoint, Error> {
        let out = self.at("out");
        unpack(Checkpoint::open(base)?, update, &out, &mut go_on)?;
        Ok(Checkpoint::open(&out)?)
    }
}

fn go_on(_: usize, _: usize) -> bool {
    true
}

fn values(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Vec<f32> {
    let tensor = checkpoint.tensor(name, shape).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn rounded(values: Vec<f32>, dtype: DType) -> Vec<f32> {
    let tensor = Tensor::new(values, &candle_core::Device::Cpu).unwrap();
    let tensor = tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32);
    tensor.unwrap().to_vec1().unwrap()
}

/// The method by the book, with everything in memory.
#[test]
fn unpacked_is_the_start_and_the_largest_signs() {
    let (density, alpha) = (0.2, 3.0);
    for (dtype, packing) in [
        (DType::F32, ExpertPacking::Separate),
        (DType::BF16, ExpertPacking::Fused),
        (DType::F16, ExpertPacking::Separate),
    ] {
        let setup = Setup::new(dtype, packing);
        let mut tensors = Manifest::of(&config(), &layout()).unwrap().tensors;
        tensors.sort();
        let tau: Vec<f32> = tensors
            .iter()
            .filter(|(name, _)| is_trained(name))
            .flat_map(|(name, shape)| {
                let before = values(&setup.start, name, shape);
                let after = values(&setup.recovered, name, shape);
                after.into_iter().zip(before).map(|(a, b)| a - b)
            })
            .collect();
        let n = tau.len() as f64;
        let mean = tau.iter().map(|&t| f64::from(t)).sum::<f64>() / n;
        let squares = tau
            .iter()
            .map(|&t| (f64::from(t) - mean).powi(2))
            .sum::<f64>();
        let size = (alpha * (squares / n).sqrt()) as f32;
        let mut order: Vec<usize> = (0..tau.len()).collect();
        order.sort_by(|&a, &b| tau[b].abs().total_cmp(&tau[a].abs()));
        let mut change = vec![0f32; tau.len()];
        for &i in &order[..(density * n).round() as usize] {
            change[i] = size.copysign(tau[i]);
        }

        let path = setup.at("update.compeft");
        setup.pack(density, alpha).unwrap().save(&path).unwrap();
        let update = Update::load(&path).unwrap();
        assert!((f64::from(update.header().value()) / f64::from(size) - 1.0).abs() < 1e-6);
        assert_eq!(update.header().n, tau.len() as u64);
        // Some 1.2 bits an entry in all.
        assert!(update.encode().unwrap().len() < tau.len() / 6 + 12_000);
        let unpacked = setup.unpack(setup.start.dir(), &update).unwrap();
        assert_eq!(unpacked.names(), setup.start.names());
        let mut change = change.into_iter();
        for (name, shape) in &tensors {
            let mut expected = values(&setup.start, name, shape);
            if is_trained(name) {
                let dtype = if name == ROUTER { DType::F32 } else { dtype };
                expected
                    .iter_mut()
                    .for_each(|v| *v += change.next().unwrap());
                expected = rounded(expected, dtype);
            }
            assert_eq!(values(&unpacked, name, shape), expected, "{name}");
        }
        assert_eq!(unpacked.bytes(), setup.start.bytes());
        for file in ["config.json", "tokenizer.json", "LICENSE", "README.md"] {
            let read = |checkpoint: &Checkpoint| fs::read(checkpoint.dir().join(file)).unwrap();
            assert_eq!(read(&unpacked), read(&setup.start), "{file}");
        }
    }
}

#[test]
fn a_preview_computes_what_the_unpacked_model_does() {
    let setup = Setup::new(DType::BF16, ExpertPacking::Separate);
    let delta = Delta::between(&setup.start, &setup.recovered, &mut go_on).unwrap();
    let update = delta.pack(0.5, 1.0, &mut go_on).unwrap();
    let preview = logits(&delta.preview(&update).unwrap());
    let unpacked = setup.unpack(setup.start.dir(), &update).unwrap();
    assert_eq!(largest(&(&preview - logits(&unpacked)).unwrap()), 0.0);
    // Nearer to the recovered model than the start is.
    let distance = |other: &Tensor| largest(&(other - logits(&setup.recovered)).unwrap());
    assert!(distance(&preview) < distance(&logits(&setup.start)));
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let setup = Setup::new(DType::F32, ExpertPacking::Separate);
    let between = |a, b| match Delta::between(a, b, &mut go_on) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("a difference"),
    };
    let message = between(&setup.start, &setup.start);
    assert!(message.contains("nothing to pack"), "{message}");
    let manifest = Manifest::of(&config(), &BankLayout::dense(&config())).unwrap();
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let other = written(&setup.at("other"), &format, &manifest, random);
    let message = between(&other, &setup.recovered);
    assert!(message.contains("the same tensors"), "{message}");
    for (density, alpha) in [
        (0.0, 1.0),
        (-0.5, 1.0),
        (1.5, 1.0),
        (f64::NAN, 1.0),
        (0.5, -1.0),
    ] {
        assert!(setup.pack(density, alpha).is_err(), "{density} {alpha}");
    }
    let stopped = Delta::between(&setup.start, &setup.recovered, &mut |done, _| done < 2);
    assert!(matches!(stopped, Err(Error::Interrupted)));
}

#[test]
fn an_update_goes_on_its_own_base_alone_and_leaves_no_half_model() {
    let setup = Setup::new(DType::F32, ExpertPacking::Separate);
    let update = setup.pack(0.1, 2.0).unwrap();
    let refused = |base: &Path, words: &str| {
        let message = setup.unpack(base, &update).err().unwrap().to_string();
        assert!(message.contains(words), "{message}");
        assert!(!setup.at("out").exists());
    };
    refused(setup.recovered.dir(), "made from");
    // One number of a tensor that the update does not touch.
    let file = setup.recovered.dir().join("model.safetensors");
    fs::copy(setup.start.dir().join("model.safetensors"), &file).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    refused(setup.recovered.dir(), "made from");
    let base = || Checkpoint::open(setup.start.dir()).unwrap();
    let stopped = unpack(base(), &update, &setup.at("out"), &mut |_, _| false);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(!setup.at("out").exists());
    for target in [setup.start.dir(), setup.recovered.dir()] {
        assert!(unpack(base(), &update, target, &mut go_on).is_err());
    }
    logits(&setup.start);
}

#[test]
fn a_damaged_file_is_named() {
    let setup = Setup::new(DType::F32, ExpertPacking::Separate);
    let path = setup.at("update.compeft");
    setup.pack(0.1, 2.0).unwrap().save(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len() - 100;
    bytes[end..].fill(0xff);
    fs::write(&path, bytes).unwrap();
    let message = Update::load(&path).unwrap_err().to_string();
    for words in ["update.compeft", "damaged"] {
        assert!(message.contains(words), "{message}");
    }
    let message = Update::load(&setup.at("missing")).unwrap_err().to_string();
    assert!(message.contains("missing"), "{message}");
}

/// Which rows are kept is no difference of numbers.
#[test]
fn factored_bases_are_not_packed() {
    let root = tempfile::tempdir().unwrap();
    let model = of_layout(&root.path().join("model"), DType::F32, &factored());
    let message = Delta::between(&model, &model, &mut go_on).err().unwrap();
    assert!(message.to_string().contains("compact"), "{message}");
}
