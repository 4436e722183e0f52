//! `cargo xtask peers`: how fast other loaders do what `detco` does, on the same images and cores.
//!
//! Everybody runs in turn, for several rounds, so that a noisy minute hits all alike: one process at
//! a time, its whole tree on the first cores that this program may use, the files in the page cache.
//! A run is a steady window: the subject says how many images it handed over in how many seconds,
//! with neither its start nor its end counted. Whoever cannot be installed or fails is named with the
//! reason, and left out.
//!
//! All deliver u8, normalising being the device's work. `tools/peers/recipe.py` says what T1, T2 and
//! T3 are; the peers' code lies beside it. Everything made here lies in `.peers`.

mod environment;
mod options;
mod table;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::shell;
use environment::{Environment, PEERS, reason};
use options::{DETCO, FLOOR, Options, Task};
use table::{Role, Row};

/// A run that has not ended by then has hung: the slowest peer's takes half a minute.
const RUN_MAX: Duration = Duration::from_secs(600);
/// Samples of a shard: several shards even of a small data set, for readers that shuffle shards.
const SHARD_SIZE: &str = "200";

/// `cargo xtask peers`.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<()> {
    let options = Options::parse(arguments)?;
    let environment = Environment::of(root);
    if options.list {
        print!("{}", list(&environment));
        return Ok(());
    }
    let images = options.images.as_deref().context("--images DIR is needed: what to decode")?;
    let cores = cores(*options.workers.iter().max().unwrap_or(&1))?;
    ensure!(shell::find("taskset").is_some(), "taskset is needed to pin cores (util-linux)");
    if let Some(folder) = options.record.as_ref().and_then(|record| record.parent()) {
        let exists = folder.as_os_str().is_empty() || folder.is_dir();
        ensure!(exists, "--record: there is no folder {}", folder.display());
    }
    let _lock = lock(environment.folder())?;
    let mut bench = Bench::new(root, &options, environment, cores);
    bench.prepare(images)?;
    bench.measure()?;
    bench.report()
}

/// The first cores that this program may run on; it may itself have been pinned.
fn cores(wanted: usize) -> Result<Vec<usize>> {
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let all = line.and_then(|list| core_list(list.trim())).context("no list of allowed cores")?;
    ensure!(
        wanted <= all.len(),
        "--workers {wanted}: each worker gets a core of its own, and {} may be used here",
        all.len()
    );
    Ok(all)
}

/// `0-2,5` -> 0, 1, 2, 5.
fn core_list(text: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cores.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cores)
}

fn list(environment: &Environment) -> String {
    let mut text = String::new();
    for peer in &PEERS {
        let state = environment.installed(peer).unwrap_or_else(|| "not installed yet".into());
        let _ = writeln!(text, "{:<16} {state}", peer.name); // writing to a String does not fail
    }
    for (name, what) in [(DETCO, "built here"), (FLOOR, "built here: decoding and resizing alone")]
    {
        let _ = writeln!(text, "{name:<16} {what}");
    }
    text
}

/// Two comparisons at a time would measure each other.
fn lock(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    ensure!(file.try_lock().is_ok(), "another `cargo xtask peers` is running here");
    Ok(file)
}

/// Somebody to measure.
#[derive(Debug)]
struct Subject {
    name: String,
    how: String,
    role: Role,
    /// Rates by task, then by number of workers, one a round.
    rates: Vec<Vec<Vec<f64>>>,
    /// Why it takes no further part in a task, by task.
    failed: Vec<Option<String>>,
}

/// What lies in `.peers/data`.
#[derive(Debug, Default)]
struct Data {
    images: usize,
    bytes: u64,
    /// The images, one a line.
    list: PathBuf,
    shards: PathBuf,
    /// FFCV's file.
    beton: PathBuf,
}

#[derive(Debug)]
struct Bench<'a> {
    root: &'a Path,
    options: &'a Options,
    environment: Environment<'a>,
    cores: Vec<usize>,
    data: Data,
    subjects: Vec<Subject>,
    /// Who takes no part at all, and why.
    left_out: Vec<(String, String)>,
}

