//! Points of a plane where up and to the left is better, with the front of those that no other beats. A
//! score of which less is better stands upside down.

use std::fmt::Write;

use minijinja::HtmlEscape;

use super::{Scale, extent, line, open, polyline, text};
use crate::results::lower_is_better;

/// Which scores are the better ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

impl Better {
    /// Of a metric.
    pub(crate) fn of(metric: &str) -> Self {
        match lower_is_better(metric) {
            true => Self::Less,
            false => Self::More,
        }
    }

    /// A number that rises as the score gets better.
    fn up(self, score: f64) -> f64 {
        match self {
            Self::More => score,
            Self::Less => -score,
        }
    }
}

/// What a [`scatter`] shows.
pub(crate) struct Axes<'a> {
    /// The costs.
    pub x: &'a str,
    /// The scores.
    pub y: &'a str,
    /// Which of them are better.
    pub better: Better,
}

/// A point of a [`scatter`].
pub(crate) struct Dot {
    /// How much it costs: less is better.
    pub x: f64,
    /// How good it is.
    pub y: f64,
    /// The lowest and the highest that its `y` was.
    pub range: (f64, f64),
    /// Its class in the page's style.
    pub class: String,
    /// A short text beside it.
    pub label: String,
    /// What the pointer shows.
    pub title: String,
}

/// The points that no other beats: each is better than all that cost as little or less, ascending.
pub(crate) fn front(points: &[(f64, f64)], better: Better) -> Vec<(f64, f64)> {
    let mut sorted = points.to_vec();
    let up = |point: &(f64, f64)| better.up(point.1);
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(up(b).total_cmp(&up(a))));
    let mut best = f64::NEG_INFINITY;
    sorted.retain(|point| {
        let beats = up(point) > best;
        best = best.max(up(point));
        beats
    });
    sorted
}

/// The dots with their ranges, the front as a stair, and a labelled line at `reference`, in a picture of
/// this `width`. `None` without dots.
pub(crate) fn scatter(
    describe: &str,
    width: f64,
    axes: &Axes<'_>,
    dots: &[Dot],
    reference: Option<(f64, &str)>,
) -> Option<String> {
    if dots.is_empty() {
        return None;
    }
    let (left, right, top, bottom) = (44.0, width - 12.0, 22.0, 348.0);
    let given = dots.iter().flat_map(|d| [d.y, d.range.0, d.range.1]);
    let (low, high) = extent(given.chain(reference.map(|r| r.0)));
    let room = ((high - low) * 0.08).max(0.01);
    let (worst, best) = match axes.better {
        Better::More => (bottom, top),
        Better::Less => (top, bottom),
    };
    let y = Scale::new((low - room, high + room), worst, best);
    let (first, last) = extent(dots.iter().map(|d| d.x));
    let room = ((last - first) * 0.08).max(0.01 * last);
    let x = Scale::new((first - room, last + room), left, right);
    let mut out = open(width, 386.0, width * 0.66, describe);
    let (ticks, digits) = y.ticks(5.0);
    for tick in ticks {
        line(&mut out, "rule", (left, y.at(tick)), (right, y.at(tick)));
        let label = format!("{tick:.digits$}");
        text(&mut out, left - 8.0, y.at(tick) + 3.5, "t end", label);
    }
    let (ticks, digits) = x.ticks(6.0);
    for tick in ticks {
        let label = format!("{tick:.digits$}");
        text(&mut out, x.at(tick), bottom + 16.0, "t mid", label);
    }
    line(&mut out, "axis", (left, bottom), (right, bottom));
    text(&mut out, left - 8.0, 12.0, "t strong", axes.y);
    let middle = (left + right) / 2.0;
    text(&mut out, middle, bottom + 34.0, "t mid strong", axes.x);
    if let Some((value, label)) = reference {
        line(&mut out, "mark", (left, y.at(value)), (right, y.at(value)));
        text(&mut out, left + 4.0, y.at(value) - 5.0, "t", label);
    }
    let points: Vec<_> = dots.iter().map(|d| (d.x, d.y)).collect();
    let mut stair: Vec<(f64, f64)> = Vec::new();
    for point in front(&points, axes.better) {
        stair.extend(stair.last().map(|before| (point.0, before.1)));
        stair.push(point);
    }
    polyline(&mut out, "front", &stair, x, y);
    for dot in dots {
        let (low, high) = (y.at(dot.range.0), y.at(dot.range.1));
        line(&mut out, "axis", (x.at(dot.x), low), (x.at(dot.x), high));
    }
    for dot in dots {
        let at = (x.at(dot.x), y.at(dot.y));
        let _ = writeln!(
            out,
            "<g><title>{}</title><circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\"/></g>",
            HtmlEscape(&dot.title),
            dot.class,
            at.0,
            at.1
        );
        text(&mut out, at.0 + 6.0, at.1 - 5.0, "t", &dot.label);
    }
    Some(out + "</svg>")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the front no point beats another, and off it each is beaten by one that is on it.
    #[test]
    fn the_front_is_what_nothing_beats() {
        let points: Vec<(f64, f64)> = (0..60)
            .map(|i| (f64::from(i * 7 % 13), f64::from(i * 11 % 17)))
            .collect();
        for better in [Better::More, Better::Less] {
            let best = front(&points, better);
            let beats = |a: &(f64, f64), b: &(f64, f64)| {
                a != b && a.0 <= b.0 && better.up(a.1) >= better.up(b.1)
            };
            for point in &points {
                let beaten = best.iter().any(|f| beats(f, point));
                assert_eq!(best.contains(point), !beaten, "{point:?}");
            }
        }
        assert!(front(&[], Better::More).is_empty());
    }

    #[test]
    fn one_point_is_drawn_and_none_is_no_picture() {
        let dot = Dot {
            x: 0.5,
            y: 0.25,
            range: (0.25, 0.25),
            class: "g0".to_owned(),
            label: "50%".to_owned(),
            title: "<a>".to_owned(),
        };
        let axes = |better| Axes {
            x: "x",
            y: "y",
            better,
        };
        assert!(scatter("points", 450.0, &axes(Better::More), &[], None).is_none());
        let dots = [dot];
        let draw = |better| scatter("points", 450.0, &axes(better), &dots, Some((0.5, "<b>")));
        for better in [Better::More, Better::Less] {
            let picture = draw(better).unwrap();
            assert!(picture.ends_with("</svg>"), "{picture}");
            for strange in ["NaN", "inf", "<a>", "<b>"] {
                assert!(!picture.contains(strange), "{picture}");
            }
        }
        // The dot lies below the reference line, and above it where less is better.
        let height = |better| {
            let picture = draw(better).unwrap();
            let after = picture.split_once(" cy=\"").unwrap().1;
            after.split_once('"').unwrap().0.parse::<f64>().unwrap()
        };
        assert!(height(Better::Less) + 100.0 < height(Better::More));
    }
}
