//! Answers of mathematics written in LaTeX, compared as the tasks `hendrycks_math` of
//! lm-evaluation-harness do.

/// What the last `\boxed` of a text holds: up to its closing brace, or, written with a blank behind it,
/// up to the next `$`.
pub fn last_boxed(text: &str) -> Option<&str> {
    if let Some((_, rest)) = text.rsplit_once(r"\boxed ") {
        return rest.split('$').next();
    }
    let (_, rest) = text.rsplit_once(r"\boxed")?;
    let inner = rest.strip_prefix('{')?;
    let mut open = 1;
    for (place, c) in inner.char_indices() {
        match c {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(&inner[..place]);
        }
    }
    None
}

/// What stands between the first and the last `$` of a text; all of it, if there are not two.
pub fn inside_dollars(text: &str) -> &str {
    match (text.find('$'), text.rfind('$')) {
        (Some(first), Some(last)) if first < last => &text[first + 1..last],
        _ => text,
    }
}

/// Whether two answers are the same once they are written alike. Where one cannot be rewritten, they
/// are compared as they stand.
pub fn is_equivalent(a: &str, b: &str) -> bool {
    match (normalized(a), normalized(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// An answer without what does not matter: white space, units, signs of degree, percent and money, the
/// size of brackets; fractions and roots with braces. None where the harness's rules fail.
fn normalized(text: &str) -> Option<String> {
    let mut text = text.to_owned();
    for (from, to) in [
        ("\n", ""),
        (r"\!", ""),
        (r"\\", r"\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ] {
        text = text.replace(from, to);
    }
    let mut text = without_units(&text)?
        .replace(r"\%", "")
        .replace(" .", " 0.")
        .replace("{.", "{0.");
    if text.is_empty() {
        return Some(text);
    }
    if text.starts_with('.') {
        text.insert(0, '0');
    }
    // `x = 5` becomes ` 5`.
    if let Some((name, value)) = text.split_once('=')
        && !value.contains('=')
        && name.chars().count() <= 2
    {
        text = value.to_owned();
    }
    let text = braced_fractions(&braced_roots(&text)?.replace(' ', ""))?;
    match text.as_str() {
        "0.5" => Some(r"\frac{1}{2}".into()),
        _ => slash_as_fraction(text),
    }
}

/// Units come last, in `\text{ …`; two of them are a failure.
fn without_units(text: &str) -> Option<&str> {
    let mut parts = text.split(r"\text{ ");
    match (parts.next(), parts.next(), parts.next()) {
        (first, _, None) => first,
        _ => None,
    }
}

/// `\sqrt3` becomes `\sqrt{3}`.
fn braced_roots(text: &str) -> Option<String> {
    let mut parts = text.split(r"\sqrt");
    let mut out = parts.next()?.to_owned();
    for part in parts {
        let first = part.chars().next()?;
        match first {
            '{' => out.push_str(&format!(r"\sqrt{part}")),
            _ => out.push_str(&format!(r"\sqrt{{{first}}}{}", &part[first.len_utf8()..])),
        }
    }
    Some(out)
}

/// `\frac12` and `\frac1{2}` become `\frac{1}{2}`; nothing changes where one lacks its parts.
fn braced_fractions(text: &str) -> Option<String> {
    let mut parts = text.split(r"\frac");
    let mut out = parts.next()?.to_owned();
    for part in parts {
        out.push_str(r"\frac");
        let mut rest = part.chars();
        match (rest.next()?, rest.next()) {
            ('{', _) => out.push_str(part),
            (_, None) => return Some(text.to_owned()),
            (above, Some('{')) => out.push_str(&format!("{{{above}}}{{{}", rest.as_str())),
            (above, Some(below)) => {
                out.push_str(&format!("{{{above}}}{{{below}}}{}", rest.as_str()));
            }
        }
    }
    Some(out)
}

/// `3/4` becomes `\frac{3}{4}`; with anything but whole numbers it is a failure.
fn slash_as_fraction(text: String) -> Option<String> {
    let parts: Vec<&str> = text.split('/').collect();
    let [above, below] = parts[..] else {
        return Some(text);
    };
    let (is_plain_above, is_plain_below) = (is_plain_integer(above)?, is_plain_integer(below)?);
    Some(match is_plain_above && is_plain_below {
        true => format!(r"\frac{{{above}}}{{{below}}}"),
        false => text,
    })
}

/// Whether a whole number is written as Python writes it; none if Python would not read it as one.
fn is_plain_integer(text: &str) -> Option<bool> {
    let trimmed = text.trim();
    let digits = trimmed.strip_prefix(['-', '+']).unwrap_or(trimmed);
    // Single underscores may part digits.
    let is_number = digits
        .split('_')
        .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    let is_plain = trimmed == text
        && !text.starts_with('+')
        && !digits.contains('_')
        && (digits == "0" && text == "0" || !digits.starts_with('0'));
    is_number.then_some(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_box_is_found() {
        let boxed = last_boxed;
        assert_eq!(
            boxed(r"so $\boxed{1}$, no $\boxed{\frac{1}{2}}$."),
            Some(r"\frac{1}{2}")
        );
        assert_eq!(boxed(r"is $\boxed 7$ or"), Some("7"));
        assert_eq!(boxed(r"\boxed{1"), None);
        assert_eq!(boxed("1"), None);
        assert_eq!(inside_dollars("so $a$ and $b$."), "a$ and $b");
        assert_eq!(inside_dollars("costs 5$"), "costs 5$");
    }

    #[test]
    fn answers_are_the_same_that_mean_the_same() {
        for (a, b) in [
            (r"\frac12", r"\dfrac{1}{2}"),
            ("0.5", r"\frac{1}{2}"),
            ("3/4", r"\frac34"),
            (r"x = 5", "5"),
            (r"\left( 1, 2 \right)", "(1,2)"),
            (r"90^\circ", "90"),
            (r"12\text{ cm}", "12"),
            (r"\sqrt3", r"\sqrt{3}"),
            (".5", r"0.5"),
            (r"50\%", "50"),
        ] {
            assert!(is_equivalent(a, b), "{a} {b}");
        }
        for (a, b) in [
            ("1", "2"),
            (r"\frac{1}{2}", r"\frac{2}{1}"),
            ("a/b", r"\frac{a}{b}"),
        ] {
            assert!(!is_equivalent(a, b), "{a} {b}");
        }
    }
}
