//! The loss curve on disk: JSON lines, and TensorBoard events beside them.

use crate::tensorboard::EventWriter;
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One step of the curve. It holds no times, so a resumed run writes the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Point {
    /// Step, counted from zero.
    pub step: usize,
    /// Mean cross entropy of the target tokens, nats.
    pub loss: f64,
    /// Load-balancing loss, where it is part of the objective.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub balance: Option<f64>,
    /// Distance to the teacher, where there is one, nats.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub distance: Option<f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Share of the original weights in replaced experts.
    pub beta: f64,
    /// L2 norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Tokens of the batch, padding included.
    pub tokens: usize,
}

/// An open loss curve.
pub struct Curve {
    path: PathBuf,
    lines: File,
    events: EventWriter<File>,
}

impl Curve {
    /// Opens `loss.jsonl` and an event file in `dir`; what an earlier run wrote from step `from` on
    /// is cut off, the rest kept.
    pub fn open(dir: &Path, from: usize) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let path = dir.join("loss.jsonl");
        let kept: String = match fs::read_to_string(&path) {
            Ok(text) => text
                .lines()
                .filter(|l| serde_json::from_str::<Point>(l).is_ok_and(|p| p.step < from))
                .flat_map(|l| [l, "\n"])
                .collect(),
            Err(_) => String::new(),
        };
        lightmoe_models::folder::write_file(&path, kept.as_bytes())?;
        let lines = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        // TensorBoard merges all event files of a folder; a resumed run adds one.
        let events_path = dir.join(format!("events.out.tfevents.{from:010}.lightmoe"));
        let events = File::create(&events_path)
            .and_then(EventWriter::new)
            .map_err(|e| Error::io(&events_path, e))?;
        Ok(Self {
            path,
            lines,
            events,
        })
    }

    /// Adds a step.
    pub fn push(&mut self, point: &Point) -> Result<()> {
        let line = serde_json::to_string(point)
            .map_err(|e| Error::Invalid(format!("a point of the loss curve is no JSON: {e}")))?;
        writeln!(self.lines, "{line}").map_err(|e| Error::io(&self.path, e))?;
        let mut scalars = vec![
            ("train/loss", point.loss),
            ("train/lr", point.lr),
            ("train/beta", point.beta),
            ("train/grad_norm", point.grad_norm),
        ];
        scalars.extend(point.balance.map(|b| ("train/balance", b)));
        self.events
            .scalars(point.step, &scalars)
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Reads a curve back.
    pub fn read(dir: &Path) -> Result<Vec<Point>> {
        let path = dir.join("loss.jsonl");
        let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        text.lines()
            .enumerate()
            .map(|(i, line)| {
                serde_json::from_str(line)
                    .map_err(|e| Error::state(&path, format!("line {}: {e}", i + 1)))
            })
            .collect()
    }
}
