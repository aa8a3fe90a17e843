//! What Python does otherwise: its regular expressions, its random numbers, its words for values.

use fancy_regex::Regex;
use rand_mt::Mt;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashSet;

/// Compiles a pattern of Python's `re`.
///
/// # Errors
/// The pattern and what is wrong with it.
pub fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(&translated(pattern)).map_err(|e| format!("the pattern `{pattern}` is none: {e}"))
}

/// `$` also matches before a line break that ends the text, and `\Z` is the end of the text.
fn translated(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut characters = pattern.chars();
    let mut in_class = false;
    while let Some(c) = characters.next() {
        match c {
            '\\' => match characters.next() {
                Some('Z') => out.push_str(r"\z"),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            '[' if !in_class => {
                in_class = true;
                out.push(c);
            }
            // Python has no nested classes.
            '[' => out.push_str(r"\["),
            ']' => {
                in_class = false;
                out.push(c);
            }
            '$' if !in_class && !pattern.contains("(?m") => out.push_str(r"(?=\n?\z)"),
            _ => out.push(c),
        }
    }
    out
}

/// `re.sub`: every match is replaced; `\1` and `\g<1>` in the replacement are groups.
///
/// # Errors
/// If matching takes too many steps.
pub fn substitute<'a>(
    regex: &Regex,
    replacement: &str,
    text: &'a str,
) -> Result<Cow<'a, str>, String> {
    let mut expanded = String::new();
    let mut characters = replacement.chars().peekable();
    while let Some(c) = characters.next() {
        match (c, characters.peek().copied()) {
            ('\\', Some(digit)) if digit.is_ascii_digit() => {
                characters.next();
                expanded.push_str(&format!("${{{digit}}}"));
            }
            ('\\', Some('g')) => {
                let name: String = characters
                    .by_ref()
                    .skip(2)
                    .take_while(|&c| c != '>')
                    .collect();
                expanded.push_str(&format!("${{{name}}}"));
            }
            ('\\', Some('n')) => {
                characters.next();
                expanded.push('\n');
            }
            ('\\', Some('\\')) => {
                characters.next();
                expanded.push('\\');
            }
            ('$', _) => expanded.push_str("$$"),
            _ => expanded.push(c),
        }
    }
    regex
        .try_replacen(text, 0, expanded.as_str())
        .map_err(|e| format!("replacing by a pattern failed: {e}"))
}

/// What `str` gives for a JSON value.
pub fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => representation(other),
    }
}

/// What `repr` gives for a JSON value.
fn representation(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(representation).collect();
            format!("[{}]", list.join(", "))
        }
        Value::Object(map) => {
            let pair = |(key, value): (&String, &Value)| {
                format!("{}: {}", quoted(key), representation(value))
            };
            format!(
                "{{{}}}",
                map.iter().map(pair).collect::<Vec<_>>().join(", ")
            )
        }
    }
}

fn quoted(text: &str) -> String {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `random.Random(seed)`: the Mersenne twister, seeded by an array of one number.
pub struct Random(Mt);

impl Random {
    /// A generator with a seed below 2^32.
    pub fn new(seed: u32) -> Self {
        Self(Mt::new_with_key([seed]))
    }

    /// A number below `limit`, by rejection.
    fn below(&mut self, limit: usize) -> usize {
        let bits = usize::BITS - limit.leading_zeros();
        loop {
            let drawn = (self.0.next_u32() >> (32 - bits)) as usize;
            if drawn < limit {
                return drawn;
            }
        }
    }

    /// `sample(range(population), count)`; `count` may be at most `population`, which is below 2^32.
    pub fn sample(&mut self, population: usize, count: usize) -> Vec<usize> {
        // Small populations are drawn from a pool, in large ones what was drawn is remembered: up to
        // where a set would be larger than the pool.
        let mut limit = 21;
        if count > 5 {
            limit += 4_usize.pow(((count * 3) as f64).log(4.0).ceil() as u32);
        }
        if population <= limit {
            let mut pool: Vec<usize> = (0..population).collect();
            (0..count)
                .map(|drawn| pool.swap_remove(self.below(population - drawn)))
                .collect()
        } else {
            let mut seen = HashSet::new();
            (0..count)
                .map(|_| {
                    loop {
                        let drawn = self.below(population);
                        if seen.insert(drawn) {
                            return drawn;
                        }
                    }
                })
                .collect()
        }
    }

    /// `choices(range(population), k=population)`: a resample.
    pub fn resample(&mut self, population: usize) -> Vec<usize> {
        (0..population)
            .map(|_| (self.unit() * population as f64) as usize)
            .collect()
    }

    /// `random()`: 53 bits in [0, 1).
    fn unit(&mut self) -> f64 {
        let (high, low) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn samples_are_those_of_python() {
        // random.Random(1234).sample(range(n), k), one after the other from one generator.
        let mut random = Random::new(1234);
        assert_eq!(random.sample(10, 3), [7, 1, 0]);
        assert_eq!(
            random.sample(1000, 8),
            [92, 932, 965, 961, 826, 596, 35, 687]
        );
        assert_eq!(random.sample(80, 8), [10, 12, 45, 30, 2, 3, 75, 44]);
        assert_eq!(Random::new(0).resample(6), [5, 4, 2, 1, 3, 2]);
    }

    #[test]
    fn patterns_are_read_as_python_reads_them() {
        let regex = |pattern| regex(pattern).unwrap();
        let all = |pattern, text| substitute(&regex(pattern), "", text).unwrap().into_owned();
        assert_eq!(all(r"\.$", "5.\n"), "5\n");
        assert_eq!(all(r"\.$", "5.\n\n"), "5.\n\n");
        assert_eq!(all(r"[$.]", "$5."), "5");
        assert_eq!(all(r"[[]x]", "[x]"), "");
        assert_eq!(all(r"(?s).*#### ", "a\nb #### 5"), "5");
        let swapped = substitute(&regex(r"(a)(b)"), r"\2$\g<1>", "xab").unwrap();
        assert_eq!(swapped, "xb$a");
        assert!(super::regex("(").unwrap_err().contains("`(`"));
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        assert_eq!(text_of(&json!("it's")), "it's");
        let value = json!(["it's", "a\n\"b'", true, null, {"k": 1.0}]);
        assert_eq!(
            text_of(&value),
            r#"["it's", 'a\n"b\'', True, None, {'k': 1.0}]"#
        );
    }
}
