use super::*;
use serde_json::{Value, json};

/// Two layers of four experts.
fn config(lightmoe: Option<Value>) -> ModelConfig {
    let mut raw = json!({
        "model_type": "olmoe", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "hidden_act": "silu", "eos_token_id": 1,
    });
    if let Some(value) = lightmoe {
        raw["lightmoe"] = value;
    }
    ModelConfig::from_json(&raw, Path::new("here/config.json")).unwrap()
}

fn read(lightmoe: Value) -> Result<BankLayout> {
    BankLayout::of(&config(Some(lightmoe)), Path::new("here/config.json"))
}

fn adapted(group: Option<usize>, rank: usize) -> SlotLayout {
    SlotLayout::adapted(group, rank)
}

fn mixed(bases: usize, rank: usize) -> SlotLayout {
    SlotLayout::Mixed { bases, rank }
}

/// A layout with this first layer; the second is dense.
fn layout(slots: &[SlotLayout]) -> BankLayout {
    layout_of(LayerLayout::from(slots.to_vec()))
}

fn layout_of(layer: LayerLayout) -> BankLayout {
    let mut layout = BankLayout::dense(&config(None));
    layout.layers.insert(0, layer);
    layout
}

fn factored(slots: [SlotLayout; 4], [rank, gate_up_rows, down_rows]: [usize; 3]) -> BankLayout {
    layout_of(LayerLayout {
        factored: Some(FactoredBases {
            rank,
            gate_up_rows,
            down_rows,
        }),
        ..LayerLayout::from(slots.to_vec())
    })
}

const DENSE: SlotLayout = SlotLayout::Dense;

#[test]
fn a_written_layout_is_read_back() {
    let slots = [
        [DENSE, adapted(Some(1), 2), DENSE, adapted(Some(0), 2)],
        [adapted(Some(0), 0); 4],
        [adapted(None, 3); 4],
        [DENSE, DENSE, DENSE, adapted(Some(0), 1)],
        [
            adapted(Some(0), 2),
            adapted(None, 3),
            SlotLayout::Constant,
            SlotLayout::Removed,
        ],
        [mixed(2, 3), adapted(Some(0), 2), mixed(2, 3), DENSE],
    ];
    let whole = slots.iter().map(|slots| layout(slots));
    for layout in whole.chain([factored([adapted(Some(0), 0); 4], [8, 1, 3])]) {
        let original = config(None);
        let raw = layout.annotate(&original).unwrap();
        // Through text, as on disk: the layer numbers become strings.
        let raw: Value = serde_json::from_str(&raw.to_string()).unwrap();
        let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
        assert_eq!(BankLayout::of(&config, Path::new("c")).unwrap(), layout);
        // Annotating a compressed config again replaces; a dense layout takes the key away.
        assert_eq!(layout.annotate(&config).unwrap(), raw);
        let dense = BankLayout::dense(&config).annotate(&config).unwrap();
        assert_eq!(dense, original.raw);
    }
}

#[test]
fn without_the_key_every_slot_is_dense() {
    let layout = BankLayout::of(&config(None), Path::new("c")).unwrap();
    assert_eq!(layout.layers.keys().collect::<Vec<_>>(), [&0, &1]);
    assert!(
        layout
            .layers
            .values()
            .all(|l| l == &LayerLayout::dense(4) && l.bases() == 0 && l.rank() == 0)
    );
}

#[test]
fn counts_bases_rank_and_adapted_slots() {
    let layer =
        layout(&[adapted(Some(1), 5), DENSE, adapted(Some(0), 5), DENSE]).layers[&0].clone();
    assert_eq!((layer.bases(), layer.rank()), (2, 5));
    let adapted: Vec<_> = layer.adapted().collect();
    assert_eq!(adapted, [(0, Some(1), 5), (2, Some(0), 5)]);
}

/// Refused when read, and when about to be written.
#[track_caller]
fn assert_refused(layout: &BankLayout, words: &[&str]) {
    let written = layout.annotate(&config(None)).unwrap_err().to_string();
    let message = read(serde_json::to_value(layout).unwrap())
        .unwrap_err()
        .to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
        assert!(written.contains(word), "`{written}` lacks `{word}`");
    }
    assert!(message.contains("here/config.json") && message.contains("build"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let one = |slot| layout(&[DENSE, slot, DENSE, DENSE]);
    assert_refused(&layout(&[DENSE; 3]), &["layer 0", "3 slots", "4 experts"]);
    let removed = [
        SlotLayout::Removed,
        SlotLayout::Removed,
        SlotLayout::Removed,
        DENSE,
    ];
    assert_refused(&layout(&removed), &["1 experts", "top-k of 2"]);
    assert_refused(&one(adapted(Some(1), 2)), &["no slot uses base 0"]);
    assert_refused(&one(adapted(Some(4), 2)), &["base 4"]);
    let wide = layout(&[adapted(None, 9), DENSE, DENSE, DENSE]);
    assert_refused(&wide, &["layer 0", "rank 9", "8"]);
    // Neither an overflow nor an allocation of that size.
    assert_refused(&one(adapted(None, usize::MAX)), &["rank"]);
    assert_refused(&one(adapted(Some(usize::MAX - 1), 2)), &["base"]);
    assert_refused(&one(adapted(Some(usize::MAX), 2)), &["base"]);
    assert_refused(&one(adapted(None, 0)), &["slot 1", "neither"]);
    for (bases, rank) in [
        (0, 2),
        (5, 2),
        (usize::MAX, 2),
        (2, 0),
        (2, 9),
        (2, usize::MAX),
    ] {
        assert_refused(&one(mixed(bases, rank)), &["layer 0", "bases of rank"]);
    }
    let alone = [adapted(Some(0), 0); 4];
    for shape in [
        [0, 1, 1],
        [9, 1, 1],
        [2, 0, 1],
        [2, 9, 1],
        [2, 1, 0],
        [2, 1, 9],
        [usize::MAX; 3],
    ] {
        assert_refused(
            &factored(alone, shape),
            &["layer 0", "factored bases of rank"],
        );
    }
    assert_refused(
        &factored([adapted(None, 2); 4], [2, 1, 1]),
        &["layer 0", "without a slot"],
    );
    let unlike = layout(&[mixed(2, 3), DENSE, mixed(2, 4), DENSE]);
    assert_refused(&unlike, &["slot 2", "other bases"]);
    let mut missing = layout(&[DENSE, DENSE, DENSE, adapted(Some(0), 1)]);
    let second = missing.layers.remove(&1).unwrap();
    assert_refused(&missing, &["no layer 1"]);
    missing.layers.extend([(1, second.clone()), (2, second)]);
    assert_refused(&missing, &["layer 2"]);
}

#[test]
fn damaged_entries_are_refused() {
    for (value, word) in [
        (json!(null), "lightmoe"),
        (json!([]), "lightmoe"),
        (json!({"layers": {}}), "schema_version"),
        (
            json!({"schema_version": 2, "banks": []}),
            "schema_version 2",
        ),
        (json!({"schema_version": 1}), "layers"),
        (
            json!({"schema_version": 1, "layers": {"zero": {"slots": []}}}),
            "number",
        ),
        (
            json!({"schema_version": 1, "layers": {"0": {"slots": [{"form": "sparse"}]}}}),
            "sparse",
        ),
    ] {
        let message = read(value).unwrap_err().to_string();
        assert!(message.contains(word), "`{message}` lacks `{word}`");
        assert!(message.contains("here/config.json"));
    }
}
