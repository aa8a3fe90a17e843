//! The pictures of the report: plain SVG, coloured by the classes that the page's style defines, so
//! that they follow its light and dark mode.

pub(crate) mod damage;
pub(super) mod panels;
pub(crate) mod scatter;

use std::fmt::{Display, Write};

use minijinja::HtmlEscape;

/// Width of a full-width picture, in its own units.
pub(crate) const WIDTH: f64 = 920.0;
/// Width of one that has another beside it.
pub(crate) const HALF: f64 = 450.0;

/// A square of a [`grid`].
pub(super) struct Cell {
    /// Its class in the page's style.
    pub class: String,
    /// Opacity of its fill.
    pub opacity: f64,
    /// A short text inside.
    pub text: String,
    /// What is drawn over it.
    pub mark: Mark,
    /// What the pointer shows.
    pub title: String,
}

/// What is drawn over a square of a [`grid`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// Nothing.
    None,
    /// A stroke from corner to corner.
    Stroke,
    /// Two of them.
    Cross,
}

/// A row of a [`grid`].
pub(super) struct Row {
    /// Its label.
    pub label: String,
    /// Its squares.
    pub cells: Vec<Cell>,
}

/// Opens a picture; `describe` is what a screen reader says.
fn open(width: f64, height: f64, least: f64, describe: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         style=\"min-width:{least:.0}px\" role=\"img\" aria-label=\"{}\">\n",
        HtmlEscape(describe)
    )
}

fn text(out: &mut String, x: f64, y: f64, class: &str, content: impl Display) {
    let content = content.to_string();
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>",
        HtmlEscape(&content)
    );
}

fn line(out: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        out,
        "<path class=\"{class}\" d=\"M{:.1} {:.1}L{:.1} {:.1}\"/>",
        from.0, from.1, to.0, to.1
    );
}

/// Rows of squares, one column per expert.
pub(super) fn grid(describe: &str, rows: &[Row]) -> String {
    let columns = rows.iter().map(|r| r.cells.len()).max().unwrap_or(0).max(1);
    let (left, top, gap) = (34.0, 18.0, 2.0);
    let pitch = ((WIDTH - left) / columns as f64).clamp(12.0, 30.0);
    let (width, height) = (
        left + pitch * columns as f64,
        top + pitch * rows.len() as f64,
    );
    // Numbers inside stay legible; a narrow window scrolls.
    let least = (left + 18.0 * columns as f64).min(width);
    let mut out = open(width, height, least, describe);
    let every = if columns > 40 { 8 } else { 4 };
    for column in (0..columns).step_by(every) {
        let x = left + pitch * (column as f64 + 0.5) - gap / 2.0;
        text(&mut out, x, 11.0, "t mid", column);
    }
    for (row, y) in rows.iter().zip(0..) {
        let y = top + pitch * f64::from(y);
        let middle = y + (pitch - gap) / 2.0;
        text(&mut out, left - 8.0, middle + 3.5, "t end", &row.label);
        for (cell, x) in row.cells.iter().zip(0..) {
            let x = left + pitch * f64::from(x);
            let side = pitch - gap;
            let _ = write!(
                out,
                "<g><title>{}</title><rect class=\"{}\" x=\"{x:.1}\" y=\"{y:.1}\" \
                 width=\"{side:.1}\" height=\"{side:.1}\" rx=\"2\"",
                HtmlEscape(&cell.title),
                cell.class
            );
            if cell.opacity < 1.0 {
                let _ = write!(out, " fill-opacity=\"{:.3}\"", cell.opacity);
            }
            out += "/>";
            let (a, b) = (side * 0.28, side * 0.72);
            let strokes: &[[f64; 4]] = match cell.mark {
                Mark::None => &[],
                Mark::Stroke => &[[a, b, b, a]],
                Mark::Cross => &[[a, b, b, a], [a, a, b, b]],
            };
            for [x1, y1, x2, y2] in strokes {
                line(&mut out, "cross", (x + x1, y + y1), (x + x2, y + y2));
            }
            if !cell.text.is_empty() {
                let class = if pitch < 15.0 { "in small" } else { "in" };
                text(&mut out, x + side / 2.0, middle + 3.5, class, &cell.text);
            }
            out += "</g>\n";
        }
    }
    out + "</svg>"
}

/// A scale from numbers to places.
#[derive(Clone, Copy)]
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn new((low, high): (f64, f64), from: f64, to: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Self {
            low,
            high,
            from,
            to,
        }
    }

    fn at(self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// About `count` round numbers, with the digits that tell them apart.
    fn ticks(self, count: f64) -> (Vec<f64>, usize) {
        let rough = (self.high - self.low) / count;
        let unit = 10f64.powf(rough.log10().floor());
        let factors = [1.0, 2.0, 5.0, 10.0];
        let factor = factors.into_iter().find(|f| f * unit >= rough * 0.999);
        let step = factor.unwrap_or(10.0) * unit;
        let digits = (-step.log10().floor()).max(0.0) as usize;
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        let ticks = (first..=last).map(|i| i as f64 * step).collect();
        (ticks, digits)
    }
}

fn extent(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    let finite = values.into_iter().filter(|v| v.is_finite());
    finite.fold(start, |(low, high), v| (low.min(v), high.max(v)))
}

/// At most `most` points, each the mean of its share of the curve.
fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let share = points.len().div_ceil(most).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        let sum = chunk.iter().fold((0.0, 0.0), |a, p| (a.0 + p.0, a.1 + p.1));
        (sum.0 / n, sum.1 / n)
    };
    points.chunks(share).map(mean).collect()
}

