//! Syntax of the toy language: a line-and-indentation reader over a small lexer.
//!
//! ```text
//! statement := NAME "=" expr | "print" "(" expr ")" | "return" expr
//!            | "if" expr CMP expr ":" block ["else" ":" block]
//!            | "for" NAME "in" "range" "(" expr ")" ":" block
//!            | "def" NAME "(" [NAME {"," NAME}] ")" ":" block
//! expr      := term {("+" | "-") term}      term := factor {"*" factor}
//! factor    := NUMBER | NAME | NAME "(" [expr {"," expr}] ")" | "(" expr ")" | "-" factor
//! ```

use super::HOLE;

/// An arithmetic expression.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Expr {
    Number(i64),
    Variable(String),
    /// A number left out.
    Hole,
    Call(String, Vec<Expr>),
    Binary(char, Box<Expr>, Box<Expr>),
}

/// A statement.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Statement {
    Assign(String, Expr),
    Print(Expr),
    Return(Expr),
    If(Condition, Vec<Statement>, Vec<Statement>),
    For(String, Expr, Vec<Statement>),
    Define(String, Vec<String>, Vec<Statement>),
}

/// A comparison.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Condition {
    pub(super) left: Expr,
    pub(super) operator: String,
    pub(super) right: Expr,
}

const COMPARISONS: [&str; 6] = ["<=", ">=", "==", "!=", "<", ">"];
/// Nesting of parentheses and blocks beyond which a program is refused.
const DEPTH: usize = 16;

/// Parses a program; `None` when it is not one.
pub(super) fn parse(source: &str) -> Option<Vec<Statement>> {
    let lines: Vec<(usize, Vec<&str>)> = source
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let indent = line.len() - line.trim_start_matches(' ').len();
            lex(line.trim_matches(' ')).map(|tokens| (indent, tokens))
        })
        .collect::<Option<_>>()?;
    let mut reader = Lines {
        lines: &lines,
        at: 0,
    };
    let program = reader.block(0, DEPTH)?;
    (reader.at == lines.len()).then_some(program)
}

fn lex(line: &str) -> Option<Vec<&str>> {
    let mut tokens = Vec::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let word = |keep: fn(char) -> bool| rest.find(|c| !keep(c)).unwrap_or(rest.len());
        let length = if first.is_ascii_digit() {
            word(|c| c.is_ascii_digit())
        } else if first.is_ascii_lowercase() {
            word(|c| c.is_ascii_lowercase())
        } else if rest.starts_with(HOLE) {
            HOLE.len()
        } else if COMPARISONS[..4].iter().any(|op| rest.starts_with(op)) {
            2
        } else if "=+-*()<>:,".contains(first) {
            1
        } else {
            return None;
        };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start_matches(' ');
    }
    Some(tokens)
}

struct Lines<'a> {
    lines: &'a [(usize, Vec<&'a str>)],
    at: usize,
}

impl<'a> Lines<'a> {
    /// Statements at exactly `indent`.
    fn block(&mut self, indent: usize, depth: usize) -> Option<Vec<Statement>> {
        let mut block = Vec::new();
        while let Some((found, tokens)) = self.lines.get(self.at) {
            if *found < indent {
                break;
            }
            if *found > indent {
                return None;
            }
            self.at += 1;
            block.push(self.statement(indent, tokens, depth)?);
        }
        (!block.is_empty()).then_some(block)
    }

    /// The block below a header line at `indent`.
    fn body(&mut self, indent: usize, depth: usize) -> Option<Vec<Statement>> {
        let deeper = self.lines.get(self.at)?.0;
        (deeper > indent).then_some(())?;
        self.block(deeper, depth.checked_sub(1)?)
    }

