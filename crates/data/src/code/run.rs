//! Evaluator of the toy language.

use super::syntax::{Condition, Expr, Statement, parse};

/// Statements and calls a program may execute before it is stopped.
const FUEL: usize = 10_000;
/// Depth of calls before a program is stopped.
const CALLS: usize = 32;

/// Runs `source` and returns what it printed, one line for each `print`, without
/// the last line break. `None` when it does not parse, uses an unknown name,
/// overflows, or does not come to an end soon.
pub fn run(source: &str) -> Option<String> {
    let printed = execute(&parse(source)?, None)?;
    let lines: Vec<String> = printed.iter().map(i64::to_string).collect();
    Some(lines.join("\n"))
}

/// Runs a program with `hole` in place of [`Expr::Hole`]; what it printed.
pub(super) fn execute(program: &[Statement], hole: Option<i64>) -> Option<Vec<i64>> {
    let mut machine = Machine {
        functions: Vec::new(),
        printed: Vec::new(),
        fuel: FUEL,
        hole,
    };
    let returned = machine.block(program, &mut Scope::default(), CALLS)?;
    returned.is_none().then_some(machine.printed)
}

struct Machine<'a> {
    functions: Vec<Function<'a>>,
    printed: Vec<i64>,
    fuel: usize,
    hole: Option<i64>,
}

#[derive(Clone, Copy)]
struct Function<'a> {
    name: &'a str,
    parameters: &'a [String],
    body: &'a [Statement],
}

/// Variables of one call. There are few, so a list is faster than a map.
#[derive(Default)]
struct Scope<'a>(Vec<(&'a str, i64)>);

impl<'a> Scope<'a> {
    fn get(&self, name: &str) -> Option<i64> {
        self.0
            .iter()
            .find(|entry| entry.0 == name)
            .map(|entry| entry.1)
    }

    fn insert(&mut self, name: &'a str, value: i64) {
        match self.0.iter_mut().find(|entry| entry.0 == name) {
            Some(entry) => entry.1 = value,
            None => self.0.push((name, value)),
        }
    }
}

impl<'a> Machine<'a> {
    fn spend(&mut self) -> Option<()> {
        self.fuel = self.fuel.checked_sub(1)?;
        Some(())
    }

    /// Runs statements; the inner value is that of `return`, if one was met.
    fn block(
        &mut self,
        block: &'a [Statement],
        scope: &mut Scope<'a>,
        calls: usize,
    ) -> Option<Option<i64>> {
        for statement in block {
            self.spend()?;
            let returned = match statement {
                Statement::Assign(name, value) => {
                    let value = self.value(value, scope, calls)?;
                    scope.insert(name, value);
                    None
                }
                Statement::Print(value) => {
                    let value = self.value(value, scope, calls)?;
                    self.printed.push(value);
                    None
                }
                Statement::Return(value) => Some(self.value(value, scope, calls)?),
                Statement::If(condition, then, otherwise) => {
                    let branch = if self.holds(condition, scope, calls)? {
                        then
                    } else {
                        otherwise
                    };
                    self.block(branch, scope, calls)?
                }
                Statement::For(name, count, body) => {
                    let count = self.value(count, scope, calls)?;
                    self.repeat(name, count, body, scope, calls)?
                }
                Statement::Define(name, parameters, body) => {
                    self.functions.push(Function {
                        name,
                        parameters,
                        body,
                    });
                    None
                }
            };
            if returned.is_some() {
                return Some(returned);
            }
        }
        Some(None)
    }

    fn repeat(
        &mut self,
        name: &'a str,
        count: i64,
        body: &'a [Statement],
        scope: &mut Scope<'a>,
        calls: usize,
    ) -> Option<Option<i64>> {
        for i in 0..count {
            self.spend()?;
            scope.insert(name, i);
            let returned = self.block(body, scope, calls)?;
            if returned.is_some() {
                return Some(returned);
            }
        }
        Some(None)
    }

    fn holds(
        &mut self,
        condition: &'a Condition,
        scope: &mut Scope<'a>,
        calls: usize,
    ) -> Option<bool> {
        let left = self.value(&condition.left, scope, calls)?;
        let right = self.value(&condition.right, scope, calls)?;
        match condition.operator.as_str() {
            "<" => Some(left < right),
            ">" => Some(left > right),
            "<=" => Some(left <= right),
            ">=" => Some(left >= right),
            "==" => Some(left == right),
            "!=" => Some(left != right),
            _ => None,
        }
    }

    fn value(&mut self, expr: &'a Expr, scope: &mut Scope<'a>, calls: usize) -> Option<i64> {
        match expr {
            Expr::Number(number) => Some(*number),
            Expr::Variable(name) => scope.get(name),
            Expr::Hole => self.hole,
            Expr::Binary(operator, left, right) => {
                let left = self.value(left, scope, calls)?;
                let right = self.value(right, scope, calls)?;
                match operator {
                    '+' => left.checked_add(right),
                    '-' => left.checked_sub(right),
                    '*' => left.checked_mul(right),
                    _ => None,
                }
            }
            Expr::Call(name, arguments) => {
                self.spend()?;
                // The latest definition of a name holds.
                let function = *self.functions.iter().rev().find(|f| f.name == name)?;
                (function.parameters.len() == arguments.len()).then_some(())?;
                let mut inner = Scope::default();
                for (parameter, argument) in function.parameters.iter().zip(arguments) {
                    let value = self.value(argument, scope, calls)?;
                    inner.insert(parameter, value);
                }
                self.block(function.body, &mut inner, calls.checked_sub(1)?)?
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn prints(source: &str, want: &str) {
        assert_eq!(run(source).as_deref(), Some(want), "{source}");
    }

    #[test]
    fn arithmetic_has_precedence() {
        prints("print(2 + 3 * 4 - 1)", "13");
        prints("print((2 + 3) * 4)", "20");
        prints("print(10 - 3 - 2)", "5");
        prints("x = -3\nprint(x + 5)", "2");
    }

    #[test]
    fn branches_loops_and_functions() {
        let branch = "x = 4\nif x > 3:\n    x = x + 1\nelse:\n    x = 0\nprint(x)";
        prints(branch, "5");
        prints(&branch.replace("> 3", "== 3"), "0");
        prints(
            "s = 0\nfor i in range(4):\n    s = s + i\nprint(s)\nprint(i)",
            "6\n3",
        );
        prints(
            "def f(a, b):\n    if a < b:\n        return b\n    return a\nprint(f(3, 9))",
            "9",
        );
    }

    #[test]
    fn bad_programs_print_nothing() {
        for source in [
            "",
            "print(x)",
            "print(1",
            "x = 1 +",
            "if 1 < 2:\nprint(1)",
            "  print(1)",
            "for = 3",
            "def f(x):\n    return f(x)\nprint(f(1))",
            "for i in range(99):\n    for j in range(999):\n        x = i\nprint(x)",
            "x = 99999999999 * 99999999999\nprint(x)",
            "return 3",
            "print(1) print(2)",
            "x = 1; print(x)",
        ] {
            assert_eq!(run(source), None, "{source}");
        }
        let deep = format!("print({}1{})", "(".repeat(5_000), ")".repeat(5_000));
        assert_eq!(run(&deep), None);
    }
}
