//! Exports of a small compressed model with random weights.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::DType;
use lightmoe_export::{Card, Error, ExportKind, ExportOptions, ExportReport, export};
use lightmoe_models::{BankLayout, Checkpoint, CheckpointWriter, Decoder, Family, Format, Scheme};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{compressed, config, factored, largest, logits, of_layout};

struct Setup {
    root: tempfile::TempDir,
    source: Checkpoint,
}

impl Setup {
    fn new(dtype: DType) -> Self {
        let root = tempfile::tempdir().unwrap();
        let source = compressed(&root.path().join("compressed"), dtype);
        Self { root, source }
    }

    fn target(&self) -> PathBuf {
        self.root.path().join("out")
    }

    fn export(&self, kind: ExportKind, dtype: Option<DType>) -> Result<ExportReport, Error> {
        let options = ExportOptions {
            dtype,
            ..ExportOptions::new(kind)
        };
        export(
            &self.source,
            &self.target(),
            &options,
            &card(),
            &mut |_, _| true,
        )
    }

    /// What stands in the root, the target not counted.
    fn rest(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "out")
            .collect();
        names.sort();
        names
    }
}

fn card() -> Card {
    Card {
        base_model: "allenai/OLMoE-1B-7B-0924".into(),
        method: "LightMoE, rank 3".into(),
        recipe_toml: "ratio = 0.3\nseed = 7".into(),
        table_markdown: "| task | before | after |\n|---|---|---|\n| math | 0.9 | 0.8 |".into(),
    }
}

#[test]
fn dense_gives_the_logits_of_the_compressed_model() {
    let setup = Setup::new(DType::F32);
    let report = setup.export(ExportKind::Dense, None).unwrap();
    let dense = Checkpoint::open(&setup.target()).unwrap();
    assert_eq!(dense.layout(), &BankLayout::dense(dense.config()));
    let (ours, theirs) = (logits(&setup.source), logits(&dense));
    let error = largest(&(&ours - &theirs).unwrap()) / largest(&ours);
    assert!(error < 1e-5, "{error}");
    // The names and the config of the original, no more and no less.
    let original = Decoder::random(&config(), 1).unwrap().tensors().unwrap();
    let mut names: Vec<String> = original.into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(dense.names(), names);
    let mut expected = config().raw;
    expected["torch_dtype"] = "float32".into();
    assert_eq!(dense.config().raw, expected);
    assert_eq!(report.parameters, config().parameters().total());
    let file = std::fs::read(setup.target().join("model.safetensors")).unwrap();
    let head = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
    assert_eq!(report.bytes, head + 4 * report.parameters);
    assert_eq!(
        (dense.bytes(), file.len() as u64),
        (report.bytes, report.bytes)
    );
}

/// Factors and rows multiply out; as they are, places of rows stay whole numbers in any element type.
#[test]
fn factored_bases_are_exported_either_way() {
    for dtype in [DType::F32, DType::BF16] {
        let root = tempfile::tempdir().unwrap();
        let source = of_layout(&root.path().join("compressed"), dtype, &factored());
        let setup = Setup { root, source };
        for (kind, to) in [
            (ExportKind::Dense, Some(DType::F32)),
            (ExportKind::Compact, None),
            (ExportKind::Compact, Some(DType::F32)),
        ] {
            setup.export(kind, to).unwrap();
            let made = Checkpoint::open(&setup.target()).unwrap();
            made.check().unwrap();
            let (ours, theirs) = (logits(&setup.source), logits(&made));
            let error = largest(&(&ours - &theirs).unwrap()) / largest(&ours);
            assert!(error < 1e-5, "{kind:?} to {to:?}: {error}");
        }
    }
}

#[test]
fn the_element_type_is_kept_or_chosen() {
    let setup = Setup::new(DType::BF16);
    setup.export(ExportKind::Dense, None).unwrap();
    let dense = Checkpoint::open(&setup.target()).unwrap();
    assert_eq!(dense.dtype(), DType::BF16);
    assert_eq!(dense.config().raw["torch_dtype"], "bfloat16");
    // In f32 nothing is rounded that the compressed model does not round.
    let report = setup.export(ExportKind::Dense, Some(DType::F32)).unwrap();
    let dense = Checkpoint::open(&setup.target()).unwrap();
    assert_eq!(dense.dtype(), DType::F32);
    assert_eq!(report.bytes, dense.bytes());
    let (ours, theirs) = (logits(&setup.source), logits(&dense));
    let error = largest(&(&ours - &theirs).unwrap()) / largest(&ours);
    assert!(error < 1e-5, "{error}");
}

#[test]
fn compact_is_the_checkpoint_itself() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let setup = Setup::new(dtype);
        let report = setup.export(ExportKind::Compact, None).unwrap();
        let compact = Checkpoint::open(&setup.target()).unwrap();
        assert_eq!(compact.names(), setup.source.names());
        assert_eq!(compact.layout(), setup.source.layout());
        assert_eq!(compact.bytes(), setup.source.bytes());
        assert_eq!(report.bytes, compact.bytes());
        assert_eq!(
            largest(&(logits(&setup.source) - logits(&compact)).unwrap()),
            0.0
        );
        assert!(report.parameters < config().parameters().total());
        let says = |engine: &str| {
            let found = report.loads_in.iter().find(|(name, _)| name == engine);
            found.unwrap().1.clone()
        };
        assert!(says("lightmoe").starts_with("yes"));
        assert!(says("transformers").starts_with("no"));
    }
}

