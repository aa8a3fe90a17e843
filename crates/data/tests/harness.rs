//! Files of tasks and data: what is found in them, and what is said where they are wrong.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_data::harness::{
    Benchmark, Catalogue, PromptOptions, Request, TaskConfig, build_prompts,
};
use std::fs;
use std::path::{Path, PathBuf};

/// A task that is whole; tests change it.
const TASK: &str = "task: mine
data_files:
  format: jsonl
  splits: {test: rows.jsonl}
  source: Made by hand.
output_type: multiple_choice
test_split: test
doc_to_text: 'Q: {{q}}'
doc_to_target: right
doc_to_choice: options
";
const ROW: &str = r#"{"q": "Who?", "right": 1, "options": ["I", "you"]}"#;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for (name, text) in files {
            let path = folder.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn select(&self, name: &str) -> Result<Vec<Benchmark>, String> {
        let name = self.path(name).to_str().unwrap().to_owned();
        Catalogue::built_in()
            .unwrap()
            .select(&[name])
            .map_err(|e| e.to_string())
    }

    /// The first request of the first document of the task in `task.yaml`.
    fn requests(&self) -> Result<Vec<Request>, String> {
        let selected = self.select("task.yaml")?;
        let folders = [self.0.path().to_owned()];
        let prompts = build_prompts(selected[0].tasks()[0], &folders, &PromptOptions::default());
        Ok(prompts.map_err(|e| e.to_string())?.items.remove(0).requests)
    }
}

fn likelihood(context: &str, continuation: &str) -> Request {
    Request::Loglikelihood {
        context: context.into(),
        continuation: continuation.into(),
    }
}

#[test]
fn a_task_of_the_users_own_is_a_file() {
    let folder = Folder::new(&[("task.yaml", TASK), ("rows.jsonl", ROW)]);
    let want = [likelihood("Q: Who?", " I"), likelihood("Q: Who?", " you")];
    assert_eq!(folder.requests().unwrap(), want);
    // In a folder of the task's name, packed, and with a description.
    let described = format!("{TASK}description: 'About {{{{q}}}}: '\ntarget_delimiter: ''\n");
    let folder = Folder::new(&[("task.yaml", &described), ("mine/rows.jsonl", ROW)]);
    assert_eq!(
        folder.requests().unwrap()[0],
        likelihood("About Who?: Q: Who?", "I")
    );
}

