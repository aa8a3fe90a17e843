//! Many compressions, each in processes of its own: what `compare` and `bench quality` run.
//!
//! A job is one call of `lightmoe compress` in its own run folder, so its seconds and its peak of
//! memory are its own, and what ends it ends no other. The stages that jobs on the same model, task
//! and seed have in common are done by the first of them; the run folders of the others begin with
//! these stages done. An interrupted job goes on where it stopped, as any run does.

use crate::machine::max_memory;
use crate::progress::{say, stopped};
use crate::recipe::Recipe;
use crate::results::{Results, Stage, TaskScores};
use crate::run::{Done, Inputs, Run};
use anyhow::{Context, Result, anyhow, bail};
use lightmoe_compress::observations::{Observations, moments_folder};
use lightmoe_compress::plan::Plan;
use lightmoe_compress::size::active_parameters;
use lightmoe_models::{Checkpoint, ModelConfig, folder};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The stages that depend on the model and the data alone.
const SHARED: [&str; 2] = ["observe", "evaluate_original"];
/// Between two looks at a process.
const PAUSE: Duration = Duration::from_millis(20);

/// One compression to run.
pub struct Job<C> {
    /// What the caller knows it by.
    pub cell: C,
    /// Its name, and that of its run folder.
    pub id: String,
    /// What to run.
    pub recipe: Recipe,
}

/// What is kept of a compression; its models are gone.
pub struct Finished {
    /// Its `results.json`.
    pub results: Results,
    /// The recovered model's scores on the validation split.
    pub validation: TaskScores,
    /// Parameters that work on one token of the result, on average.
    pub active: u64,
    /// Wall-clock seconds of its processes, without the stages that another job did.
    pub seconds: f64,
}

impl Finished {
    /// The recovered model's share of right answers on the test split, or its perplexity, with the name.
    fn headline(&self) -> String {
        let scores = self.results.scores(Stage::Recovered);
        let known = |metric: &str| Some(scores?.get(metric)?.value);
        let exact = || {
            format!(
                "exact match {:.3}",
                known("exact_match").unwrap_or(f64::NAN)
            )
        };
        known("perplexity").map_or_else(exact, |perplexity| format!("perplexity {perplexity:.2}"))
    }
}

/// How many jobs run at once, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Jobs at once.
    pub jobs: usize,
    /// Threads of each.
    pub threads: usize,
    /// Begin no new job after this many minutes.
    pub minutes: Option<f64>,
}

/// Runs jobs on one model.
pub struct Runner {
    config: ModelConfig,
    inputs: Inputs,
    work: PathBuf,
    lock: File,
    pace: Pace,
    begin: Instant,
    failures: Mutex<Vec<String>>,
}

