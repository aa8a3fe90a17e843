//! What recovery changed as a small file, and the way back.

use crate::cli::{ExportArgs, UnpackArgs};
use crate::compeft::search;
use crate::pipeline::mean_nll;
use crate::preflight::Refused;
use crate::progress::{Progress, stopped};
use crate::recipe::Recipe;
use crate::source::{TaskData, open_model};
use anyhow::{Context, Result};
use lightmoe_export::compeft::{Delta, FILE, Update, unpack};
use lightmoe_models::{Checkpoint, ModelTokenizer};
use std::path::Path;

/// `export --pack compeft`
///
/// # Errors
/// What packing and the search bring.
pub fn pack(args: ExportArgs) -> Result<String> {
    let folder = Path::new(&args.model);
    let run = folder.join("model").is_dir().then_some(folder);
    let start = match (&args.base, run) {
        (Some(base), _) => open_model(base)?,
        (None, Some(run)) => Checkpoint::open(&run.join("built"))?,
        (None, None) => {
            return Err(refused(format!(
                "`{}` is no folder of a run; say with `--base` what the model was before recovery",
                args.model
            )));
        }
    };
    let recovered = match run {
        Some(run) => Checkpoint::open(&run.join("model"))?,
        None => open_model(&args.model)?,
    };
    if args.out.is_file() {
        let out = args.out.display();
        return Err(refused(format!("`{out}` is a file; give a folder")));
    }
    let delta = || {
        let bar = Progress::new("pack", 0);
        Delta::between(&start, &recovered, &mut |done, all| bar.of(done, all))
    };
    let (update, scores) = match (args.density.zip(args.alpha), run) {
        (Some((density, alpha)), _) => {
            let update = delta()?.pack(density, alpha, &mut |_, _| !stopped())?;
            (update, String::new())
        }
        (None, Some(run)) => {
            let recipe = Recipe::load(&run.join("recipe.toml"))?;
            searched(&recipe, (&start, &recovered), &delta()?)?
        }
        (None, None) => {
            return Err(refused(format!(
                "`{}` is no folder of a run, whose validation examples a search needs; give \
                 `--density` and `--alpha`",
                args.model
            )));
        }
    };
    let path = args.out.join(FILE);
    update.save(&path)?;
    let bytes = std::fs::metadata(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))?
        .len();
    Ok(format!(
        "update  {}\n{}{scores}",
        path.display(),
        described(&update, bytes)
    ))
}

fn refused(message: String) -> anyhow::Error {
    Refused(message).into()
}

/// The best update of the grid, and what it costs, in words.
fn searched(
    recipe: &Recipe,
    (start, recovered): (&Checkpoint, &Checkpoint),
    delta: &Delta<'_>,
) -> Result<(Update, String)> {
    let tokenizer = ModelTokenizer::load(start.dir(), start.config().eos_token_id)?;
    let data = TaskData::load(recipe, &tokenizer)?;
    let score = |checkpoint: &Checkpoint| mean_nll(checkpoint, &data.validation, recipe.max_length);
    let (before, after) = (score(start)?, score(recovered)?);
    let (update, packed) = search(delta, &score)?;
    let text = format!(
        "\nNLL on {} validation examples of {}: {before:.4} built, {after:.4} recovered, \
         {packed:.4} packed",
        data.validation.len(),
        data.name
    );
    Ok((update, text))
}

fn described(update: &Update, bytes: u64) -> String {
    let header = update.header();
    let n = header.n as f64;
    format!(
        "density {}, alpha {}: {} of {} changed numbers kept\n\
         {bytes} bytes, {:.3} bits a number, {:.1} times less than in 16 bits",
        header.density,
        header.alpha,
        header.kept,
        header.n,
        8.0 * bytes as f64 / n,
        2.0 * n / bytes as f64
    )
}

/// `unpack`
///
/// # Errors
/// If the update is damaged or of another base, or the folder cannot be written.
pub fn run_unpack(args: UnpackArgs) -> Result<String> {
    let update = Update::load(&args.update)?;
    let base = open_model(&args.base)?;
    let bar = Progress::new("unpack", base.config().num_layers);
    unpack(base, &update, &args.out, &mut |done, all| bar.of(done, all))?;
    Ok(format!("model  {}", args.out.display()))
}
