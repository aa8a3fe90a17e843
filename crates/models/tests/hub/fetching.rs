//! What is fetched, from where, and what is refused.

use crate::server::COMMIT;
use crate::world::{WEIGHTS, World, failed, mixtral, of, refused, sharded};
use lightmoe_models::Checkpoint;
use lightmoe_models::hub::{HubName, Want, fetch, fetch_files, snapshot};
use std::fs;

#[test]
fn a_model_comes_whole_and_once() {
    let mut files = mixtral();
    let wanted = [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let unwanted = [
        ".gitattributes",
        "consolidated.00.pth",
        "model.gguf",
        "onnx/model.onnx",
        "original/tokenizer.model",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.json",
    ];
    for name in wanted.iter().chain(&unwanted) {
        files.insert(name.to_string(), format!("this is {name}").into());
    }
    files.insert("vocab.txt".into(), Vec::new());
    let world = World::new(files.clone());
    let name = HubName::parse("org/tiny").unwrap();
    let mut told = Vec::new();
    let folder = fetch(
        &name,
        Want::Whole,
        &world.options,
        &mut |file, done, all| {
            told.push((file.to_owned(), done, all));
            true
        },
    );
    let folder = folder.unwrap();
    Checkpoint::open(&folder).unwrap();

    let mut all = [&wanted[..], &["config.json", WEIGHTS, "vocab.txt"]].concat();
    all.sort_unstable();
    assert_eq!(world.names(&format!("snapshots/{COMMIT}")), all);
    for name in &all {
        let path = folder.join(name);
        assert_eq!(fs::read(&path).unwrap(), files[*name], "{name}");
        let link = fs::read_link(&path).unwrap();
        assert!(link.starts_with("../../blobs"), "{link:?}");
        let length = files[*name].len() as u64;
        assert!(told.contains(&(name.to_string(), length, length)), "{name}");
    }
    assert!(told.iter().all(|(_, done, all)| done <= all));
    assert_eq!(world.names("blobs").len(), all.len());
    let reference = world.cache.path().join("models--org--tiny/refs/main");
    assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);
    let seen = world.hub.seen();
    for name in unwanted {
        assert!(of(&seen, name).is_empty(), "{name}");
    }

    assert_eq!(world.whole().unwrap(), folder);
    let seen = world.hub.seen();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!(seen[0].path, "/api/models/org/tiny/revision/main");
}

#[test]
fn a_config_comes_without_weights() {
    let world = World::new(mixtral());
    let folder = world.fetch("org/tiny", Want::ConfigOnly).unwrap();
    assert!(folder.join("config.json").exists());
    assert_eq!(world.names(&format!("snapshots/{COMMIT}")), ["config.json"]);
    assert!(of(&world.hub.seen(), WEIGHTS).is_empty());
    world.offline().fetch("org/tiny", Want::ConfigOnly).unwrap();
    refused(
        world.offline().whole(),
        &["HF_HUB_OFFLINE", WEIGHTS, "unset"],
    );
}

#[test]
fn shards_are_those_that_the_index_names() {
    let world = World::new(sharded());
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    assert!(of(&world.hub.seen(), "consolidated.safetensors").is_empty());
    world.offline().whole().unwrap();
    let second = "model-00002-of-00002.safetensors";
    let snapshots = world.cache.path().join("models--org--tiny/snapshots");
    fs::remove_file(snapshots.join(COMMIT).join(second)).unwrap();
    refused(world.offline().whole(), &[second]);

    let mut files = sharded();
    files.remove(second);
    refused(World::new(files).whole(), &["no file", second, "revision"]);
}

#[test]
fn offline_the_cache_must_suffice() {
    let world = World::new(mixtral());
    refused(
        world.offline().whole(),
        &["HF_HUB_OFFLINE", "config.json", "org/tiny", "unset"],
    );
    let folder = world.whole().unwrap();
    world.hub.seen();
    assert_eq!(world.offline().whole().unwrap(), folder);
    assert!(world.hub.seen().is_empty());
    // A commit needs no reference.
    let commit = world
        .offline()
        .fetch(&format!("org/tiny@{COMMIT}"), Want::Whole);
    assert_eq!(commit.unwrap(), folder);
    refused(
        world.offline().fetch("org/tiny@v2", Want::Whole),
        &["org/tiny@v2"],
    );
}