impl<'a> Bench<'a> {
    fn new(
        root: &'a Path,
        options: &'a Options,
        environment: Environment<'a>,
        cores: Vec<usize>,
    ) -> Bench<'a> {
        let (data, subjects, left_out) = (Data::default(), Vec::new(), Vec::new());
        Bench { root, options, environment, cores, data, subjects, left_out }
    }

    /// Installs and builds everybody, packs the images, and reads all of it into the page cache.
    fn prepare(&mut self, images: &Path) -> Result<()> {
        let jpegs = jpegs(images)?;
        self.environment.make()?;
        let detco = self.build(DETCO)?; // needed by all: it packs the images
        for name in &self.options.subjects {
            let made = match PEERS.iter().find(|peer| peer.name == name) {
                Some(peer) => {
                    self.environment.install(peer).map(|()| (peer.how.to_string(), Role::Peer))
                }
                None if name == DETCO => Ok(detco.clone()),
                None => self.build(name),
            };
            match made {
                Ok((how, role)) => self.subjects.push(self.subject(name, how, role)),
                Err(error) => self.leave_out(name, format!("{error:#}")),
            }
        }
        self.data = self.pack(images, &jpegs)?;
        if self.subjects.iter().any(|subject| subject.name == "ffcv")
            && let Err(error) = self.ffcv_file()
        {
            self.subjects.retain(|subject| subject.name != "ffcv");
            self.leave_out("ffcv", format!("its file cannot be written: {error:#}"));
        }
        ensure!(!self.subjects.is_empty(), "nobody is left to measure");
        self.warm(&jpegs)
    }

    fn subject(&self, name: &str, how: String, role: Role) -> Subject {
        let Options { tasks, workers, .. } = self.options;
        let rates = vec![vec![Vec::new(); workers.len()]; tasks.len()];
        Subject { name: name.to_string(), how, role, rates, failed: vec![None; tasks.len()] }
    }

    fn leave_out(&mut self, name: &str, reason: String) {
        eprintln!("peers: {name} is left out: {reason}");
        self.left_out.push((name.to_string(), reason));
    }

    /// Builds one of our own programs into `.peers/bin`.
    fn build(&self, name: &str) -> Result<(String, Role)> {
        match name {
            DETCO => {
                self.cargo_build(name)?;
                Ok(("this repository".into(), Role::Ours))
            }
            _ => self.build_floor(),
        }
    }

    fn cargo_build(&self, name: &str) -> Result<()> {
        let words = "build --release --package detco --no-default-features --bin detco";
        shell::step(shell::cargo(self.root).args(words.split(' ')))?;
        // This program lies in `debug` or `release`, beside the `release` that was just built into.
        let here = std::env::current_exe().context("finding this program's own folder")?;
        let target = here.ancestors().nth(2).context("this program lies in no target folder")?;
        self.keep(&target.join("release/detco"), name)
    }

    fn build_floor(&self) -> Result<(String, Role)> {
        let manifest = self.root.join("tools/peers/floor/Cargo.toml");
        let target = self.environment.folder().join("floor");
        let build = |features: &[&str]| {
            let mut command = self.with_cmake(shell::cargo(self.root));
            command.args(["build", "--release", "--locked", "--manifest-path"]).arg(&manifest);
            shell::step(command.arg("--target-dir").arg(&target).args(features))
        };
        let resizes = "and fast_image_resize, from memory to memory";
        let how = match self.turbo_tools().and_then(|()| build(&["--features", "turbojpeg"])) {
            Ok(()) => format!("libjpeg-turbo {resizes}"),
            Err(error) => {
                eprintln!("peers: the floor is built without libjpeg-turbo: {error:#}");
                build(&[])?;
                format!("zune-jpeg (libjpeg-turbo could not be built: {error:#}) {resizes}")
            }
        };
        self.keep(&target.join("release/detco-peers-floor"), FLOOR)?;
        Ok((how, Role::Floor))
    }

    fn turbo_tools(&self) -> Result<()> {
        let hint = "nasm is needed to build libjpeg-turbo; on Debian: apt-get install nasm";
        ensure!(shell::find("nasm").is_some(), hint);
        match shell::find("cmake") {
            Some(_) => Ok(()),
            None => self.environment.cmake().context("cmake is needed to build libjpeg-turbo"),
        }
    }

    /// A command that finds the environment's cmake where the system has none.
    fn with_cmake(&self, mut command: Command) -> Command {
        if shell::find("cmake").is_none() {
            let cmake = self.environment.program("cmake");
            let own = cmake.parent().map(Path::to_path_buf);
            let path = shell::variable("PATH").unwrap_or_default();
            let folders = std::env::split_paths(&path).chain(own);
            if let Ok(path) = std::env::join_paths(folders) {
                command.env("PATH", path);
            }
        }
        command
    }

    /// A copy that the next build does not overwrite.
    fn keep(&self, program: &Path, name: &str) -> Result<()> {
        let bin = self.environment.folder().join("bin");
        fs::create_dir_all(&bin)?;
        let (part, kept) = (bin.join(format!("{name}.part")), bin.join(name));
        fs::copy(program, &part).with_context(|| format!("copying {}", program.display()))?;
        fs::rename(&part, &kept).with_context(|| format!("writing {}", kept.display()))
    }

    /// Packs the images, unless they lie there from the last time.
    fn pack(&self, images: &Path, jpegs: &[PathBuf]) -> Result<Data> {
        let folder = self.environment.folder().join("data");
        let mut bytes = 0;
        let mut list = String::new();
        for jpeg in jpegs {
            let file = jpeg.metadata().with_context(|| format!("looking at {}", jpeg.display()))?;
            bytes += file.len();
            let name = jpeg.to_str().with_context(|| format!("{} is not UTF-8", jpeg.display()))?;
            ensure!(!name.contains('\n'), "{name:?} holds a line break");
            list.push_str(name);
            list.push('\n');
        }
        let data = Data {
            images: jpegs.len(),
            bytes,
            list: folder.join("files.txt"),
            shards: folder.join("shards"),
            beton: folder.join("images.beton"),
        };
        let stamp = format!("{} images, {bytes} bytes\n{list}", jpegs.len());
        let state = folder.join("packed.txt");
        if fs::read_to_string(&state).is_ok_and(|text| text == stamp) {
            return Ok(data);
        }
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("removing {}", folder.display()))?;
        }
        fs::create_dir_all(&folder)?;
        let mut pack = Command::new(self.environment.folder().join("bin").join(DETCO));
        pack.arg("pack").arg(images).arg(&data.shards).args(["--shard-size", SHARD_SIZE]);
        shell::step(&mut pack)?;
        fs::write(&data.list, list)?;
        fs::write(&state, stamp).with_context(|| format!("writing {}", state.display()))?;
        Ok(data)
    }

    fn ffcv_file(&self) -> Result<()> {
        if self.data.beton.exists() {
            return Ok(());
        }
        let part = self.data.beton.with_extension("part");
        let mut command = self.environment.python();
        command.arg(self.root.join("tools/peers/with_ffcv.py")).arg(&self.data.list).arg(&part);
        run_pinned(command, &self.cores, &self.environment.log("ffcv-file"))?;
        fs::rename(&part, &self.data.beton)
            .with_context(|| format!("writing {}", self.data.beton.display()))
    }

    /// Reads every file that anybody will read.
    fn warm(&self, jpegs: &[PathBuf]) -> Result<()> {
        let shards = fs::read_dir(&self.data.shards)?.flatten().map(|entry| entry.path());
        let beton = self.data.beton.exists().then(|| self.data.beton.clone());
        for file in jpegs.iter().cloned().chain(shards.filter(|path| path.is_file())).chain(beton) {
            let read = File::open(&file)
                .and_then(|mut file| std::io::copy(&mut file, &mut std::io::sink()));
            read.with_context(|| format!("reading {}", file.display()))?;
        }
        Ok(())
    }

    /// Everybody in turn, round after round.
    fn measure(&mut self) -> Result<()> {
        let Options { tasks, workers, rounds, seconds, .. } = self.options;
        let runs = rounds * tasks.len() * workers.len() * self.subjects.len();
        eprintln!("\npeers: {runs} runs of {seconds:.0} s and their starts");
        let started = Instant::now();
        for round in 1..=*rounds {
            for worker_at in 0..workers.len() {
                for task_at in 0..tasks.len() {
                    for subject in 0..self.subjects.len() {
                        self.run(round, worker_at, task_at, subject);
                    }
                }
            }
        }
        eprintln!("peers: measured in {}", shell::duration(started.elapsed()));
        Ok(())
    }

    /// One run of one subject, noted and said; none if it failed in this task before.
    fn run(&mut self, round: usize, worker_at: usize, task_at: usize, subject: usize) {
        let (task, workers) = (self.options.tasks[task_at], self.options.workers[worker_at]);
        let Subject { name, failed, .. } = &self.subjects[subject];
        if failed[task_at].is_some() {
            return;
        }
        let place = format!("round {round}, workers {workers}, {}: {name}", task.name());
        let rate = self.rate(name, task, workers);
        let subject = &mut self.subjects[subject];
        match rate {
            Ok(rate) => {
                eprintln!("{place} {rate:.1} images/s");
                subject.rates[task_at][worker_at].push(rate);
            }
            Err(error) => {
                eprintln!("{place} failed: {error:#}");
                subject.failed[task_at] = Some(format!("workers {workers}: {error:#}"));
            }
        }
    }

    /// Images/s of one run of one subject.
    fn rate(&self, name: &str, task: Task, workers: usize) -> Result<f64> {
        let program = |name: &str| Command::new(self.environment.folder().join("bin").join(name));
        let seconds = self.options.seconds.to_string();
        let log = self.environment.log(&format!("{}-{name}", task.name()));
        let json = self.environment.folder().join("rate.json");
        let mut command = match name {
            DETCO => {
                let mut command = program(name);
                command.arg("profile").arg(&self.data.shards).args(["--mode", task.mode()]);
                command.arg("--json").arg(&json);
                command
            }
            FLOOR => {
                let mut command = program(name);
                command.args(["--task", task.name(), "--files"]).arg(&self.data.list);
                command
            }
            _ => {
                let mut command = self.environment.python();
                command.arg(self.root.join("tools/peers/measure.py")).arg(name);
                command.args(["--task", task.name(), "--files"]).arg(&self.data.list);
                command.arg("--shards").arg(&self.data.shards).arg("--beton").arg(&self.data.beton);
                command
            }
        };
        command.args(["--workers", &workers.to_string(), "--seconds", &seconds]);
        let said = run_pinned(command, &self.cores[..workers], &log)?;
        match name {
            DETCO => {
                let text = fs::read_to_string(&json).context("reading its result")?;
                fs::remove_file(&json)?;
                number(&text, "/runs/0/images_per_s")
            }
            _ => number(&said, "/images_per_s"),
        }
    }

    fn report(&self) -> Result<()> {
        let mut tables = String::new();
        for (at, task) in self.options.tasks.iter().enumerate() {
            let rows: Vec<Row> = self
                .subjects
                .iter()
                .filter(|subject| subject.rates[at].iter().any(|rates| !rates.is_empty()))
                .map(|subject| Row {
                    name: subject.name.clone(),
                    role: subject.role,
                    rates: subject.rates[at].clone(),
                })
                .collect();
            let table = table::render(&rows, &self.options.workers);
            let _ = write!(tables, "\n## {}: {}\n\n{table}", task.name(), task.title());
        }
        let left_out = self.left_out();
        println!("{tables}\n{left_out}");
        let Some(record) = &self.options.record else { return Ok(()) };
        let text = format!("{}{tables}\n{}\n{left_out}", self.opening()?, self.who());
        // Reasons quote other programs, and those name files by their whole paths.
        let text = text.replace(&format!("{}/", self.root.display()), "");
        fs::write(record, text).with_context(|| format!("writing {}", record.display()))?;
        eprintln!("peers: the record is {}", record.display());
        Ok(())
    }

    /// The record's first paragraphs: what was run, where, by which rules.
    fn opening(&self) -> Result<String> {
        let Options { tasks, subjects, rounds, workers, seconds, .. } = self.options;
        let words = |words: Vec<String>| words.join(",");
        let tasks = words(tasks.iter().map(|task| task.name().to_string()).collect());
        let workers = words(workers.iter().map(usize::to_string).collect());
        let date = shell::output(Command::new("date").arg("+%F"))?;
        let rust = shell::output(Command::new("rustc").arg("--version"))?;
        let python = shell::output(self.environment.python().arg("--version"))?;
        Ok(format!(
            "# Peer loaders, {}\n\n\
             {} JPEGs of {} bytes on average, page cache warm; {}; {}, {}.\n\n\
             ```sh\n\
             cargo xtask peers --images … --task {tasks} --rounds {rounds} --workers {workers} \
             --seconds {seconds:.0} \\\n  --peers {}\n\
             ```\n\n\
             Images/s, median (least-largest) of {rounds} rounds. Everybody in turn, one at a time, the \
             whole process tree\non as many cores as workers. A run is a window of at least \
             {seconds:.0} s (peers: and 512 images) of a loader that\nkeeps running: start-up and \
             drain are not counted. The consumer takes a batch and drops it. All deliver u8\n(no \
             normalisation, which is the device's work), each in its own layout, peers in batches \
             of 64. T3: colour and blur\nare drawn once a view, before a local view is cut. The \
             floor is decoding and the task's resizes alone, from\nmemory to memory.\n",
            date.trim(),
            self.data.images,
            self.data.bytes / self.data.images.max(1) as u64,
            machine(),
            rust.trim(),
            python.trim(),
            subjects.join(","),
        ))
    }

    /// Who was measured: how each does it, and its versions.
    fn who(&self) -> String {
        let mut text = String::from("## Who\n\n");
        for Subject { name, how, .. } in &self.subjects {
            let peer = PEERS.iter().find(|peer| peer.name == name);
            let versions = peer.and_then(|peer| self.environment.installed(peer));
            let versions = versions.map(|versions| format!(" ({versions})")).unwrap_or_default();
            let _ = writeln!(text, "- {name}: {how}{versions}");
        }
        text
    }

    /// Who is missing from the tables, and why.
    fn left_out(&self) -> String {
        let mut text = String::new();
        for (name, reason) in &self.left_out {
            let _ = writeln!(text, "- {name} is left out: {reason}");
        }
        for Subject { name, failed, .. } in &self.subjects {
            for (task, reason) in self.options.tasks.iter().zip(failed) {
                if let Some(reason) = reason {
                    let _ = writeln!(text, "- {name} failed in {}: {reason}", task.name());
                }
            }
        }
        text
    }
}

