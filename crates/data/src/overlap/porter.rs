//! Porter's stemmer with the changes of NLTK, which `rouge_score` uses. Porter, "An algorithm for suffix
//! stripping" (Program 14, 1980).

/// Forms that the rules would not bring together.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// Steps 2 and 3: a suffix and what takes its place, if a syllable stands before it.
const STEP_2: [(&str, &str); 21] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
];
const STEP_3: [(&str, &str); 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];
/// Step 4: suffixes that go if two syllables stand before them; `ion` behind `s` and `t` only.
const STEP_4: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou",
    "ism", "ate", "iti", "ous", "ive", "ize",
];

/// The stem of a word in small ASCII letters and digits.
pub(super) fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(form, _)| *form == word) {
        return (*stem).to_owned();
    }
    if word.len() <= 2 {
        return word.to_owned();
    }
    let word = past_and_progressive(&plural(word));
    let word = final_y(word);
    let word = derived(&word);
    let word = replaced(&word, &STEP_3).unwrap_or(word);
    tidied(&without_suffix(word))
}

/// Step 1a.
fn plural(word: &str) -> String {
    if word.len() == 4 && word.ends_with("ies") {
        return word[..3].to_owned();
    }
    let cut = match word {
        _ if word.ends_with("sses") || word.ends_with("ies") => 2,
        _ if word.ends_with('s') && !word.ends_with("ss") => 1,
        _ => 0,
    };
    word[..word.len() - cut].to_owned()
}

/// Step 1b.
fn past_and_progressive(word: &str) -> String {
    if let Some(stem) = word.strip_suffix("ied") {
        return format!("{stem}{}", if word.len() == 4 { "ie" } else { "i" });
    }
    if let Some(stem) = word.strip_suffix("eed") {
        return match measure(stem) {
            0 => word.to_owned(),
            _ => format!("{stem}ee"),
        };
    }
    let stems = ["ed", "ing"].map(|suffix| word.strip_suffix(suffix));
    let Some(stem) = stems.into_iter().flatten().find(|stem| has_vowel(stem)) else {
        return word.to_owned();
    };
    if ["at", "bl", "iz"].iter().any(|end| stem.ends_with(end)) {
        return format!("{stem}e");
    }
    if ends_in_double_consonant(stem) {
        let is_kept = stem.ends_with(['l', 's', 'z']);
        return stem[..stem.len() - usize::from(!is_kept)].to_owned();
    }
    match measure(stem) == 1 && is_short(stem) {
        true => format!("{stem}e"),
        false => stem.to_owned(),
    }
}

/// Step 1c: `y` behind a consonant that does not begin the word.
fn final_y(word: String) -> String {
    match word.strip_suffix('y') {
        Some(stem) if stem.len() > 1 && consonants(stem).last() == Some(&true) => {
            format!("{stem}i")
        }
        _ => word,
    }
}

/// Step 2. `alli` comes first, and what is left of it is looked at again.
fn derived(word: &str) -> String {
    if let Some(stem) = word.strip_suffix("alli").filter(|stem| measure(stem) > 0) {
        return derived(&format!("{stem}al"));
    }
    if let Some(replaced) = replaced(word, &STEP_2) {
        return replaced;
    }
    // The `l` of `logi` counts with the stem.
    match word.strip_suffix("ogi") {
        Some(stem) if stem.ends_with('l') && measure(stem) > 0 => format!("{stem}og"),
        _ => word.to_owned(),
    }
}

/// The first rule whose suffix is there, applied if a syllable stands before it.
fn replaced(word: &str, rules: &[(&str, &str)]) -> Option<String> {
    let (stem, replacement) = rules
        .iter()
        .find_map(|(suffix, to)| Some((word.strip_suffix(suffix)?, to)))?;
    Some(match measure(stem) {
        0 => word.to_owned(),
        _ => format!("{stem}{replacement}"),
    })
}

/// Step 4.
fn without_suffix(word: String) -> String {
    let found = STEP_4
        .iter()
        .find_map(|suffix| Some((*suffix, word.strip_suffix(suffix)?)));
    match found {
        Some((suffix, stem))
            if measure(stem) > 1 && (suffix != "ion" || stem.ends_with(['s', 't'])) =>
        {
            stem.to_owned()
        }
        _ => word,
    }
}

/// Step 5: a last `e`, then one of two `l`.
fn tidied(word: &str) -> String {
    let mut word = word;
    if let Some(stem) = word.strip_suffix('e') {
        let syllables = measure(stem);
        if syllables > 1 || syllables == 1 && !is_short(stem) {
            word = stem;
        }
    }
    match word.strip_suffix('l') {
        Some(stem) if stem.ends_with('l') && measure(stem) > 1 => stem.to_owned(),
        _ => word.to_owned(),
    }
}

/// Of each letter, whether it is a consonant; `y` is one unless it follows one.
fn consonants(word: &str) -> Vec<bool> {
    let mut is_consonant = Vec::with_capacity(word.len());
    for letter in word.chars() {
        is_consonant.push(match letter {
            'a' | 'e' | 'i' | 'o' | 'u' => false,
            'y' => is_consonant.last() != Some(&true),
            _ => true,
        });
    }
    is_consonant
}

/// Porter's m: how often a consonant follows a vowel.
fn measure(word: &str) -> usize {
    let pairs = consonants(word);
    pairs.windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

fn has_vowel(word: &str) -> bool {
    consonants(word).contains(&false)
}

fn ends_in_double_consonant(word: &str) -> bool {
    let mut letters = word.chars().rev();
    let is_double = matches!((letters.next(), letters.next()), (Some(a), Some(b)) if a == b);
    is_double && consonants(word).last() == Some(&true)
}

/// Porter's *o: the word ends consonant, vowel, consonant, the last not `w`, `x` or `y`; or is a vowel
/// and a consonant.
fn is_short(word: &str) -> bool {
    match consonants(word).as_slice() {
        [false, true] => true,
        [.., true, false, true] => !word.ends_with(['w', 'x', 'y']),
        _ => false,
    }
}
