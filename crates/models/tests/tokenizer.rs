//! Tokenizer folders: what is read, and the errors of damaged ones.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_models::ModelTokenizer;
use serde_json::json;
use std::fs;

#[test]
fn tokenizers_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let fail = |words: &[&str]| {
        let message = ModelTokenizer::load(dir, Some(0))
            .err()
            .unwrap()
            .to_string();
        for word in words.iter().chain(&[&*dir.to_string_lossy(), ";"]) {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    fail(&["tokenizer.json", "copy it"]);
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fail(&["tokenizer.json", "copy it"]);
    let model = json!({
        "version": "1.0", "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []},
    });
    fs::write(dir.join("tokenizer.json"), model.to_string()).unwrap();
    assert_eq!(ModelTokenizer::load(dir, Some(0)).unwrap().eos, 0);
    let none = ModelTokenizer::load(dir, None).err().unwrap().to_string();
    assert!(none.contains("eos_token_id"), "{none}");
    let config = dir.join("tokenizer_config.json");
    fs::write(&config, r#"{"eos_token": {"content": "</s>"}}"#).unwrap();
    let tokenizer = ModelTokenizer::load(dir, Some(0)).unwrap();
    assert_eq!(
        (tokenizer.eos, tokenizer.encode("aa").unwrap()),
        (1, vec![0, 0])
    );
    assert!(
        tokenizer
            .chat(&[])
            .unwrap_err()
            .to_string()
            .contains("no chat template")
    );
    fs::write(&config, "{").unwrap();
    fail(&["tokenizer_config.json", "repair"]);
    // A file that is there and cannot be read is not as good as none.
    fs::write(&config, b"{\"a\": \"\xff\"}").unwrap();
    fail(&["tokenizer_config.json"]);
    fs::write(&config, "{}").unwrap();
    fs::write(dir.join("chat_template.jinja"), b"\xff").unwrap();
    fail(&["chat_template.jinja"]);
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content.strip() }}\n\
                    {% endfor %}{% if not messages %}{{ raise_exception('empty') }}{% endif %}";
    fs::write(dir.join("chat_template.jinja"), template).unwrap();
    let tokenizer = ModelTokenizer::load(dir, Some(0)).unwrap();
    let turn = |role: &str| lightmoe_models::ChatMessage {
        role: role.into(),
        content: "hi".into(),
    };
    let text = tokenizer.chat(&[turn("user"), turn("assistant")]).unwrap();
    assert_eq!(text, "user: hi\nassistant: hi\n");
    assert!(
        tokenizer
            .chat(&[])
            .unwrap_err()
            .to_string()
            .contains("empty")
    );
}