/// The JPEGs below a folder, sorted.
///
/// # Errors
/// If there are none, or other pictures among them: not every peer reads those.
fn jpegs(folder: &Path) -> Result<Vec<PathBuf>> {
    const OTHERS: [&str; 6] = ["png", "webp", "bmp", "gif", "tif", "tiff"];
    let folder = std::path::absolute(folder)?;
    let (mut found, mut folders) = (Vec::new(), vec![folder.clone()]);
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()));
        for entry in entries? {
            let path = entry?.path();
            let extension = path.extension().map(|text| text.to_string_lossy().to_lowercase());
            match extension.as_deref() {
                _ if path.is_dir() => folders.push(path),
                Some("jpg" | "jpeg") => found.push(path),
                Some(other) if OTHERS.contains(&other) => bail!(
                    "{} is no JPEG: name a folder of JPEGs alone, which is what every peer reads",
                    path.display()
                ),
                _ => {}
            }
        }
    }
    ensure!(!found.is_empty(), "there is no .jpg or .jpeg below {}", folder.display());
    found.sort();
    Ok(found)
}

/// Runs a program on some cores, for its standard output; its standard error goes to `log`.
fn run_pinned(command: Command, cores: &[usize], log: &Path) -> Result<String> {
    let list = cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let mut pinned = Command::new("taskset");
    pinned.args(["-c", &list]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => pinned.env(name, value),
            None => pinned.env_remove(name),
        };
    }
    let said = log.with_extension("out");
    let file =
        |path: &Path| File::create(path).with_context(|| format!("creating {}", path.display()));
    pinned.stdin(Stdio::null()).stdout(file(&said)?).stderr(file(log)?);
    let started = Instant::now();
    let mut child = pinned.spawn().context("starting it")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > RUN_MAX {
            child.kill()?;
            child.wait()?;
            bail!("it did not end within {} (log: {})", shell::duration(RUN_MAX), log.display());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    if !status.success() {
        bail!("{} ({status}, log: {})", reason(&fs::read_to_string(log)?), log.display());
    }
    let text = fs::read_to_string(&said)?;
    fs::remove_file(&said)?;
    Ok(text)
}

