//! What the recovery went through, step by step.

use lightmoe_train::Point;

use super::svg::panels::{Line, Panel, panels};

/// Means that the strong line of the loss is drawn of.
const MEANS: usize = 60;

/// Loss, β where it is not 0 throughout, and the learning rate.
pub(super) fn picture(curve: &[Point]) -> Option<String> {
    let (first, last) = (curve.first()?, curve.last()?);
    let describe = format!(
        "Training loss from {:.3} at step {} to {:.3} at step {}; β from {} to {}; learning rate \
         at most {:.2e}",
        first.loss,
        first.step,
        last.loss,
        last.step,
        first.beta,
        last.beta,
        curve.iter().map(|p| p.lr).fold(0.0, f64::max)
    );
    let points = |value: fn(&Point) -> f64| -> Vec<_> {
        let points = curve.iter().map(|p| (p.step as f64, value(p)));
        points.filter(|p| p.1.is_finite()).collect()
    };
    let loss = points(|p| p.loss);
    // A training that never gave a number has nothing to show.
    loss.first()?;
    let mean = Line {
        most: MEANS,
        ..Line::new("loss", loss.clone())
    };
    let mut all = vec![Panel {
        name: "loss, nats",
        height: 220.0,
        from: None,
        lines: vec![Line::new("loss raw", loss), mean],
    }];
    if curve.iter().any(|p| p.beta != 0.0) {
        all.push(Panel {
            name: "β",
            height: 64.0,
            from: Some(0.0),
            lines: vec![Line::new("beta", points(|p| p.beta))],
        });
    }
    all.push(Panel {
        name: "learning rate",
        height: 64.0,
        from: Some(0.0),
        lines: vec![Line::new("rate", points(|p| p.lr))],
    });
    panels(&describe, "step", &all)
}