#[test]
fn an_original_model_loads_everywhere_in_either_kind() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("original");
    let model = Decoder::random(&config(), 1).unwrap();
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let (config, layout) = (config(), BankLayout::dense(&config()));
    let writer = CheckpointWriter::for_model(&dir, &format, &config, &layout).unwrap();
    model.write(&writer).unwrap();
    writer.finish(&config.raw).unwrap();
    let source = Checkpoint::open(&dir).unwrap();
    for kind in ExportKind::ALL {
        let target = root.path().join(kind.name());
        let options = ExportOptions::new(kind);
        let report = export(&source, &target, &options, &card(), &mut |_, _| true).unwrap();
        assert!(
            report
                .loads_in
                .iter()
                .all(|(_, says)| !says.starts_with("no"))
        );
        let card = fs::read_to_string(target.join("README.md")).unwrap();
        assert!(card.contains("No expert of this model is compressed"));
        let copy = Checkpoint::open(&target).unwrap();
        assert_eq!(largest(&(logits(&source) - logits(&copy)).unwrap()), 0.0);
    }
}

#[test]
fn side_files_and_card_are_there() {
    let setup = Setup::new(DType::BF16);
    for kind in ExportKind::ALL {
        let report = setup.export(kind, None).unwrap();
        for name in ["tokenizer.json", "generation_config.json", "LICENSE"] {
            let read = |dir: &Path| fs::read(dir.join(name)).unwrap();
            assert_eq!(read(&setup.target()), read(setup.source.dir()));
        }
        let text = fs::read_to_string(setup.target().join("README.md")).unwrap();
        let (front, body) = text
            .strip_prefix("---\n")
            .and_then(|t| t.split_once("\n---\n"))
            .unwrap();
        assert!(front.starts_with("license: apache-2.0\nbase_model: allenai/OLMoE-1B-7B-0924\n"));
        for part in [
            format!("OLMoE-1B-7B-0924, lightmoe {kind} export"),
            "LightMoE, rank 3".into(),
            "```toml\nratio = 0.3\nseed = 7\n```".into(),
            "| math | 0.9 | 0.8 |".into(),
        ] {
            assert!(body.contains(&part), "{part}\n{body}");
        }
        for (engine, statement) in &report.loads_in {
            assert!(body.contains(&format!("| {engine} | {statement} |")));
        }
        assert_eq!(body.contains("saves no memory"), kind == ExportKind::Dense);
        assert!(!text.contains("The original"));
    }
    assert_eq!(setup.rest(), ["compressed"]);
}

#[test]
fn a_target_that_would_be_lost_is_refused() {
    let setup = Setup::new(DType::F32);
    let target = setup.target();
    let refused = |what: &str| {
        let message = setup
            .export(ExportKind::Dense, None)
            .unwrap_err()
            .to_string();
        assert!(message.contains(what), "{message}");
    };
    fs::write(&target, "a file").unwrap();
    refused("is no folder");
    fs::remove_file(&target).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("notes.txt"), "mine").unwrap();
    refused("not empty");
    // Another model is no earlier export either.
    fs::write(target.join("config.json"), "{}").unwrap();
    fs::write(target.join("README.md"), "# Another\n").unwrap();
    refused("not empty");
    assert_eq!(
        fs::read_to_string(target.join("notes.txt")).unwrap(),
        "mine"
    );
    // An empty folder and an earlier export are replaced.
    fs::remove_dir_all(&target).unwrap();
    fs::create_dir(&target).unwrap();
    setup.export(ExportKind::Dense, None).unwrap();
    fs::write(target.join("stale.txt"), "old").unwrap();
    setup.export(ExportKind::Compact, None).unwrap();
    assert!(!target.join("stale.txt").exists());
    let config = fs::read_to_string(target.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert!(config.get("lightmoe").is_some());
    assert_eq!(setup.rest(), ["compressed"]);
}

#[test]
fn the_source_is_never_the_target() {
    let setup = Setup::new(DType::F32);
    let options = ExportOptions::new(ExportKind::Compact);
    for target in [setup.source.dir(), setup.root.path()] {
        let error = export(&setup.source, target, &options, &card(), &mut |_, _| true);
        let message = error.unwrap_err().to_string();
        assert!(message.contains("holds the checkpoint"), "{message}");
    }
    assert_eq!(setup.rest(), ["compressed"]);
    logits(&setup.source);
}

#[test]
fn an_error_or_a_stop_leaves_everything_as_it_was() {
    let setup = Setup::new(DType::F32);
    setup.export(ExportKind::Dense, None).unwrap();
    let before = fs::read(setup.target().join("config.json")).unwrap();
    let options = ExportOptions::new(ExportKind::Compact);
    let mut seen = Vec::new();
    let mut stop = |done: usize, all: usize| {
        seen.push((done, all));
        done < 2
    };
    let stopped = export(&setup.source, &setup.target(), &options, &card(), &mut stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(seen, [(0, 3), (1, 3), (2, 3)]);
    assert_eq!(setup.rest(), ["compressed"]);
    // Damage in the last layer shows only when the first ones are written.
    let file = setup.source.dir().join("model.safetensors");
    let broken = setup.root.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(
        setup.source.dir().join("config.json"),
        broken.join("config.json"),
    )
    .unwrap();
    let tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
    let kept = tensors
        .into_iter()
        .filter(|(name, _)| name != "model.layers.2.mlp.experts.5.down_proj.weight")
        .collect();
    candle_core::safetensors::save(&kept, broken.join("model.safetensors")).unwrap();
    let source = Checkpoint::open(&broken).unwrap();
    let failed = export(&source, &setup.target(), &options, &card(), &mut |_, _| {
        true
    });
    let message = failed.unwrap_err().to_string();
    assert!(message.contains("experts.5.down_proj"), "{message}");
    assert_eq!(setup.rest(), ["broken", "compressed"]);
    let after = fs::read(setup.target().join("config.json")).unwrap();
    assert_eq!(after, before);
    logits(&Checkpoint::open(&setup.target()).unwrap());
}
