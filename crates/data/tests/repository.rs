//! Data as the Hub's repositories have them: Parquet, files in parts, rows with other fields than the
//! originals.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_data::harness::repository::Repository;
use lightmoe_data::harness::{Catalogue, Item, PromptOptions, TaskConfig, build_prompts};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Takes its rows from a repository alone.
const OWN: &str = "task: own\ndataset_path: org/own\noutput_type: generate_until\ntest_split: test\n\
                   doc_to_text: '{{text}}'\ndoc_to_target: '{{number}}'\n";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parquet")
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn own_task(&self) -> TaskConfig {
        let path = self.path().join("own.yaml");
        fs::write(&path, OWN).unwrap();
        task(path.to_str().unwrap())
    }
}

fn task(name: &str) -> TaskConfig {
    let catalogue = Catalogue::built_in().unwrap();
    let selected = catalogue.select(&[name.to_owned()]).unwrap();
    selected[0].tasks()[0].clone()
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

/// The items of a task in a folder of the user's.
fn of_folder(task: &TaskConfig, folder: &Path) -> Result<Vec<Item>, String> {
    let prompts = build_prompts(task, &[folder.to_owned()], &PromptOptions::default());
    Ok(prompts.map_err(|e| e.to_string())?.items)
}

/// The items of a task in a repository.
fn of_repository(task: &TaskConfig, folder: &Path) -> Result<Vec<Item>, String> {
    let repository = Repository {
        folder: folder.to_owned(),
        name: "org/own".into(),
    };
    let options = PromptOptions {
        repository: Some(&repository),
        ..PromptOptions::default()
    };
    let prompts = build_prompts(task, &[], &options).map_err(|e| e.to_string())?;
    Ok(prompts.items)
}

#[test]
fn every_type_is_read_as_it_was_written() {
    let rows: Vec<Value> = serde_json::from_slice(&fixture("types.json")).unwrap();
    let folder = Folder::new(&[("test.parquet", &fixture("types.parquet"))]);
    let items = of_folder(&folder.own_task(), folder.path()).unwrap();
    let read: Vec<Value> = items
        .iter()
        .map(|item| Value::Object(item.doc.fields.clone()))
        .collect();
    assert_eq!(read, rows);
    assert_eq!(items[3].doc.line, 4);
}

#[test]
fn rows_of_a_repository_make_the_documents_of_the_original_files() {
    let same = |name: &str, original: (&str, &str), part: (&str, &str)| {
        let original = Folder::new(&[(original.0, original.1.as_bytes())]);
        let repository = Folder::new(&[(part.0, part.1.as_bytes())]);
        let task = task(name);
        let docs = |items: Vec<Item>| -> Vec<_> {
            let parts = |item: Item| (item.doc.fields, item.requests, item.target, item.right);
            items.into_iter().map(parts).collect()
        };
        let wanted = docs(of_folder(&task, original.path()).unwrap());
        assert_eq!(
            docs(of_repository(&task, repository.path()).unwrap()),
            wanted
        );
    };
    let question =
        r#"{"stem": "Q?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}"#;
    let row = format!(r#"{{"id": "1", "question": {question}, "answerKey": "B"}}"#);
    let choices = r#"{"text": ["x", "y"], "label": ["A", "B"]}"#;
    let part = |field: &str| {
        format!(r#"{{"id": "1", "{field}": "Q?", "choices": {choices}, "answerKey": "B"}}"#)
    };
    let arc = part("question");
    same(
        "arc_easy",
        ("ARC-Easy-Test.jsonl", &row),
        ("ARC-Easy/test.jsonl", &arc),
    );
    let book = part("question_stem");
    same(
        "openbookqa",
        ("test.jsonl", &row),
        ("main/test.json", &book),
    );
    let mmlu =
        r#"{"question": "Q?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}"#;
    let anatomy = ("test/anatomy_test.csv", "Q?,a,b,c,d,C\n");
    same("mmlu_anatomy", anatomy, ("anatomy/test.jsonl", mmlu));
    let tsv = "index\tsentence1\tsentence2\tlabel\n7\tS.\tT.\tnot_entailment\n";
    let rte = r#"{"sentence1": "S.", "sentence2": "T.", "label": 1, "idx": 7}"#;
    same("rte", ("dev.tsv", tsv), ("rte/validation.jsonl", rte));
    let boolq = r#"{"question": "q", "passage": "p", "idx": 0, "label": 1}"#;
    same(
        "boolq",
        (
            "dev.jsonl",
            r#"{"question": "q", "passage": "p", "answer": true}"#,
        ),
        ("boolq/validation.jsonl", boolq),
    );
}

#[test]
fn parts_of_a_split_are_read_in_their_order() {
    let items = of_repository(&task("arc_easy"), &fixtures()).unwrap();
    assert_eq!(items[1].choices, ["iron", "water", "salt", "wood"]);
    assert_eq!((items.len(), items[1].right.as_slice()), (2, &[1][..]));
    let mut sums = task("gsm8k");
    (sums.test_split, sums.num_fewshot) = (Some("train".into()), Some(0));
    let items = of_repository(&sums, &fixtures()).unwrap();
    assert_eq!(items.len(), 6);
    for (n, item) in (2..).zip(&items) {
        assert_eq!(
            item.doc.fields["question"],
            format!("What is {n} plus {n}?")
        );
    }
    assert!(
        items[4]
            .doc
            .path
            .ends_with("main/train-00001-of-00002.parquet")
    );
    assert_eq!(items[4].doc.line, 1);
    // Parquet in the user's folder, too, and its own form comes first.
    let here = of_folder(&sums, &fixtures()).unwrap();
    assert_eq!(here.len(), 6);
    let row = br#"{"question": "q", "answer": "a"}"#;
    let both = Folder::new(&[
        ("train.jsonl", row),
        (
            "main/train.parquet",
            &fixture("main/train-00001-of-00002.parquet"),
        ),
    ]);
    assert_eq!(of_folder(&sums, both.path()).unwrap().len(), 1);
    fs::remove_file(both.path().join("train.jsonl")).unwrap();
    assert_eq!(of_folder(&sums, both.path()).unwrap().len(), 2);
}

#[test]
fn the_readme_of_a_repository_names_its_files() {
    let readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: x/*\n---\n";
    let row = br#"{"text": "t", "number": 1}"#;
    let folder = Folder::new(&[
        ("README.md", readme.as_bytes()),
        ("x/a.jsonl", row),
        ("x/b.csv", b"text,number\nu,2\n"),
        ("test.jsonl", b"not read"),
    ]);
    let items = of_repository(&folder.own_task(), folder.path()).unwrap();
    let texts: Vec<&Value> = items.iter().map(|item| &item.doc.fields["text"]).collect();
    assert_eq!(texts, ["t", "u"]);
}

#[test]
fn damaged_files_are_named_with_their_column() {
    let whole = fixture("types.parquet");
    let wrong = |bytes: &[u8], said: &[&str]| {
        let folder = Folder::new(&[("test.parquet", bytes)]);
        let error = of_folder(&folder.own_task(), folder.path()).unwrap_err();
        for part in said.iter().chain(&["test.parquet"]) {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    wrong(b"", &["no Parquet file"]);
    wrong(b"{\"text\": \"t\"}", &["no Parquet file"]);
    wrong(&whole[..whole.len() / 2], &["no Parquet file"]);
    wrong(
        &fixture("packed.parquet"),
        &["column `answer`", "snappy or zstd"],
    );
    // The rows lie before the footer; a column in the middle is overwritten.
    let mut broken = whole.clone();
    let middle = broken.len() / 4;
    broken[middle..middle + 200].fill(0xab);
    wrong(&broken, &["column `"]);
    let folder = Folder::new(&[("test.parquet", &fixture("main/test-00000-of-00001.parquet"))]);
    let error = of_folder(&folder.own_task(), folder.path()).unwrap_err();
    assert!(
        error.contains("row 1") && error.contains("`text`"),
        "{error}"
    );
}

#[test]
fn what_is_not_there_is_said_with_every_place() {
    let folder = Folder::new(&[]);
    let task = folder.own_task();
    let error = of_repository(&task, folder.path()).unwrap_err();
    let cache = folder.path().display().to_string();
    for part in ["`test`", "`org/own`", &cache, "--data", "--download"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = of_folder(&task, folder.path()).unwrap_err();
    for part in [cache.as_str(), "test-00000-of-00001.parquet"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("--download"), "{error}");
    let part = fixture("main/train-00000-of-00002.parquet");
    let folder = Folder::new(&[("data/test-00000-of-00002.parquet", &part)]);
    let error = of_repository(&task, folder.path()).unwrap_err();
    for said in ["test-00000-of-00002.parquet", "1 of the 2 files"] {
        assert!(error.contains(said), "{said}: {error}");
    }
    let folder = Folder::new(&[("test/rows.parquet", b"x"), ("other.txt", b"x")]);
    assert!(
        of_repository(&task, folder.path())
            .unwrap_err()
            .contains("no Parquet")
    );
}
