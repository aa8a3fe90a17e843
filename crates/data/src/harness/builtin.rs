//! The files that come with the program.

/// Each file's name and text.
pub(super) const FILES: &[(&str, &str)] = &[
    (
        "_hendrycks_math.yaml",
        include_str!("tasks/_hendrycks_math.yaml"),
    ),
    ("_mmlu.yaml", include_str!("tasks/_mmlu.yaml")),
    (
        "arc_challenge.yaml",
        include_str!("tasks/arc_challenge.yaml"),
    ),
    ("arc_easy.yaml", include_str!("tasks/arc_easy.yaml")),
    ("banking77.yaml", include_str!("tasks/banking77.yaml")),
    ("boolq.yaml", include_str!("tasks/boolq.yaml")),
    ("clinc150.yaml", include_str!("tasks/clinc150.yaml")),
    ("gsm8k.yaml", include_str!("tasks/gsm8k.yaml")),
    ("hellaswag.yaml", include_str!("tasks/hellaswag.yaml")),
    (
        "hendrycks_math.yaml",
        include_str!("tasks/hendrycks_math.yaml"),
    ),
    ("humaneval.yaml", include_str!("tasks/humaneval.yaml")),
    ("mbpp.yaml", include_str!("tasks/mbpp.yaml")),
    ("mmlu.yaml", include_str!("tasks/mmlu.yaml")),
    (
        "mmlu_humanities.yaml",
        include_str!("tasks/mmlu_humanities.yaml"),
    ),
    ("mmlu_other.yaml", include_str!("tasks/mmlu_other.yaml")),
    (
        "mmlu_social_sciences.yaml",
        include_str!("tasks/mmlu_social_sciences.yaml"),
    ),
    ("mmlu_stem.yaml", include_str!("tasks/mmlu_stem.yaml")),
    ("openbookqa.yaml", include_str!("tasks/openbookqa.yaml")),
    ("perplexity.yaml", include_str!("tasks/perplexity.yaml")),
    ("piqa.yaml", include_str!("tasks/piqa.yaml")),
    ("rte.yaml", include_str!("tasks/rte.yaml")),
    ("scitldr.yaml", include_str!("tasks/scitldr.yaml")),
    (
        "tatoeba_cmn_eng.yaml",
        include_str!("tasks/tatoeba_cmn_eng.yaml"),
    ),
    (
        "tatoeba_eng_cmn.yaml",
        include_str!("tasks/tatoeba_eng_cmn.yaml"),
    ),
    ("wikitext.yaml", include_str!("tasks/wikitext.yaml")),
    ("winogrande.yaml", include_str!("tasks/winogrande.yaml")),
];