impl Runner {
    /// Prepares to work in the folder `work` on the model and data of `inputs`.
    ///
    /// # Errors
    /// If the folder cannot be written, or other jobs are at work in it.
    pub fn open(original: &Checkpoint, inputs: Inputs, work: &Path, pace: Pace) -> Result<Self> {
        fs::create_dir_all(work).with_context(|| format!("cannot make `{}`", work.display()))?;
        let path = work.join(".lock");
        let lock = File::create(&path)
            .with_context(|| format!("cannot make the file `{}`", path.display()))?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => bail!(
                "another call is at work in `{}`; wait for it, or give another `--out`",
                work.display()
            ),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock `{}`", path.display()))
            }
            Ok(()) => Ok(Self {
                config: original.config().clone(),
                inputs,
                work: work.to_owned(),
                lock,
                pace,
                begin: Instant::now(),
                failures: Mutex::default(),
            }),
        }
    }

    /// Runs the jobs and hands each to `keep` when it is done. True if all were; a job that fails
    /// hinders no other, and [`Runner::finish`] tells of it.
    ///
    /// # Errors
    /// If a result cannot be kept.
    pub fn all<C: Sync + Send>(
        &self,
        jobs: Vec<Job<C>>,
        keep: &(dyn Fn(&Job<C>, Finished) -> Result<()> + Sync),
    ) -> Result<bool> {
        let mut seen = HashSet::new();
        let (mut first, mut rest) = (Vec::new(), Vec::new());
        for job in jobs {
            let shared = self.shared(&job.recipe)?.0;
            match !shared.exists() && seen.insert(shared) {
                true => first.push(job),
                false => rest.push(job),
            }
        }
        let total = first.len() + rest.len();
        Ok(
            self.at_once(&first, 0, total, keep)?
                & self.at_once(&rest, first.len(), total, keep)?,
        )
    }

    fn at_once<C: Sync>(
        &self,
        jobs: &[Job<C>],
        before: usize,
        total: usize,
        keep: &(dyn Fn(&Job<C>, Finished) -> Result<()> + Sync),
    ) -> Result<bool> {
        let next = AtomicUsize::new(0);
        let worker = || -> Result<bool> {
            let mut all = true;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(job) = jobs.get(number) else {
                    return Ok(all);
                };
                let minutes = self.begin.elapsed().as_secs_f64() / 60.0;
                if stopped() || self.pace.minutes.is_some_and(|most| minutes >= most) {
                    return Ok(false);
                }
                let place = format!("{:>4}/{total} {:<48}", before + number + 1, job.id);
                match self.job(job) {
                    Ok(finished) => {
                        let (score, seconds) = (finished.headline(), finished.seconds);
                        say(&format!("{place} {score}  {seconds:.0} s"));
                        keep(job, finished)?;
                    }
                    Err(_) if stopped() => return Ok(false),
                    Err(error) => {
                        say(&format!("{place} failed: {error:#}"));
                        self.failures()?.push(format!("`{}`: {error:#}", job.id));
                        all = false;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.pace.jobs.max(1))
                .map(|_| scope.spawn(worker))
                .collect();
            let mut all = true;
            for worker in workers {
                all &= worker.join().map_err(|_| anyhow!("a worker panicked"))??;
            }
            Ok(all)
        })
    }

    /// What to tell the user at the end, when `all` jobs are done or not.
    ///
    /// # Errors
    /// If jobs failed, or the user stopped them; what is finished was kept.
    pub fn finish(&self, all: bool) -> Result<&'static str> {
        if stopped() {
            bail!("interrupted; run the same command again to go on");
        }
        match &self.failures()?[..] {
            [] if all => Ok(""),
            [] => Ok("\nunfinished: run the same command again to go on"),
            [first, others @ ..] => bail!(
                "{first} ({} others failed too; what is finished is kept, and the same command \
                 tries the rest again)",
                others.len()
            ),
        }
    }

    fn failures(&self) -> Result<std::sync::MutexGuard<'_, Vec<String>>> {
        self.failures
            .lock()
            .map_err(|_| anyhow!("a worker panicked"))
    }

    fn job<C>(&self, job: &Job<C>) -> Result<Finished> {
        let begin = Instant::now();
        let dir = self.work.join(&job.id);
        self.adopt(&job.recipe, &dir)?;
        let (recipe, model) = (dir.join("recipe.toml"), dir.join("model"));
        let (log, scores) = (dir.join("stderr.log"), dir.join("validation.json"));
        let mut compress = self.command("compress", &recipe)?;
        compress.arg("--resume").arg("--out").arg(&dir);
        let outcome = self.wait(compress, &log);
        self.share(&job.recipe, &dir)?;
        outcome?;
        let mut evaluate = self.command("evaluate", &recipe)?;
        evaluate
            .args(["--split", "validation", "--model"])
            .arg(&model);
        evaluate.arg("--out").arg(&scores);
        self.wait(evaluate, &log)?;
        let seconds = begin.elapsed().as_secs_f64();
        let plan = Plan::load(&dir.join("plan.json"))?;
        let observations = Observations::load(&dir.join("observations.safetensors"))?;
        let finished = Finished {
            results: Results::load(&dir.join("results.json"))?,
            validation: serde_json::from_str(&fs::read_to_string(&scores)?)?,
            active: active_parameters(&self.config, &plan.layers, &observations),
            seconds,
        };
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove `{}`", dir.display()))?;
        Ok(finished)
    }

    /// Where the shared stages of a recipe are kept: their record and the observations.
    fn shared(&self, r: &Recipe) -> Result<(PathBuf, PathBuf)> {
        let name = crate::fingerprint(&(
            &self.inputs,
            (r.task, &r.train, r.seed, r.train_examples),
            (r.eval_examples, r.calibration_tokens, r.max_length),
            (&r.device, &r.dtype),
            (&r.calibrate, &r.also, &r.eval_text),
            // What is observed beside the rest, and of which model.
            (
                r.statistics(),
                r.method.is_sequential().then_some((r.method, r.amount())),
            ),
        ))?;
        let path = self.work.join("shared").join(name);
        Ok((
            path.with_extension("json"),
            path.with_extension("safetensors"),
        ))
    }

    fn run(&self, recipe: &Recipe, dir: &Path) -> Result<Run> {
        let begun = dir.join("recipe.toml").exists();
        Run::open(dir, recipe, self.inputs.clone(), begun)
    }

    /// Opens a run folder, with the shared stages done if another job did them.
    fn adopt(&self, recipe: &Recipe, dir: &Path) -> Result<()> {
        let mut run = self.run(recipe, dir)?;
        let (record, observations) = self.shared(recipe)?;
        if !record.exists() || run.stages().contains_key(SHARED[0]) {
            return Ok(());
        }
        let stages: BTreeMap<String, Done> = serde_json::from_str(&fs::read_to_string(&record)?)
            .with_context(|| format!("`{}` is damaged; remove it", record.display()))?;
        link_observations(&observations, &run.path("observations.safetensors"))?;
        stages
            .into_iter()
            .try_for_each(|(name, done)| run.adopt(&name, done))
    }

    /// Keeps the shared stages of a run for other jobs, if it came that far.
    fn share(&self, recipe: &Recipe, dir: &Path) -> Result<()> {
        let (record, observations) = self.shared(recipe)?;
        let run = self.run(recipe, dir)?;
        let stages = SHARED.map(|name| Some((name, run.stages().get(name)?)));
        let Some(stages) = stages.into_iter().collect::<Option<BTreeMap<_, _>>>() else {
            return Ok(());
        };
        if record.exists() {
            return Ok(());
        }
        fs::create_dir_all(self.work.join("shared"))?;
        link_observations(&run.path("observations.safetensors"), &observations)?;
        let text = serde_json::to_string_pretty(&stages)?;
        Ok(folder::write_file(&record, (text + "\n").as_bytes())?)
    }

    /// A call of this program.
    fn command(&self, sub: &str, recipe: &Path) -> Result<Command> {
        let program = std::env::current_exe().context("cannot tell where this program lies")?;
        let mut command = Command::new(program);
        let memory = max_memory() / self.pace.jobs.max(1) as u64;
        let arguments = [
            "--quiet",
            "--max-memory",
            &memory.to_string(),
            sub,
            "--recipe",
        ];
        command.args(arguments.map(OsStr::new)).arg(recipe);
        command.env("RAYON_NUM_THREADS", self.pace.threads.to_string());
        // The lock lasts as long as a process has it: one that outlives this one keeps the next
        // call out of its run folder.
        command.stdin(self.lock.try_clone()?).stdout(Stdio::null());
        Ok(command)
    }

    /// Runs `command` to its end, and ends it if the user stops us: the terminal tells our
    /// processes, `kill` does not.
    fn wait(&self, mut command: Command, log: &Path) -> Result<()> {
        let mut child = command
            .stderr(File::create(log)?)
            .spawn()
            .context("cannot start this program again")?;
        let mut told = false;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if stopped() && !told {
                told = true;
                // It may have ended meanwhile.
                let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            }
            std::thread::sleep(PAUSE);
        };
        if status.success() {
            return Ok(());
        }
        let text = fs::read_to_string(log)?;
        let message = text.lines().rev().find_map(|l| l.strip_prefix("error: "));
        bail!(message.map_or_else(|| format!("it ended with {status}"), str::to_owned))
    }
}

/// Observations under a second name, with their moments.
fn link_observations(from: &Path, to: &Path) -> Result<()> {
    let (source, target) = (moments_folder(from), moments_folder(to));
    if source.is_dir() {
        fs::create_dir_all(&target)
            .with_context(|| format!("cannot make `{}`", target.display()))?;
        for entry in fs::read_dir(&source)? {
            let entry = entry?;
            link(&entry.path(), &target.join(entry.file_name()))?;
        }
    }
    link(from, to)
}

/// A second name for a file that no one changes, or a copy where the file system has no such thing.
fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(_) => fs::copy(from, to).map(drop),
        done => done,
    }
    .with_context(|| format!("cannot write `{}`", to.display()))
}
