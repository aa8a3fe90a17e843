//! All tasks and groups that can be asked for: those that come with the program, and those of files.

use super::builtin::FILES;
use super::check::check_task;
use super::config::TaskConfig;
use super::group::{GroupConfig, Member};
use crate::{Error, Result};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// A file may include one that includes one, and so on, so often.
const DEPTH: usize = 8;

/// What a caller wants of every task; what is wrong, with the key, and what to do.
pub type Check = fn(&TaskConfig) -> std::result::Result<(), String>;

/// What can be asked for.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    tasks: Vec<TaskConfig>,
    groups: Vec<GroupConfig>,
    check: Option<Check>,
}

/// What was asked for: a task, or a group with what is in it.
#[derive(Debug, Clone, PartialEq)]
pub enum Benchmark {
    /// One task.
    Task(Box<TaskConfig>),
    /// Several.
    Group(GroupConfig, Vec<Benchmark>),
}

impl Benchmark {
    /// The name of the task or group.
    pub fn name(&self) -> &str {
        match self {
            Self::Task(task) => task.name(),
            Self::Group(group, _) => &group.group,
        }
    }

    /// The tasks, in their order.
    pub fn tasks(&self) -> Vec<&TaskConfig> {
        match self {
            Self::Task(task) => vec![task],
            Self::Group(_, members) => members.iter().flat_map(Self::tasks).collect(),
        }
    }
}

/// A file of tasks as text: one that comes with the program, or one of the user's.
struct Source {
    /// For messages.
    file: String,
    text: String,
    /// Where files that it includes lie; none for those that come with the program.
    folder: Option<PathBuf>,
}

impl Source {
    fn built_in(name: &str) -> Option<Self> {
        let (file, text) = FILES.iter().find(|(file, _)| *file == name)?;
        Some(Self {
            file: (*file).to_owned(),
            text: (*text).to_owned(),
            folder: None,
        })
    }

    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            file: path.display().to_string(),
            text,
            folder: Some(path.parent().unwrap_or(Path::new("")).to_owned()),
        })
    }

    /// The file that this one includes: beside it, or one that comes with the program.
    fn included(&self, name: &str) -> Result<Self> {
        let beside = self.folder.as_ref().map(|folder| folder.join(name));
        match beside.filter(|path| path.is_file()) {
            Some(path) => Self::read(&path),
            None => Self::built_in(name).ok_or_else(|| {
                self.problem(format!(
                    "it includes `{name}`, which is not beside it; check the name"
                ))
            }),
        }
    }

    fn problem(&self, problem: impl Into<String>) -> Error {
        Error::TaskFile {
            file: self.file.clone(),
            problem: problem.into(),
        }
    }

    fn parse<'de, T: Deserialize<'de>>(&'de self) -> Result<T> {
        serde_saphyr::from_str(&self.text).map_err(|e| {
            let e = e.without_snippet();
            self.problem(format!("{e}; see docs/tasks.md for the keys"))
        })
    }

    /// The keys of a task, laid over those of what it includes.
    fn keys(&self, own: TaskConfig, depth: usize) -> Result<Map<String, Value>> {
        let include = own.include.clone();
        let mut keys = match include {
            None => Map::new(),
            Some(_) if depth == 0 => {
                return Err(self.problem("files include each other in a circle; break it"));
            }
            Some(name) => {
                let source = self.included(&name)?;
                source.keys(source.parse()?, depth - 1)?
            }
        };
        let mut own = own.to_map().map_err(|e| self.problem(e.to_string()))?;
        own.remove("include");
        keys.extend(own);
        Ok(keys)
    }

    fn task(&self, own: TaskConfig) -> Result<TaskConfig> {
        let keys = self.keys(own, DEPTH)?;
        let task = from_map(keys).map_err(|e| self.problem(e))?;
        check_task(&task).map_err(|problem| self.problem(problem))?;
        Ok(task)
    }
}

fn from_map(keys: Map<String, Value>) -> std::result::Result<TaskConfig, String> {
    serde_json::from_value(Value::Object(keys)).map_err(|e| e.to_string())
}

impl Catalogue {
    /// What comes with the program.
    ///
    /// # Errors
    /// None in practice: a test reads all of it.
    pub fn built_in() -> Result<Self> {
        let mut catalogue = Self::default();
        for (file, _) in FILES
            .iter()
            .filter(|(file, _)| !is_template(Path::new(file)))
        {
            if let Some(source) = Source::built_in(file) {
                catalogue.add(&source)?;
            }
        }
        Ok(catalogue)
    }

    /// The same, with a check of the tasks of files that are asked for.
    pub fn checking(self, check: Check) -> Self {
        Self {
            check: Some(check),
            ..self
        }
    }

