//! Models from a Hub that speaks the protocol on the loopback address, and what can go wrong.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod faults;
mod fetching;
#[path = "../support/hub.rs"]
mod server;
mod world;
