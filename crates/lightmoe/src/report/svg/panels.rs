//! Lines over a common axis, one panel under the other.

use super::{Scale, WIDTH, extent, line, open, polyline, text, thin};

/// The most points that are drawn of a line.
const MOST: usize = 900;

/// One panel.
pub(in crate::report) struct Panel {
    /// What stands over it.
    pub name: &'static str,
    /// Height of its axis.
    pub height: f64,
    /// What the axis begins with; `None` for the lowest value.
    pub from: Option<f64>,
    /// Its lines: a class of the page's style, the points, and how many of their means are drawn.
    pub lines: Vec<Line>,
}

/// A line of a [`Panel`].
pub(in crate::report) struct Line {
    /// Its class in the page's style.
    pub class: &'static str,
    /// Its points, by `x`; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// At most so many points are drawn, each the mean of its share.
    pub most: usize,
}

impl Line {
    /// A line as it is, as far as it can be seen.
    pub(in crate::report) fn new(class: &'static str, points: Vec<(f64, f64)>) -> Self {
        Self {
            class,
            points,
            most: MOST,
        }
    }
}

/// The panels under each other, with `x_name` under the last. `None` without a finite point.
pub(in crate::report) fn panels(describe: &str, x_name: &str, panels: &[Panel]) -> Option<String> {
    let (left, right, gap) = (64.0, WIDTH - 12.0, 40.0);
    let finite = |line: &Line| -> Vec<(f64, f64)> {
        let finite = line.points.iter().filter(|p| p.1.is_finite());
        finite.copied().collect()
    };
    let all = panels.iter().flat_map(|p| &p.lines).flat_map(finite);
    let (first, last) = extent(all.map(|p| p.0));
    if first > last {
        return None;
    }
    let x = Scale::new((first, last), left, right);
    let height: f64 = panels.iter().map(|panel| panel.height + gap).sum();
    let mut out = open(WIDTH, height + 24.0, 640.0, describe);
    let mut bottom = 0.0;
    for panel in panels {
        let top = bottom + gap - 12.0;
        bottom += gap + panel.height - 12.0;
        let values = panel.lines.iter().flat_map(finite).map(|p| p.1);
        let (low, high) = extent(values);
        let room = (high - low) * 0.04;
        let low = panel.from.unwrap_or((low - room).max(0.0).min(low));
        let y = Scale::new((low, high + room), bottom, top);
        let (ticks, digits) = y.ticks((panel.height / 44.0).max(2.0));
        for tick in ticks {
            line(&mut out, "rule", (left, y.at(tick)), (right, y.at(tick)));
            let label = format!("{tick:.digits$}");
            text(&mut out, left - 8.0, y.at(tick) + 3.5, "t end", label);
        }
        text(&mut out, left, top - 10.0, "t strong", panel.name);
        line(&mut out, "axis", (left, bottom), (right, bottom));
        for line in &panel.lines {
            let points = thin(&finite(line), line.most);
            polyline(&mut out, line.class, &points, x, y);
        }
        bottom += 12.0;
    }
    let bottom = bottom - 12.0;
    for tick in x.ticks(8.0).0 {
        text(&mut out, x.at(tick), bottom + 18.0, "t mid", tick);
    }
    let middle = (left + right) / 2.0;
    text(&mut out, middle, bottom + 34.0, "t mid strong", x_name);
    Some(out + "</svg>")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(points: Vec<(f64, f64)>) -> Panel {
        Panel {
            name: "loss",
            height: 100.0,
            from: None,
            lines: vec![Line::new("loss", points)],
        }
    }

    #[test]
    fn what_is_not_finite_is_left_out() {
        let picture = |points| panels("<a>", "step", &[panel(points)]);
        assert!(picture(Vec::new()).is_none());
        assert!(picture(vec![(0.0, f64::NAN)]).is_none());
        let one = picture(vec![(0.0, 1.0), (1.0, f64::INFINITY)]).unwrap();
        assert!(one.ends_with("</svg>") && one.contains("polyline class=\"loss\""));
        for strange in ["NaN", "inf", "<a>"] {
            assert!(!one.contains(strange), "{one}");
        }
    }
}