    /// The tasks, by name.
    pub fn tasks(&self) -> &[TaskConfig] {
        &self.tasks
    }

    /// The groups, by name.
    pub fn groups(&self) -> &[GroupConfig] {
        &self.groups
    }

    /// What `names` ask for: names of tasks, groups and tags, and paths of files and folders, whose
    /// tasks are all asked for and can be named in groups.
    ///
    /// # Errors
    /// [`Error::UnknownBenchmark`], and [`Error::TaskFile`] for a file that cannot be understood.
    pub fn select(&self, names: &[String]) -> Result<Vec<Benchmark>> {
        let mut all = self.clone();
        let mut wanted = Vec::new();
        for name in names {
            let path = Path::new(name);
            if path.is_dir() || is_yaml(path) {
                wanted.extend(all.add_path(path)?);
            } else {
                wanted.push(name.clone());
            }
        }
        let mut selected: Vec<Benchmark> = Vec::new();
        for name in &wanted {
            for benchmark in all.named(name, DEPTH)? {
                if !selected
                    .iter()
                    .any(|other| other.name() == benchmark.name())
                {
                    selected.push(benchmark);
                }
            }
        }
        Ok(selected)
    }

    /// Adds the files at a path; the names of what is in them and in none of their groups.
    fn add_path(&mut self, path: &Path) -> Result<Vec<String>> {
        let mut paths = vec![path.to_owned()];
        if path.is_dir() {
            let read = |source| Error::Read {
                path: path.into(),
                source,
            };
            let entries = fs::read_dir(path).map_err(read)?;
            paths = entries
                .map(|e| Ok(e.map_err(read)?.path()))
                .collect::<Result<_>>()?;
            paths.retain(|path| is_yaml(path) && !is_template(path));
            paths.sort();
        }
        let mut names = Vec::new();
        for path in &paths {
            names.push(self.add(&Source::read(path)?)?);
        }
        let is_member = |name: &String| {
            let members = self
                .groups
                .iter()
                .filter(|group| names.contains(&group.group));
            members
                .flat_map(|group| &group.task)
                .any(|m| m.name() == Some(name.as_str()))
        };
        let outer: Vec<String> = names
            .iter()
            .filter(|name| !is_member(name))
            .cloned()
            .collect();
        // Groups in a circle are all members; asking for them says so.
        Ok(if outer.is_empty() { names } else { outer })
    }

    /// Adds a file in place of what bears the same name; the name.
    fn add(&mut self, source: &Source) -> Result<String> {
        #[derive(Deserialize)]
        struct Kind {
            group: Option<IgnoredAny>,
        }
        let kind: Kind = source.parse()?;
        if kind.group.is_none() {
            return self.add_task(source, source.parse()?);
        }
        let mut group: GroupConfig = source.parse()?;
        for member in &mut group.task {
            if let Member::Task(keys) = member {
                let own = from_map(keys.clone()).map_err(|e| source.problem(e))?;
                *member = Member::Name(self.add_task(source, own)?);
            }
        }
        let name = group.group.clone();
        self.groups.retain(|other| other.group != name);
        self.groups.push(group);
        Ok(name)
    }

    fn add_task(&mut self, source: &Source, own: TaskConfig) -> Result<String> {
        let task = source.task(own)?;
        if let Some(check) = self.check {
            check(&task).map_err(|problem| source.problem(problem))?;
        }
        let name = task.name().to_owned();
        self.tasks.retain(|other| other.name() != name);
        self.tasks.push(task);
        Ok(name)
    }

    fn named(&self, name: &str, depth: usize) -> Result<Vec<Benchmark>> {
        if depth == 0 {
            return Err(Error::TaskFile {
                file: name.to_owned(),
                problem: "the group is a member of itself; leave it out of its members".into(),
            });
        }
        if let Some(group) = self.groups.iter().find(|group| group.group == name) {
            let mut members = Vec::new();
            for member in group.task.iter().filter_map(Member::name) {
                members.extend(self.named(member, depth - 1)?);
            }
            return Ok(vec![Benchmark::Group(group.clone(), members)]);
        }
        let task = |task: &TaskConfig| Benchmark::Task(Box::new(task.clone()));
        if let Some(found) = self.tasks.iter().find(|task| task.name() == name) {
            return Ok(vec![task(found)]);
        }
        let tagged = self
            .tasks
            .iter()
            .filter(|task| task.tag.iter().any(|tag| tag == name));
        let tagged: Vec<Benchmark> = tagged.map(task).collect();
        match tagged.is_empty() {
            true => Err(Error::UnknownBenchmark { name: name.into() }),
            false => Ok(tagged),
        }
    }
}

fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "yaml" || e == "yml")
}

/// Files whose names begin with `_` are only there to be included.
fn is_template(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"_"))
}