#[test]
fn a_revision_is_a_branch_a_reference_or_a_commit() {
    let world = World::new(mixtral());
    let folder = world.fetch("org/tiny@v2", Want::Whole).unwrap();
    assert_eq!(world.names("refs"), ["v2"]);
    for revision in ["refs/pr/1", COMMIT] {
        let again = world.fetch(&format!("org/tiny@{revision}"), Want::Whole);
        assert_eq!(again.unwrap(), folder);
    }
    assert_eq!(world.names("refs"), ["refs", "v2"]);
    refused(
        world.fetch("org/tiny@v3", Want::Whole),
        &["no revision `v3`", "org/tiny", "give"],
    );
}

#[test]
fn a_renamed_model_is_found() {
    let world = World::new(mixtral());
    Checkpoint::open(&world.fetch("old/name", Want::Whole).unwrap()).unwrap();
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let mut world = World::new(mixtral());
    world.options.token = Some("secret".into());
    world.whole().unwrap();
    let seen = world.hub.seen();
    assert!(seen.iter().any(|s| s.path.starts_with("/storage/")));
    for s in seen {
        let token = s.headers.get("authorization").map(String::as_str);
        let expected = (!s.path.starts_with("/storage/")).then_some("Bearer secret");
        assert_eq!(token, expected, "{s:?}");
    }
}

#[test]
fn what_does_not_exist_or_may_not_be_read_says_what_to_do() {
    let world = World::new(mixtral());
    let fetch = |name: &str| world.fetch(name, Want::Whole);
    refused(fetch("org/none"), &["org/none", "no folder", "HF_TOKEN"]);
    refused(fetch("org/gated"), &["gated", "terms", "HF_TOKEN"]);
    refused(
        fetch("org/forbidden"),
        &["org/forbidden", "access", "HF_TOKEN"],
    );
    for (lost, words) in [
        ("config.json", ["no config.json", "give"]),
        (WEIGHTS, ["no safetensors", "convert"]),
    ] {
        let mut files = mixtral();
        files.remove(lost);
        files.insert("pytorch_model.bin".into(), vec![1]);
        let world = World::new(files);
        refused(world.whole(), &words);
        assert_eq!(
            world
                .hub
                .seen()
                .iter()
                .filter(|s| s.method == "GET")
                .count(),
            match lost {
                WEIGHTS => 2,
                _ => 1,
            }
        );
    }
}

#[test]
fn without_a_network_it_says_so() {
    let mut world = World::new(mixtral());
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    world.options.endpoint = format!("http://{}", port.local_addr().unwrap());
    drop(port);
    failed(world.whole(), &["no answer", "network", "HF_HUB_OFFLINE=1"]);
}

#[test]
fn of_a_data_set_the_chosen_files_come() {
    let names = [
        "README.md",
        "a/test.jsonl",
        "a/train.jsonl",
        "../../out.jsonl",
    ];
    let file = |name: &str| (name.to_owned(), format!("this is {name}").into_bytes());
    let world = World::new(names.map(file).into());
    let name = HubName::data_set("org/tiny").unwrap();
    let empty = snapshot(&name, world.cache.path());
    assert!(empty.ends_with("datasets--org--tiny/snapshots/main"));
    let bring = |choose: &dyn Fn(&[String], Option<&str>) -> Vec<String>| {
        fetch_files(&name, &world.options, choose, &mut |_, _, _| true)
    };
    let folder = bring(&|files, readme| {
        assert_eq!(files, ["README.md", "a/test.jsonl", "a/train.jsonl"]);
        assert_eq!(readme, Some("this is README.md"));
        vec!["a/test.jsonl".to_owned()]
    })
    .unwrap();
    assert_eq!(folder, snapshot(&name, world.cache.path()));
    assert!(folder.ends_with(format!("datasets--org--tiny/snapshots/{COMMIT}")));
    let text = fs::read_to_string(folder.join("a/test.jsonl")).unwrap();
    assert_eq!(text, "this is a/test.jsonl");
    assert!(!folder.join("a/train.jsonl").exists());
    refused(
        bring(&|_, _| Vec::new()),
        &["org/tiny", "none of the wanted"],
    );
    let absent = HubName::data_set("nothing").unwrap();
    let all = &|files: &[String], _: Option<&str>| files.to_vec();
    let answer = fetch_files(&absent, &world.options, all, &mut |_, _, _| true);
    refused(answer, &["no such data set"]);
    let offline = world.offline();
    let answer = fetch_files(&name, &offline.options, all, &mut |_, _, _| true);
    refused(answer, &["HF_HUB_OFFLINE", "org/tiny"]);
}