#[test]
fn what_is_wrong_with_a_task_is_said_with_file_and_line() {
    let with = |line: &str| format!("{TASK}{line}\n");
    let without = |key: &str| {
        let lines = TASK.lines().filter(|line| !line.starts_with(key));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    for (text, said) in [
        (with("doc_to_txt: q"), vec!["line 11", "doc_to_txt"]),
        (with("num_fewshot: many"), vec!["line 11"]),
        (
            with("metric_list: [{metric: acc, weight: 2}]"),
            vec!["line 11", "weight"],
        ),
        (with("task: [unclosed"), vec!["line 1"]),
        (
            with("include: nowhere.yaml"),
            vec!["nowhere.yaml", "not beside it"],
        ),
        (with("include: task.yaml"), vec!["circle"]),
        (with("repeats: 3"), vec!["sampled"]),
        (
            with("generation_kwargs: {until: x, temperature: 0.5}"),
            vec!["do_sample"],
        ),
        (with("stride: 4"), vec!["stride"]),
        (
            with("generation_kwargs: {until: x, max_gen_toks: 0}"),
            vec!["max_gen_toks"],
        ),
        (without("doc_to_choice"), vec!["doc_to_choice"]),
        (without("test_split"), vec!["test_split"]),
        (without("task"), vec!["name the task"]),
        (TASK.replace("mine", "a/b"), vec!["`a/b`"]),
        (
            TASK.replace("multiple_choice", "guess"),
            vec!["line 6", "guess"],
        ),
    ] {
        let folder = Folder::new(&[("task.yaml", &text), ("rows.jsonl", ROW)]);
        let error = folder.requests().unwrap_err();
        for part in ["task.yaml"].into_iter().chain(said) {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}

#[test]
fn what_is_wrong_with_a_row_is_said_with_file_line_and_field() {
    for (row, said) in [
        ("{\"q\": 1", vec!["line 2", "no JSON object"]),
        (
            r#"{"right": 1, "options": ["I"]}"#,
            vec!["line 2", "no field `q`"],
        ),
        (
            r#"{"q": "a", "options": ["I"]}"#,
            vec!["line 2", "right choice is \"right\""],
        ),
        (
            r#"{"q": "a", "right": 1, "options": 5}"#,
            vec!["line 2", "`doc_to_choice`", "5"],
        ),
    ] {
        let rows = format!("{ROW}\n{row}\n");
        let error = Folder::new(&[("task.yaml", TASK), ("rows.jsonl", &rows)]).requests();
        let error = error.unwrap_err();
        for part in ["rows.jsonl"].into_iter().chain(said) {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    let made = format!("{TASK}process_docs: {{q: q.text, right: right, options: options}}\n");
    let error = Folder::new(&[("task.yaml", &made), ("rows.jsonl", ROW)]).requests();
    let error = error.unwrap_err();
    assert!(
        error.contains("line 1") && error.contains("field `q`"),
        "{error}"
    );
}

#[test]
fn tables_and_labels_have_their_lines_counted() {
    let csv = TASK.replace("format: jsonl", "format: csv\n  columns: [q, right]");
    let csv = csv
        .replace("rows.jsonl", "rows.csv")
        .replace("doc_to_choice: options", "doc_to_choice: [a, b]");
    let csv = csv.replace("doc_to_target: right", "doc_to_target: '{{right}}'");
    let good = "\"Who,\nme?\",1\n";
    let folder = Folder::new(&[("task.yaml", &csv), ("rows.csv", good)]);
    assert_eq!(
        folder.requests().unwrap()[0],
        likelihood("Q: Who,\nme?", " a")
    );
    let folder = Folder::new(&[("task.yaml", &csv), ("rows.csv", &format!("{good}x,1,2\n"))]);
    let error = folder.requests().unwrap_err();
    assert!(
        error.contains("line 3") && error.contains("3 columns, expected 2"),
        "{error}"
    );

    let labelled = TASK.replace("  source", "  labels: {test: labels.lst}\n  source");
    let labelled = labelled.replace("doc_to_target: right", "doc_to_target: '{{label}}'");
    let files = |labels| {
        Folder::new(&[
            ("task.yaml", labelled.as_str()),
            ("rows.jsonl", ROW),
            ("labels.lst", labels),
        ])
    };
    assert_eq!(files("1\n").requests().unwrap().len(), 2);
    let error = files("1\n0\n").requests().unwrap_err();
    assert!(
        error.contains("labels.lst") && error.contains("2 labels"),
        "{error}"
    );
}

#[test]
fn a_json_file_may_hold_all_splits() {
    let json = TASK.replace("format: jsonl", "format: json\n  columns: [q, right]");
    let json = json.replace("doc_to_choice: options", "doc_to_choice: [a, b]");
    let requests = |rows: &str| {
        let files = [("task.yaml", json.as_str()), ("rows.jsonl", rows)];
        Folder::new(&files).requests()
    };
    let want = likelihood("Q: Who?", " a");
    for rows in [
        r#"[{"q": "Who?", "right": 1}]"#,
        r#"{"train": [], "test": [["Who?", 1]]}"#,
    ] {
        assert_eq!(requests(rows).unwrap()[0], want);
    }
    for (rows, said) in [
        (
            r#"{"train": [["Who?", 1]]}"#,
            "no split `test` among `train`",
        ),
        (r#"{"test": [["Who?", 1], ["Who?"]]}"#, "row 2"),
        (r#"{"test": 5}"#, "no JSON array"),
        ("[1", "line 1"),
    ] {
        let error = requests(rows).unwrap_err();
        assert!(
            error.contains("rows.jsonl") && error.contains(said),
            "{said}: {error}"
        );
    }
}

#[test]
fn rows_of_a_split_may_be_chosen_and_lie_in_many_files() {
    let chosen = TASK.replace(
        "splits: {test: rows.jsonl}",
        "splits: {test: rows.jsonl}\n  rows: {test: n > 1 and q != 'no'}",
    );
    assert_ne!(chosen, TASK);
    let row = |q: &str, n: u32| {
        let row = ROW.replace("Who?", q);
        format!("{}\n", row.replacen('{', &format!("{{\"n\": {n}, "), 1))
    };
    let rows = [row("one", 1), row("no", 2), row("two", 3)].concat();
    let folder = Folder::new(&[("task.yaml", &chosen), ("rows.jsonl", &rows)]);
    assert_eq!(folder.requests().unwrap()[0], likelihood("Q: two", " I"));
    for (rows, said) in [
        (row("one", 1), "no row of its file is in the split `test`"),
        (ROW.to_owned(), "no field `n`"),
    ] {
        let folder = Folder::new(&[("task.yaml", &chosen), ("rows.jsonl", &rows)]);
        let error = folder.requests().unwrap_err();
        assert!(error.contains(said), "{said}: {error}");
    }
    // One object a file, 9 before 10.
    let apart = TASK
        .replace("format: jsonl", "format: json_files")
        .replace("rows.jsonl", "rows");
    let [nine, ten] = ["nine", "ten"].map(|q| ROW.replace("Who?", q));
    let folder = Folder::new(&[
        ("task.yaml", &apart),
        ("rows/10.json", &ten),
        ("rows/9.json", &nine),
        ("rows/notes.txt", "no row"),
    ]);
    assert_eq!(folder.requests().unwrap()[0], likelihood("Q: nine", " I"));
    let folder = Folder::new(&[("task.yaml", &apart), ("rows/1.json", "[")]);
    let error = folder.requests().unwrap_err();
    assert!(
        error.contains("1.json") && error.contains("no JSON object"),
        "{error}"
    );
    let folder = Folder::new(&[("task.yaml", &apart)]);
    let error = folder.requests().unwrap_err();
    assert!(
        error.contains("a folder with one JSON object a file"),
        "{error}"
    );
}

#[test]
fn missing_data_are_told_where_they_were_looked_for() {
    let folder = Folder::new(&[("task.yaml", TASK)]);
    let error = folder.requests().unwrap_err();
    for part in [
        "rows.jsonl`",
        "rows.jsonl.gz`",
        "mine",
        "one JSON object a line",
        "Made by hand",
        "--data",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let task = folder.select("task.yaml").unwrap();
    let error = build_prompts(task[0].tasks()[0], &[], &PromptOptions::default());
    assert!(error.err().unwrap().to_string().contains("none was given"));
    let rows = Folder::new(&[("task.yaml", TASK), ("rows.jsonl", ROW)]);
    let more = PromptOptions {
        num_fewshot: Some(3),
        ..PromptOptions::default()
    };
    let folders = [rows.0.path().to_owned()];
    let error = build_prompts(task[0].tasks()[0], &folders, &more)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("ask for fewer"), "{error}");
}

#[test]
fn folders_and_groups_bring_their_tasks() {
    let group = "group: both\ntask:\n- {include: _base.yaml, task: one}\n- two\n- mmlu_stem\n";
    let two = "include: _base.yaml\ntask: two\ntag: pair\n";
    let folder = Folder::new(&[
        ("tasks/_base.yaml", TASK),
        ("tasks/group.yaml", group),
        ("tasks/two.yaml", two),
        ("tasks/three.yml", "include: arc_easy.yaml\ntask: three\n"),
        ("tasks/notes.txt", "no task"),
    ]);
    let selected = folder.select("tasks").unwrap();
    let names: Vec<&str> = selected.iter().map(Benchmark::name).collect();
    assert_eq!(names, ["both", "three"]);
    assert_eq!(selected[0].tasks().len(), 21);
    let own: &TaskConfig = selected[0].tasks()[0];
    assert_eq!(
        (own.name(), own.doc_to_text.as_deref()),
        ("one", Some("Q: {{q}}"))
    );
    let circle = Folder::new(&[("task.yaml", "group: a\ntask: [a]\n")]);
    assert!(
        circle
            .select("task.yaml")
            .unwrap_err()
            .contains("member of itself")
    );
}

#[test]
fn what_comes_with_the_program_is_whole() {
    let catalogue = Catalogue::built_in().unwrap();
    let count = |name: &str| {
        let selected = catalogue.select(&[name.to_owned()]).unwrap();
        selected
            .iter()
            .map(|benchmark| benchmark.tasks().len())
            .sum::<usize>()
    };
    assert_eq!(count("mmlu"), 57);
    assert_eq!(count("ai2_arc"), 2);
    for task in catalogue.tasks() {
        assert_eq!(count(task.name()), 1);
        assert!(!task.version().is_null(), "{}", task.name());
        assert!(task.metric_list.is_some(), "{}", task.name());
    }
    let error = catalogue
        .select(&["mmlu_law".into()])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`mmlu_law`") && error.contains("lightmoe tasks"),
        "{error}"
    );
    assert!(catalogue.select(&["absent.yaml".into()]).is_err());
    assert!(!Path::new("absent.yaml").exists());
}
