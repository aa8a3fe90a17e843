//! stub
use crate::cli::ScaleArgs;
/// stub
pub fn run(_args: ScaleArgs) -> anyhow::Result<String> {
    Ok(String::new())
}
