//! What every size is expected to cost, with the size that a plan chose.

use std::fmt::Write;

use lightmoe_compress::plan::PlanDamage;
use minijinja::HtmlEscape;

use super::{Scale, WIDTH, extent, line, open, polyline, text};

/// The expected damage, by powers of ten, over the share of the original's bytes. `None` where no size
/// costs anything.
pub(crate) fn damage(describe: &str, damage: &PlanDamage) -> Option<String> {
    let whole = damage.curve.last()?.bytes.max(1) as f64;
    let place = |bytes: u64, lost: f64| (lost > 0.0).then(|| (bytes as f64 / whole, lost.log10()));
    let points = damage.curve.iter();
    let points: Vec<_> = points.filter_map(|p| place(p.bytes, p.damage)).collect();
    let chosen = place(damage.bytes, damage.predicted);
    let (low, high) = extent(points.iter().chain(&chosen).map(|p| p.1));
    let (first, _) = *points.first()?;
    let (left, right, top, bottom) = (64.0, WIDTH - 12.0, 26.0, 246.0);
    let x = Scale::new((first, 1.0), left, right);
    let y = Scale::new(
        (low.floor(), high.ceil().max(low.floor() + 1.0)),
        bottom,
        top,
    );
    let mut out = open(WIDTH, 288.0, 520.0, describe);
    let decades = (y.high - y.low).max(1.0);
    let every = (decades / 6.0).ceil() as usize;
    for power in (y.low as i32..=y.high as i32).step_by(every) {
        let at = y.at(f64::from(power));
        line(&mut out, "rule", (left, at), (right, at));
        text(
            &mut out,
            left - 8.0,
            at + 3.5,
            "t end",
            format!("1e{power}"),
        );
    }
    for tick in x.ticks(8.0).0 {
        let label = format!("{:.0}%", 100.0 * tick);
        text(&mut out, x.at(tick), bottom + 18.0, "t mid", label);
    }
    line(&mut out, "axis", (left, bottom), (right, bottom));
    text(&mut out, left, 12.0, "t strong", damage.sensitivity.unit());
    let middle = (left + right) / 2.0;
    let name = "bytes of the original";
    text(&mut out, middle, bottom + 36.0, "t mid strong", name);
    polyline(&mut out, "front", &points, x, y);
    if let Some(at) = chosen {
        let (share, unit) = (100.0 * at.0, damage.sensitivity.unit());
        let title = format!("{share:.1}%: {:.2e} {unit}", damage.predicted);
        let _ = writeln!(
            out,
            "<g><title>{}</title><circle class=\"dot recovered\" cx=\"{:.1}\" cy=\"{:.1}\" \
             r=\"5\"/></g>",
            HtmlEscape(&title),
            x.at(at.0),
            y.at(at.1)
        );
    }
    Some(out + "</svg>")
}
