//! The program.
use lightmoe::pretrain::{PretrainRecipe, pretrain};
fn main() -> anyhow::Result<()> {
    lightmoe::progress::catch_interrupts()?;
    let r = PretrainRecipe::load(std::path::Path::new("fixtures/olmoe-nano.toml"))?;
    let l = pretrain(&r)?;
    eprintln!("{l}");
    Ok(())
}
