//! Training: from random weights ("pretrain") or of a built checkpoint ("recover").
//!
//! One loop serves both: AdamW with parameter groups, warm-up and decay, gradient clipping, the loss
//! on target tokens only, the annealing factor β of LightMoE (arXiv 2603.12645, §3.3), the pruning of
//! rows of factored bases, a loss curve as JSON lines and TensorBoard events, and checkpoints from which a killed run goes on to the same
//! bytes. Batches are a pure function of the step, so there is no other state.

mod curve;
mod error;
mod gradients;
mod objective;
mod prepare;
mod pruning;
mod schedule;
mod state;
mod teacher;
mod tensorboard;
mod trainer;

pub use curve::{Curve, Point};
pub use error::{Error, Result};
pub use objective::{Losses, TrainBatch, distance, load_balance, objective};
pub use prepare::{Recovery, finish_recovery, prepare_recovery, unfold_bases};
pub use pruning::RowPruning;
pub use schedule::{Annealing, AnnealingShape, Decay, LearningRate};
pub use teacher::{KeptPredictions, Predictions, Teacher};
pub use trainer::{Folders, Group, Outcome, TrainOptions, train};