    fn statement(
        &mut self,
        indent: usize,
        tokens: &'a [&'a str],
        depth: usize,
    ) -> Option<Statement> {
        let mut line = Line { tokens, at: 0 };
        let head = line.next()?;
        let statement = match head {
            "print" => {
                line.expect("(")?;
                let value = line.expr(DEPTH)?;
                line.expect(")")?;
                Statement::Print(value)
            }
            "return" => Statement::Return(line.expr(DEPTH)?),
            "if" => {
                let left = line.expr(DEPTH)?;
                let operator = line.next().filter(|op| COMPARISONS.contains(op))?.into();
                let right = line.expr(DEPTH)?;
                line.end_of_header()?;
                let then = self.body(indent, depth)?;
                let otherwise = match self.lines.get(self.at) {
                    Some((found, tokens)) if *found == indent && tokens == &["else", ":"] => {
                        self.at += 1;
                        self.body(indent, depth)?
                    }
                    _ => Vec::new(),
                };
                let condition = Condition {
                    left,
                    operator,
                    right,
                };
                return Some(Statement::If(condition, then, otherwise));
            }
            "for" => {
                let name = line.name()?;
                for part in ["in", "range", "("] {
                    line.expect(part)?;
                }
                let count = line.expr(DEPTH)?;
                line.expect(")")?;
                line.end_of_header()?;
                return Some(Statement::For(name, count, self.body(indent, depth)?));
            }
            "def" => {
                let name = line.name()?;
                let parameters = line.list(Line::name)?;
                line.end_of_header()?;
                return Some(Statement::Define(
                    name,
                    parameters,
                    self.body(indent, depth)?,
                ));
            }
            _ => {
                line.at = 0;
                let name = line.name()?;
                line.expect("=")?;
                Statement::Assign(name, line.expr(DEPTH)?)
            }
        };
        line.end()?;
        Some(statement)
    }
}

/// A cursor over one line's tokens.
struct Line<'a> {
    tokens: &'a [&'a str],
    at: usize,
}

impl<'a> Line<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.tokens.get(self.at).copied()
    }

    fn next(&mut self) -> Option<&'a str> {
        let token = self.peek()?;
        self.at += 1;
        Some(token)
    }

    fn expect(&mut self, token: &str) -> Option<()> {
        (self.next()? == token).then_some(())
    }

    fn end(&self) -> Option<()> {
        (self.at == self.tokens.len()).then_some(())
    }

    fn end_of_header(&mut self) -> Option<()> {
        self.expect(":")?;
        self.end()
    }

    fn name(&mut self) -> Option<String> {
        const KEYWORDS: [&str; 8] = ["print", "return", "if", "else", "for", "in", "range", "def"];
        self.next()
            .filter(|token| token.starts_with(|c: char| c.is_ascii_lowercase()))
            .filter(|token| !KEYWORDS.contains(token))
            .map(String::from)
    }

    /// `"(" [item {"," item}] ")"`.
    fn list<T>(&mut self, item: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.expect("(")?;
        let mut items = Vec::new();
        if self.peek()? == ")" {
            self.at += 1;
            return Some(items);
        }
        loop {
            items.push(item(self)?);
            match self.next()? {
                "," => {}
                ")" => return Some(items),
                _ => return None,
            }
        }
    }

    fn expr(&mut self, depth: usize) -> Option<Expr> {
        self.operators(&["+", "-"], depth, |line, depth| {
            line.operators(&["*"], depth, Self::factor)
        })
    }

    /// Left-associative operators over `operand`.
    fn operators(
        &mut self,
        operators: &[&str],
        depth: usize,
        operand: impl Fn(&mut Self, usize) -> Option<Expr>,
    ) -> Option<Expr> {
        let mut left = operand(self, depth)?;
        while let Some(operator) = self.peek().filter(|token| operators.contains(token)) {
            self.at += 1;
            let right = operand(self, depth)?;
            left = Expr::Binary(operator.chars().next()?, Box::new(left), Box::new(right));
        }
        Some(left)
    }

    fn factor(&mut self, depth: usize) -> Option<Expr> {
        let depth = depth.checked_sub(1)?;
        match self.peek()? {
            "(" => {
                self.at += 1;
                let inner = self.expr(depth)?;
                self.expect(")")?;
                Some(inner)
            }
            "-" => {
                self.at += 1;
                let operand = self.factor(depth)?;
                Some(Expr::Binary(
                    '-',
                    Box::new(Expr::Number(0)),
                    Box::new(operand),
                ))
            }
            HOLE => {
                self.at += 1;
                Some(Expr::Hole)
            }
            token if token.starts_with(|c: char| c.is_ascii_digit()) => {
                self.at += 1;
                token.parse().ok().map(Expr::Number)
            }
            _ => {
                let name = self.name()?;
                if self.peek() == Some("(") {
                    let arguments = self.list(|line| line.expr(depth))?;
                    return Some(Expr::Call(name, arguments));
                }
                Some(Expr::Variable(name))
            }
        }
    }
}
