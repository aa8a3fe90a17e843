//! The templates of a task over the fields of a document.

use super::latex::last_boxed;
use super::python::{regex, substitute, text_of};
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Map;
use std::collections::HashSet;

/// Most steps of a template, or loops in loops would take for ever.
const MOST_STEPS: u64 = 1_000_000;

/// A document: its fields.
pub type Fields = Map<String, serde_json::Value>;

/// The template engine, with what the harness's templates rely on: a name that is not there is an
/// error, line breaks at the end stay, Python's methods and words for values, `regex_replace`; and
/// `last_boxed`.
pub struct Engine(Environment<'static>);

impl Default for Engine {
    fn default() -> Self {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_unknown_method_callback(method);
        environment.set_formatter(write_python);
        environment.set_fuel(Some(MOST_STEPS));
        environment.add_filter("regex_replace", regex_replace);
        environment.add_filter("last_boxed", boxed);
        Self(environment)
    }
}

impl Engine {
    /// What `template` says of a document: the field of that name, the value of the expression if
    /// the template is nothing but one, or its text.
    ///
    /// # Errors
    /// What is wrong with the template, or which field is missing.
    pub fn value(&self, template: &str, doc: &Fields) -> Result<serde_json::Value, String> {
        match (doc.get(template), sole_expression(template)) {
            (Some(field), _) => Ok(field.clone()),
            (None, Some(expression)) => self.expression(expression, doc),
            (None, None) => self.text(template, doc).map(Into::into),
        }
    }

    /// The value of an expression.
    ///
    /// # Errors
    /// As [`Engine::value`].
    pub fn expression(&self, expression: &str, doc: &Fields) -> Result<serde_json::Value, String> {
        let fail = |e: Error| format!("`{expression}` cannot be computed: {}", said(&e));
        let compiled = self.0.compile_expression(expression).map_err(fail)?;
        let missing = |reason| lacking(compiled.undeclared_variables(false), doc).unwrap_or(reason);
        let value = compiled.eval(Serde(doc)).map_err(|e| missing(fail(e)))?;
        if value.is_undefined() {
            return Err(missing(format!(
                "`{expression}` names what the row does not have"
            )));
        }
        serde_json::to_value(&value).map_err(|e| format!("`{expression}` is no value: {e}"))
    }

    /// The text of a template.
    ///
    /// # Errors
    /// As [`Engine::value`].
    pub fn text(&self, template: &str, doc: &Fields) -> Result<String, String> {
        // The engine drops one line break at the end, as its model does by default.
        let kept = match template.ends_with('\n') {
            true => format!("{template}\n"),
            false => template.to_owned(),
        };
        let fail = |e: Error| format!("the template `{template}` fails: {}", said(&e));
        let compiled = self.0.template_from_str(&kept).map_err(fail)?;
        compiled.render(Serde(doc)).map_err(|e| match e.kind() {
            ErrorKind::OutOfFuel => fail(e),
            _ => {
                let names = compiled.undeclared_variables(false);
                lacking(names, doc).unwrap_or_else(|| fail(e))
            }
        })
    }
}

/// Which fields a template wants that are not there.
fn lacking(names: HashSet<String>, doc: &Fields) -> Option<String> {
    let mut names: Vec<String> = names
        .into_iter()
        .filter(|name| !doc.contains_key(name))
        .collect();
    names.sort();
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    (!names.is_empty()).then(|| format!("there is no field {}", names.join(", ")))
}

/// The message of an error with its cause, without the place in the template, which is short.
fn said(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// What stands between `{{` and `}}`, if the template is nothing else.
fn sole_expression(template: &str) -> Option<&str> {
    let inner = template.strip_prefix("{{")?.strip_suffix("}}")?;
    let is_one = !["{{", "}}", "{%", "{#"]
        .iter()
        .any(|mark| inner.contains(mark));
    is_one.then_some(inner)
}

/// Python's methods of lists and texts.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if (value.kind(), name) == (ValueKind::Seq, "index") {
        let wanted = args.first().ok_or(ErrorKind::MissingArgument)?;
        let place = value.try_iter()?.position(|item| item == *wanted);
        return place.map(Value::from).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidOperation,
                format!("`{wanted}` is not in the list"),
            )
        });
    }
    unknown_method_callback(state, value, name, args)
}

/// Writes values as Python does.
fn write_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Seq | ValueKind::Map => {
            let value = serde_json::to_value(value)
                .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
            out.write_str(&text_of(&value)).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// `re.sub`, under the name that it has in the harness.
fn regex_replace(text: String, pattern: String, replacement: String) -> Result<String, Error> {
    let fail = |message| Error::new(ErrorKind::InvalidOperation, message);
    let regex = regex(&pattern).map_err(fail)?;
    Ok(substitute(&regex, &replacement, &text)
        .map_err(fail)?
        .into_owned())
}

/// What the last `\boxed` of a text holds.
fn boxed(text: String) -> Result<String, Error> {
    let fail = || Error::new(ErrorKind::InvalidOperation, "the text has no `\\boxed{…}`");
    last_boxed(&text).map(str::to_owned).ok_or_else(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn doc() -> Fields {
        let doc = json!({
            "question": " Who? ", "label": "3", "flag": true,
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        });
        doc.as_object().unwrap().clone()
    }

    #[test]
    fn fields_expressions_and_texts() {
        let value = |template: &str| Engine::default().value(template, &doc()).unwrap();
        assert_eq!(value("question"), " Who? ");
        assert_eq!(value("{{choices.text}}"), json!(["a", "b"]));
        assert_eq!(value("{{choices.label.index('B')}}"), 1);
        assert_eq!(value("Q: {{question.strip()}}\nA:\n"), "Q: Who?\nA:\n");
        assert_eq!(value("{{flag}} {{choices.text}}"), "True ['a', 'b']");
        assert_eq!(
            value("{{question|regex_replace('W(h)o', '\\\\1')}}!"),
            " h? !"
        );
        assert_eq!(value("{{label}}{{label}}"), "33");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = |template: &str| Engine::default().value(template, &doc()).unwrap_err();
        let (begin, end) = ("{% for i in range(9999) %}", "{% endfor %}");
        let endless = format!("{}{}", begin.repeat(3), end.repeat(3));
        assert!(error(&endless).contains("fuel"), "{}", error(&endless));
        assert!(error("{{answer}}").contains("no field `answer`"));
        assert!(error("{{choices.answer}}").contains("choices.answer"));
        assert!(error("Q: {{answer}}").contains("no field `answer`"));
        assert!(error("{{choices.label.index('C')}}").contains("not in the list"));
        assert!(error("{{ choices.").contains("choices."));
    }
}
