//! The tokenizers of BLEU.

use super::is_space;
use fancy_regex::Regex;
use std::sync::LazyLock;

/// How a text becomes words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tokenizer {
    /// That of mteval-v13a, for languages with spaces.
    #[default]
    V13a,
    /// Every Chinese character a word, the rest as in mteval-v13a.
    Chinese,
}

impl Tokenizer {
    /// The tokenizer that sacreBLEU calls so.
    pub fn named(name: &str) -> Option<Self> {
        [Self::V13a, Self::Chinese]
            .into_iter()
            .find(|tokenizer| tokenizer.name() == name)
    }

    /// What sacreBLEU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V13a => "13a",
            Self::Chinese => "zh",
        }
    }

    /// The words of a text.
    pub(super) fn words(self, text: &str) -> Vec<String> {
        let line = match self {
            Self::V13a => western_line(text),
            Self::Chinese => {
                let text = text.trim_matches(is_space).chars();
                let apart = text.map(|c| match is_chinese(c) {
                    true => format!(" {c} "),
                    false => c.to_string(),
                });
                apart.collect()
            }
        };
        let mut line = line;
        for (pattern, replacement) in PATTERNS.iter() {
            line = pattern.replace_all(&line, *replacement).into_owned();
        }
        let words = line.split(is_space).filter(|word| !word.is_empty());
        words.map(str::to_owned).collect()
    }
}

/// Line breaks and character references undone.
fn western_line(text: &str) -> String {
    let line = text.trim_end_matches(is_space).replace("<skipped>", "");
    let mut line = line.replace("-\n", "").replace('\n', " ");
    for (reference, character) in [
        ("&quot;", "\""),
        ("&amp;", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
    ] {
        line = line.replace(reference, character);
    }
    format!(" {line} ")
}

/// Punctuation is a word; a period or comma unless it stands between digits; a dash after a digit.
static PATTERNS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    [
        (
            r"([\x20-\x26\x28-\x2b\x2f\x3a-\x40\x5b-\x60\x7b-\x7e])",
            " $1 ",
        ),
        (r"([^0-9])([.,])", "$1 $2 "),
        (r"([.,])([^0-9])", " $1 $2"),
        (r"([0-9])(-)", "$1 $2 "),
    ]
    .into_iter()
    .filter_map(|(pattern, replacement)| Some((Regex::new(pattern).ok()?, replacement)))
    .collect()
});

/// sacreBLEU's ranges. It means two beyond U+FFFF, which its notation cuts short to the third here and
/// a part of `2F00` to `2FDF`.
fn is_chinese(c: char) -> bool {
    matches!(c,
        '\u{3400}'..='\u{4db5}' | '\u{4e00}'..='\u{9fbb}' | '\u{2001}'..='\u{2a6d}'
        | '\u{2e80}'..='\u{2eff}' | '\u{2f00}'..='\u{2fdf}' | '\u{2ff0}'..='\u{2fff}'
        | '\u{3000}'..='\u{303f}' | '\u{3100}'..='\u{312f}' | '\u{31a0}'..='\u{31bf}'
        | '\u{31c0}'..='\u{31ef}' | '\u{3200}'..='\u{33ff}' | '\u{f900}'..='\u{fa2d}'
        | '\u{fa30}'..='\u{fa6a}' | '\u{fa70}'..='\u{fad9}' | '\u{fe10}'..='\u{fe1f}'
        | '\u{fe30}'..='\u{fe4f}' | '\u{ff00}'..='\u{ffef}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pattern_is_lost() {
        assert_eq!(PATTERNS.len(), 4);
    }

    #[test]
    fn punctuation_and_chinese_characters_are_words() {
        let words = |tokenizer: Tokenizer, text| tokenizer.words(text).join(" ");
        assert_eq!(
            words(Tokenizer::V13a, "It cost 1,000.50, e.g. 3-4 &lt;b&gt;."),
            "It cost 1,000.50 , e . g . 3 - 4 < b > ."
        );
        assert_eq!(
            words(Tokenizer::Chinese, "我赢了 twice, 你?"),
            "我 赢 了 twice , 你 ?"
        );
        assert_eq!(Tokenizer::named("zh"), Some(Tokenizer::Chinese));
        assert_eq!(Tokenizer::named("intl"), None);
    }
}