/// A positive number at a place of a JSON text; of several lines the last one counts.
fn number(text: &str, place: &str) -> Result<f64> {
    let whole: Result<serde_json::Value, _> = serde_json::from_str(text);
    let last = || serde_json::from_str(text.lines().last().unwrap_or(""));
    let value = whole.or_else(|_| last()).context("its result is no JSON")?;
    let number = value.pointer(place).and_then(serde_json::Value::as_f64);
    let number = number.filter(|number| number.is_finite() && *number > 0.0);
    number.with_context(|| format!("its result has no positive number at {place}"))
}

/// `AMD EPYC, 2 cores, 23 GiB of memory, Linux 6.1`.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_string())
    };
    let processor = field(&read("/proc/cpuinfo"), "model name");
    let kib = field(&read("/proc/meminfo"), "MemTotal");
    let kib: Option<u64> = kib.and_then(|text| text.split(' ').next()?.parse().ok());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{}, {cores} cores, {} GiB of memory, Linux {}",
        processor.unwrap_or_else(|| "unknown processor".into()),
        kib.unwrap_or(0) >> 20,
        kernel.split('-').next().unwrap_or("").trim(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(core_list("0-2,5").unwrap(), [0, 1, 2, 5]);
        assert_eq!(core_list("7").unwrap(), [7]);
        assert_eq!(core_list("a"), None);
        let error = cores(100_000).unwrap_err().to_string();
        assert!(error.starts_with("--workers 100000: each worker gets a core"), "{error}");
    }

    #[test]
    fn rates_are_found_in_json_and_must_be_positive() {
        assert_eq!(number("a warning\n{\"images_per_s\": 12.5}\n", "/images_per_s").unwrap(), 12.5);
        let profile = "{\n \"runs\": [{\"images_per_s\": 460}]\n}";
        assert_eq!(number(profile, "/runs/0/images_per_s").unwrap(), 460.0);
        for wrong in ["", "{}", "{\"images_per_s\": 0}", "{\"images_per_s\": \"fast\"}"] {
            assert!(number(wrong, "/images_per_s").is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_folder_of_jpegs_is_listed_and_anything_else_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = jpegs(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("there is no .jpg"), "{error}");
        fs::create_dir(folder.path().join("b")).unwrap();
        for name in ["b/2.JPEG", "1.jpg", "notes.txt"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        let found = jpegs(folder.path()).unwrap();
        let names: Vec<_> =
            found.iter().map(|file| file.strip_prefix(folder.path()).unwrap()).collect();
        assert_eq!(names, [Path::new("1.jpg"), Path::new("b/2.JPEG")]);
        fs::write(folder.path().join("b/3.png"), "x").unwrap();
        assert!(jpegs(folder.path()).unwrap_err().to_string().contains("3.png is no JPEG"));
    }

    #[test]
    fn a_run_is_pinned_and_its_failure_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log.txt");
        let first = cores(1).unwrap()[0];
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).env("SAID", "yes");
            command
        };
        let said = run_pinned(sh("taskset -cp $$; echo $SAID"), &[first], &log).unwrap();
        assert!(said.contains(&format!("list: {first}\nyes")), "{said}");
        let error = run_pinned(sh("echo 'no error here' >&2; exit 3"), &[first], &log).unwrap_err();
        assert!(error.to_string().starts_with("no error here (exit status: 3"), "{error}");
    }
}