fn polyline(out: &mut String, class: &str, points: &[(f64, f64)], x: Scale, y: Scale) {
    let _ = write!(out, "<polyline class=\"{class}\" points=\"");
    for point in points {
        let _ = write!(out, "{:.1},{:.1} ", x.at(point.0), y.at(point.1));
    }
    out.truncate(out.trim_end().len());
    *out += "\"/>\n";
}

/// One bar per layer, from zero, with a labelled line at `reference`.
pub(super) fn bars(
    describe: &str,
    values: &[(usize, Option<f64>)],
    reference: Option<(f64, &str)>,
) -> String {
    let (width, left, top, bottom) = (HALF, 50.0, 22.0, 170.0);
    let given = values.iter().filter_map(|v| v.1);
    let (_, high) = extent(given.chain(reference.map(|r| r.0)).chain([0.0]));
    let y = Scale::new((0.0, high * 1.06), bottom, top);
    let mut out = open(width, 206.0, 300.0, describe);
    let (ticks, digits) = y.ticks(5.0);
    for tick in ticks {
        line(&mut out, "rule", (left, y.at(tick)), (width, y.at(tick)));
        let label = format!("{tick:.digits$}");
        text(&mut out, left - 8.0, y.at(tick) + 3.5, "t end", label);
    }
    let pitch = (width - left) / values.len().max(1) as f64;
    let bar = (pitch * 0.62).min(40.0);
    for (i, (layer, value)) in values.iter().enumerate() {
        let x = left + pitch * (i as f64 + 0.5);
        if i % values.len().div_ceil(16) == 0 {
            text(&mut out, x, bottom + 16.0, "t mid", layer);
        }
        let Some(value) = value.filter(|v| v.is_finite()) else {
            continue;
        };
        let _ = writeln!(
            out,
            "<g><title>Layer {layer}: {value:.4}</title><rect class=\"bar\" x=\"{:.1}\" \
             y=\"{:.1}\" width=\"{bar:.1}\" height=\"{:.1}\" rx=\"1.5\"/></g>",
            x - bar / 2.0,
            y.at(value),
            bottom - y.at(value)
        );
    }
    line(&mut out, "axis", (left, bottom), (width, bottom));
    let middle = (left + width) / 2.0;
    text(&mut out, middle, bottom + 32.0, "t mid strong", "layer");
    if let Some((value, label)) = reference {
        line(&mut out, "mark", (left, y.at(value)), (width, y.at(value)));
        text(&mut out, width, 12.0, "t end strong", label);
    }
    out + "</svg>"
}

/// A score with its standard error, in a [`whiskers`] picture.
pub(super) struct Whisker {
    /// What was scored.
    pub label: &'static str,
    /// The score.
    pub value: f64,
    /// Its standard error.
    pub stderr: f64,
    /// The score in words.
    pub text: String,
}

/// Scores of one metric under each other, with two standard errors to both sides.
pub(super) fn whiskers(describe: &str, scores: &[Whisker]) -> String {
    let (width, left, right, top, pitch) = (HALF, 74.0, 330.0, 8.0, 26.0);
    let ends = scores
        .iter()
        .flat_map(|s| [s.value - 2.0 * s.stderr, s.value + 2.0 * s.stderr]);
    let (low, high) = extent(ends);
    let room = (high - low) * 0.06;
    let x = Scale::new((low - room, high + room), left, right);
    let bottom = top + pitch * scores.len() as f64;
    let mut out = open(width, bottom + 22.0, 300.0, describe);
    let (ticks, digits) = x.ticks(6.0);
    for tick in ticks {
        line(&mut out, "rule", (x.at(tick), top), (x.at(tick), bottom));
        let label = format!("{tick:.digits$}");
        text(&mut out, x.at(tick), bottom + 14.0, "t mid", label);
    }
    for (i, score) in scores.iter().enumerate() {
        let y = top + pitch * (i as f64 + 0.5);
        let two = 2.0 * score.stderr;
        let (from, to) = (x.at(score.value - two), x.at(score.value + two));
        text(&mut out, left - 10.0, y + 4.0, "t end", score.label);
        line(
            &mut out,
            &format!("whisker {}", score.label),
            (from, y),
            (to, y),
        );
        let _ = writeln!(
            out,
            "<circle class=\"dot {}\" cx=\"{:.1}\" cy=\"{y:.1}\" r=\"5\"/>",
            score.label,
            x.at(score.value)
        );
        text(&mut out, width, y + 4.0, "t end num", &score.text);
    }
    out + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let (ticks, digits) = Scale::new((0.13, 2.9), 0.0, 1.0).ticks(5.0);
        assert_eq!((ticks, digits), (vec![1.0, 2.0], 0));
        let (ticks, digits) = Scale::new((0.0, 0.05), 0.0, 1.0).ticks(5.0);
        assert_eq!((ticks.len(), digits), (6, 2));
        let constant = Scale::new((3.0, 3.0), 0.0, 1.0);
        assert!(constant.at(3.0).is_finite());
    }

    #[test]
    fn thinning_keeps_short_curves_and_averages_long_ones() {
        let points: Vec<_> = (0..10).map(|i| (f64::from(i), 1.0)).collect();
        assert_eq!(thin(&points, 10), points);
        let thinned = thin(&points, 5);
        assert_eq!(thinned.len(), 5);
        assert_eq!(thinned[0], (0.5, 1.0));
    }

    #[test]
    fn texts_are_escaped() {
        let mut out = String::new();
        text(&mut out, 0.0, 0.0, "t", "<b>&");
        assert!(out.contains("&lt;b&gt;&amp;"), "{out}");
    }
}
