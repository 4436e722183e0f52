//! `cargo xtask setup`: a Python environment in `.venv` with the wheels of `requirements.txt`, and
//! `.venv/libtorch`, the link that `.cargo/config.toml` names as `LIBTORCH`.
//!
//! The state lies in one small file inside `.venv`: it says "unfinished" from before the first wheel
//! until everything is installed and tried, then names what is installed. So an interrupted set-up is
//! noticed and made again, a finished one costs a few file reads, and an environment without that
//! file is somebody else's: it is used if it has the wheels, and never changed or deleted.

use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::shell;

const REQUIREMENTS: &str = include_str!("../requirements.txt");
/// Inside `.venv`; see the module's documentation.
const STATE: &str = "detco-setup.txt";
const UNFINISHED: &str = "unfinished\n";
/// What pip fetches and what it lays on the disk, in bytes: measured with these requirements on
/// x86-64 Linux and Python 3.11. Only the time left is reckoned from them.
const FETCHED: u64 = 2_800_000_000;
const INSTALLED: u64 = 4_900_000_000;
/// Both at once, and some air.
const DISK_NEEDED: u64 = 8_000_000_000;
/// Pythons that torch 2.11 has wheels for, and 3.14.1 is refused by torchvision 0.26.
const PYTHON_MINORS: std::ops::RangeInclusive<u32> = 10..=14;

/// What a finished set-up offers.
#[derive(Debug)]
pub(crate) struct Ready {
    /// The environment's interpreter.
    pub(crate) python: PathBuf,
    /// The folder with `lib/libtorch_cpu.so`: `LIBTORCH` if the user set it, else `.venv/libtorch`.
    pub(crate) libtorch: PathBuf,
    /// As libtorch states it, such as `2.11.0+cu130`.
    pub(crate) version: String,
}

/// Sets up what is missing; returns at once when nothing is.
pub(crate) fn run(root: &Path) -> Result<Ready> {
    let venv = root.join(".venv");
    if state(&venv)? != State::Ready {
        let _lock = install(root, &venv)?;
    }
    link_libtorch(&venv)?;
    let libtorch = match shell::variable("LIBTORCH").map(PathBuf::from) {
        // Cargo hands `.venv/libtorch` to this program when the user has set nothing.
        Some(chosen) if chosen != venv.join("libtorch") => chosen,
        _ => venv.join("libtorch"),
    };
    let version = libtorch_version(&libtorch)?;
    let wanted = pin("torch");
    ensure!(
        version.split('+').next() == Some(wanted),
        "the libtorch in {} is {version}, and {wanted} is needed: unset LIBTORCH to use the one of \
         `.venv`, or point it at libtorch {wanted}",
        libtorch.display()
    );
    Ok(Ready { python: venv.join("bin/python"), libtorch, version })
}

/// What stands in `.venv`.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// No folder, or an empty one.
    Missing,
    /// Ours, and not finished, or its interpreter is gone.
    Broken,
    /// Ours, finished for other requirements.
    Outdated,
    /// Not ours, and these are not installed in it.
    Foreign(Vec<String>),
    /// Every wheel is there.
    Ready,
}

fn state(venv: &Path) -> Result<State> {
    if !venv.exists() {
        let dangling = venv.symlink_metadata().is_ok();
        ensure!(!dangling, "{} is a link to a folder that does not exist", venv.display());
        return Ok(State::Missing);
    }
    ensure!(venv.is_dir(), "{} is not a folder", venv.display());
    // `exists` follows the link, so an interpreter that was uninstalled counts as missing.
    let runs = venv.join("bin/python").exists();
    Ok(match fs::read_to_string(venv.join(STATE)) {
        Ok(text) if text == UNFINISHED || !runs => State::Broken,
        Ok(text) if text == finished(venv)? => State::Ready,
        Ok(_) => State::Outdated,
        Err(_) if fs::read_dir(venv)?.next().is_none() => State::Missing,
        Err(_) => match lacking(venv)? {
            none if none.is_empty() && runs => State::Ready,
            lacking => State::Foreign(lacking),
        },
    })
}

/// The state file of a finished set-up: equal text means nothing to do.
fn finished(venv: &Path) -> Result<String> {
    let config = venv.join("pyvenv.cfg");
    let config =
        fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
    let version = config.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        key.trim().starts_with("version").then(|| value.trim().to_string())
    });
    let version = version.context("pyvenv.cfg names no version")?;
    Ok(format!("made by `cargo xtask setup` with Python {version} from\n{REQUIREMENTS}"))
}

/// Requirements that an environment does not have installed.
fn lacking(venv: &Path) -> Result<Vec<String>> {
    let Some(packages) = packages(venv)? else {
        return Ok(vec!["a Python".into()]);
    };
    let minor = packages.1;
    let wanted = pins(REQUIREMENTS, minor);
    let installed: Vec<String> = fs::read_dir(packages.0)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_suffix(".dist-info")?.replace('_', "-").to_lowercase()))
        .collect();
    Ok(wanted
        .into_iter()
        .filter(|(name, version)| !installed.contains(&format!("{name}-{version}")))
        .map(|(name, version)| format!("{name}=={version}"))
        .collect())
}

/// The `site-packages` of an environment and the minor version of its Python.
fn packages(venv: &Path) -> Result<Option<(PathBuf, u32)>> {
    let lib = venv.join("lib");
    if !lib.is_dir() {
        return Ok(None);
    }
    for entry in fs::read_dir(&lib).with_context(|| format!("reading {}", lib.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let minor = name.to_str().and_then(|name| name.strip_prefix("python3."));
        let folder = entry.path().join("site-packages");
        if let Some(minor) = minor.and_then(|minor| minor.parse().ok())
            && folder.is_dir()
        {
            return Ok(Some((folder, minor)));
        }
    }
    Ok(None)
}

/// `name==version` lines of a requirements file that hold for this minor version of Python 3.
fn pins(requirements: &str, minor: u32) -> Vec<(&str, &str)> {
    let holds = |condition: &str| {
        let mut words = condition.split_whitespace();
        let (name, relation, version) = (words.next(), words.next(), words.next());
        let bound = version.and_then(|v| v.trim_matches('"').strip_prefix("3.")?.parse().ok());
        match (name, relation, bound) {
            (Some("python_version"), Some(">="), Some(bound)) => minor >= bound,
            (Some("python_version"), Some("<"), Some(bound)) => minor < bound,
            _ => true, // unknown conditions are pip's to judge
        }
    };
    let lines = requirements.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let lines = lines.filter_map(|line| match line.split_once(';') {
        Some((pin, condition)) => holds(condition).then(|| pin.trim()),
        None => Some(line),
    });
    lines.filter_map(|pin| pin.split_once("==")).collect()
}

/// The version that `requirements.txt` pins, for packages pinned without a condition.
pub(crate) fn pin(name: &str) -> &'static str {
    let mut all = pins(REQUIREMENTS, *PYTHON_MINORS.end()).into_iter();
    all.find(|pin| pin.0 == name).map(|pin| pin.1).expect("requirements.txt pins this package")
}

/// Makes or repairs the environment. The returned lock is held until the caller is done.
fn install(root: &Path, venv: &Path) -> Result<File> {
    let started = Instant::now();
    let lock = lock(root)?;
    // Another set-up may have done the work while this one waited for the lock.
    let found = state(venv)?;
    match found {
        State::Ready => return Ok(lock),
        State::Foreign(lacking) => bail!(
            "{} was not made by `cargo xtask setup` and lacks {}.\n\
             Move it away, and set-up makes its own:  mv .venv .venv.mine\n\
             or complete it yourself:                 .venv/bin/python -m pip install -r tools/requirements.txt",
            venv.display(),
            lacking.join(", ")
        ),
        State::Missing | State::Broken | State::Outdated => {}
    }
    ensure!(
        std::env::consts::OS == "linux",
        "the wheels of tools/requirements.txt are for Linux; detco without its trainer builds here: \
         cargo build --no-default-features"
    );
    compiler()?;
    fs::create_dir_all(venv).with_context(|| format!("making {}", venv.display()))?;
    if found == State::Broken {
        eprintln!("set-up: .venv is from a set-up that did not finish; making it again");
    }
    write_state(venv, UNFINISHED)?;
    if found != State::Outdated {
        clear(venv)?;
        enough_disk(venv)?;
        make_venv(venv, &base_python()?)?;
    }
    match found {
        State::Outdated => eprintln!("set-up: bringing .venv up to tools/requirements.txt"),
        _ => eprintln!(
            "set-up: fetching about {:.1} GB of wheels (torch {} and what it needs); {:.1} GB on disk",
            FETCHED as f64 / 1e9,
            pin("torch"),
            INSTALLED as f64 / 1e9
        ),
    }
    pip(root, venv, &lock)?;
    try_out(venv)?;
    write_state(venv, &finished(venv)?)?;
    eprintln!("set-up: done in {}", shell::duration(started.elapsed()));
    Ok(lock)
}

/// One set-up at a time. The lock is the file's, so it ends with the last process that holds it: pip
/// is handed it too, and a set-up whose parent was killed still keeps the next one waiting.
fn lock(root: &Path) -> Result<File> {
    let path = root.join("target/setup.lock");
    fs::create_dir_all(root.join("target"))?;
    let file = File::options().create(true).truncate(false).write(true).read(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("set-up: another set-up is at work here; waiting for it");
        file.lock().with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

/// Whole or not at all: a sibling file, synced, renamed.
fn write_state(venv: &Path, text: &str) -> Result<()> {
    let (path, part) = (venv.join(STATE), venv.join("detco-setup.part"));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&part)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, &path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Empties an environment of ours, up to the file that says it is ours. `.venv` itself may be a link
/// to another disk, and stays.
fn clear(venv: &Path) -> Result<()> {
    for entry in fs::read_dir(venv)? {
        let entry = entry?;
        if entry.file_name() == STATE {
            continue;
        }
        let path = entry.path();
        let removed = match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// The first Python on the path that the wheels exist for.
pub(crate) fn base_python() -> Result<PathBuf> {
    let names = std::iter::once("python3".to_string())
        .chain([12, 13, 11, 10, 14].map(|minor| format!("python3.{minor}")));
    let mut refused = Vec::new();
    for name in names {
        let Some(path) = shell::find(&name) else { continue };
        let ask = "import sys; print(*sys.version_info[:3])";
        // A name without a version behind it (a version manager's shim) fails: try the next.
        let Ok(said) = shell::output(Command::new(&path).args(["-c", ask])) else { continue };
        let numbers: Vec<u32> = said.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        match supported(&numbers) {
            true => return Ok(path),
            false => refused.push(format!("{name} is {}", said.trim().replace(' ', "."))),
        }
    }
    let have = if refused.is_empty() { "none was found".into() } else { refused.join(", ") };
    bail!(
        "Python 3.{} to 3.{} is needed ({have}). Install one:\n  {}",
        PYTHON_MINORS.start(),
        PYTHON_MINORS.end(),
        install_line(["python3 python3-venv", "python3", "python", "python3"])
    )
}

fn supported(version: &[u32]) -> bool {
    matches!(version, [3, minor, patch] if PYTHON_MINORS.contains(minor) && (*minor, *patch) != (14, 1))
}

/// The line that installs packages here, named as apt, dnf, pacman and zypper know them.
fn install_line(packages: [&str; 4]) -> String {
    const MANAGERS: [(&str, &str); 4] = [
        ("apt-get", "sudo apt-get install -y"),
        ("dnf", "sudo dnf install -y"),
        ("pacman", "sudo pacman -S --needed"),
        ("zypper", "sudo zypper install -y"),
    ];
    let found =
        MANAGERS.iter().zip(packages).find(|((program, _), _)| shell::find(program).is_some());
    let ((_, command), packages) = found.unwrap_or((&MANAGERS[0], packages[0]));
    format!("{command} {packages}")
}

/// torch-sys compiles C++ against libtorch's headers.
fn compiler() -> Result<()> {
    let named = shell::variable("CXX").is_some();
    let found = ["c++", "g++", "clang++"].iter().any(|name| shell::find(name).is_some());
    ensure!(
        named || found,
        "no C++ compiler was found, and the bindings of libtorch need one. Install it:\n  {}",
        install_line(["g++", "gcc-c++", "gcc", "gcc-c++"])
    );
    Ok(())
}

fn enough_disk(folder: &Path) -> Result<()> {
    let said = shell::output(Command::new("df").arg("-Pk").arg(folder))?;
    // An unknown layout of df is no reason to stop.
    let Some(free) = available(&said) else { return Ok(()) };
    ensure!(
        free >= DISK_NEEDED,
        "set-up needs {} GB in {} and {:.1} GB are free. Make room, or let .venv be a link to a \
         folder on a larger disk:  ln -s /larger/disk/venv .venv",
        DISK_NEEDED / 1_000_000_000,
        folder.display(),
        free as f64 / 1e9
    );
    Ok(())
}

/// Bytes available, from the output of POSIX `df -Pk`.
fn available(df: &str) -> Option<u64> {
    let fields: Vec<&str> = df.lines().nth(1)?.split_whitespace().collect();
    fields.get(3)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Makes an environment in a folder that is empty or not there.
pub(crate) fn make_venv(venv: &Path, base: &Path) -> Result<()> {
    eprintln!("set-up: making {} with {}", venv.display(), base.display());
    let made = shell::output(python(base).args(["-m", "venv"]).arg(venv));
    let Err(error) = made else { return Ok(()) };
    // Debian and Ubuntu ship Python without ensurepip. virtualenv, where present, brings its own pip.
    if shell::output(python(base).args(["-m", "virtualenv", "--quiet"]).arg(venv)).is_ok() {
        return Ok(());
    }
    bail!(
        "{error:#}\nPython's venv module is not complete here. Install it:\n  {}\nor, without \
         rights to install packages:\n  {} -m pip install --user virtualenv",
        install_line(["python3-venv", "python3-pip", "python", "python3-virtualenv"]),
        base.display()
    )
}

/// A Python that does not look into other environments.
pub(crate) fn python(path: &Path) -> Command {
    let mut command = Command::new(path);
    let environments = ["PYTHONPATH", "PYTHONHOME"];
    let elsewhere = ["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"];
    let otherwise = ["PIP_NO_DEPS", "PIP_REQUIRE_HASHES", "PIP_DRY_RUN"];
    for name in environments.into_iter().chain(elsewhere).chain(otherwise) {
        command.env_remove(name);
    }
    command.env("PIP_USER", "0"); // said outright: pip.conf may ask for it
    command
}

/// What one broken line need not end: pip keeps what it fetched whole.
const PIP_ATTEMPTS: usize = 3;

fn pip(root: &Path, venv: &Path, lock: &File) -> Result<()> {
    for attempt in 1..PIP_ATTEMPTS {
        match pip_once(root, venv, lock) {
            Ok(()) => return Ok(()),
            Err(error) => {
                eprintln!("set-up: {error:#}\nset-up: once more, after {attempt} of {PIP_ATTEMPTS}")
            }
        }
    }
    pip_once(root, venv, lock)
}

fn pip_once(root: &Path, venv: &Path, lock: &File) -> Result<()> {
    let requirements = root.join("tools/requirements.txt");
    let log = root.join("target/setup.log");
    // Wheels of gigabytes pass through the temporary folder: beside their destination there is room.
    let scratch = venv.join("tmp");
    fs::create_dir_all(&scratch)?;
    let to_log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let mut command = python(&venv.join("bin/python"));
    command
        .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input"])
        .args(["--progress-bar", "off", "--only-binary", ":all:"])
        .args(["--retries", "10", "--timeout", "60", "--requirement"])
        .arg(&requirements)
        .env("TMPDIR", &scratch)
        .stdin(lock.try_clone()?)
        .stderr(to_log.try_clone()?)
        .stdout(to_log);
    let mut child = command.spawn().context("starting pip")?;
    let mut progress = Progress::start(bytes_below(&venv.join("lib")));
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        progress.show(fetched_into(&scratch), bytes_below(&venv.join("lib")));
        std::thread::sleep(Duration::from_millis(500));
    };
    progress.end();
    fs::remove_dir_all(&scratch)?;
    if !status.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(12)..].join("\n  ");
        bail!(
            "pip could not install tools/requirements.txt ({status}):\n  {tail}\n(all of it: {})\n\
             Run `cargo xtask setup` again to go on: what was fetched whole is kept in pip's cache.",
            log.display()
        );
    }
    Ok(())
}

/// Bytes of wheels in pip's scratch folder. They lie in folders; a loose file is the copy for pip's
/// cache of a wheel that is being fetched, and would count it twice.
fn fetched_into(scratch: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(scratch) else { return 0 };
    entries.flatten().map(|entry| bytes_below(&entry.path())).sum()
}

/// Bytes of all files below a folder that is being written: what vanishes meanwhile counts as 0.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => bytes_below(&entry.path()),
        Ok(data) if data.is_file() => data.len(),
        _ => 0,
    };
    entries.flatten().map(size).sum()
}

/// The line that says how far pip is.
#[derive(Debug)]
struct Progress {
    started: Instant,
    said: Instant,
    /// Installed before this run.
    before: u64,
    /// The most that was ever seen in the scratch folder, which pip empties at the end.
    fetched: u64,
    /// When the first wheel began to be installed.
    installing: Option<Instant>,
}

impl Progress {
    fn start(before: u64) -> Progress {
        let now = Instant::now();
        Progress { started: now, said: now, before, fetched: 0, installing: None }
    }

    fn show(&mut self, scratch: u64, lib: u64) {
        self.fetched = self.fetched.max(scratch);
        let installed = lib.saturating_sub(self.before);
        if self.installing.is_none() && installed > 0 {
            self.installing = Some(Instant::now());
        }
        let terminal = std::io::stderr().is_terminal();
        if !terminal && self.said.elapsed() < Duration::from_secs(10) {
            return;
        }
        self.said = Instant::now();
        let fetching = self.installing.map_or(self.started.elapsed(), |at| at - self.started);
        let installing = self.installing.map(|at| at.elapsed());
        let left = seconds_left(self.fetched, fetching, installed, installing);
        let left = left.map_or("time left not known yet".into(), |left| {
            format!("about {} left", shell::duration(Duration::from_secs(left)))
        });
        let (fetched, installed) = (self.fetched as f64 / 1e9, installed as f64 / 1e9);
        let line = format!(
            "set-up: fetched {fetched:.1} of {:.1} GB, installed {installed:.1} of {:.1} GB, {left}",
            FETCHED as f64 / 1e9,
            INSTALLED as f64 / 1e9,
        );
        match terminal {
            true => eprint!("\r{line}\x1b[K"),
            false => eprintln!("{line}"),
        }
    }

    fn end(&self) {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }
}

/// Time left at the rates seen so far; a rate not yet seen is taken to be one that ordinary machines reach, and
/// before the first megabytes there is nothing to say.
fn seconds_left(
    fetched: u64,
    fetching: Duration,
    installed: u64,
    installing: Option<Duration>,
) -> Option<u64> {
    /// Bytes a second that pip unpacks on an ordinary disk; used until it is measured.
    const INSTALL_RATE: f64 = 100e6;
    const ENOUGH: f64 = 2.0;
    let install_rate = match installing {
        Some(time) if time.as_secs_f64() > ENOUGH => installed as f64 / time.as_secs_f64(),
        _ => INSTALL_RATE,
    };
    // Nothing is fetched once pip installs: it fetches everything first.
    let fetch_left = match installing {
        Some(_) => 0.0,
        None if fetching.as_secs_f64() > ENOUGH && fetched > 1_000_000 => {
            let rate = fetched as f64 / fetching.as_secs_f64();
            FETCHED.saturating_sub(fetched) as f64 / rate
        }
        None => return None,
    };
    let install_left = INSTALLED.saturating_sub(installed) as f64 / install_rate.max(1.0);
    Some((fetch_left + install_left).ceil() as u64)
}

/// Imports what was installed: a wheel for another machine, or half a wheel, shows here.
fn try_out(venv: &Path) -> Result<()> {
    eprintln!("set-up: trying the installed packages");
    let imports = "import torch, torchvision, PIL.Image, numpy, safetensors, webdataset; \
                   assert torch.ones(2, 2).mm(torch.ones(2, 2)).sum() == 8";
    let mut command = python(&venv.join("bin/python"));
    // Otherwise torch asks for the user's name, which a container need not have.
    command.env("TORCHINDUCTOR_CACHE_DIR", venv.join("inductor"));
    shell::output(command.args(["-c", imports]))
        .context("the installed packages do not load")
        .map(drop)
}

/// `.venv/libtorch` -> `lib/python3.N/site-packages/torch`, so that nothing else need know N.
fn link_libtorch(venv: &Path) -> Result<()> {
    let (packages, _) = packages(venv)?.context(".venv has no site-packages")?;
    let torch = packages.join("torch");
    let target = torch.strip_prefix(venv).unwrap_or(&torch);
    let link = venv.join("libtorch");
    if fs::read_link(&link).is_ok_and(|now| now == target) {
        return Ok(());
    }
    let part = venv.join("libtorch.part");
    let made = || -> std::io::Result<()> {
        match fs::remove_file(&part) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(target, &part)?;
        fs::rename(&part, &link)
    };
    made().with_context(|| format!("linking {}", link.display()))
}

/// The version of the libtorch in a folder: the wheel's `version.py` or the archive's `build-version`.
fn libtorch_version(folder: &Path) -> Result<String> {
    let library = folder.join("lib/libtorch_cpu.so");
    ensure!(
        library.exists(),
        "LIBTORCH is {}, but {} is missing",
        folder.display(),
        library.display()
    );
    if let Ok(text) = fs::read_to_string(folder.join("build-version")) {
        return Ok(text.trim().to_string());
    }
    let text = fs::read_to_string(folder.join("version.py"));
    let text = text.with_context(|| format!("{} does not say its version", folder.display()))?;
    let version = text.lines().find_map(|line| {
        line.strip_prefix("__version__ = ").map(|v| v.trim_matches(['\'', '"']).to_string())
    });
    version.with_context(|| format!("{}/version.py names no version", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An environment as set-up leaves it, without the wheels' content.
    fn environment() -> tempfile::TempDir {
        let venv = tempfile::tempdir().unwrap();
        let packages = venv.path().join("lib/python3.12/site-packages");
        fs::create_dir_all(venv.path().join("bin")).unwrap();
        fs::write(venv.path().join("bin/python"), "").unwrap();
        fs::write(venv.path().join("pyvenv.cfg"), "home = /usr/bin\nversion = 3.12.4\n").unwrap();
        for (name, version) in pins(REQUIREMENTS, 12) {
            let name = format!("{}-{version}.dist-info", name.replace('-', "_"));
            fs::create_dir_all(packages.join(name)).unwrap();
        }
        venv
    }

    #[test]
    fn a_finished_set_up_is_recognised_and_an_unfinished_one_too() {
        let venv = environment();
        write_state(venv.path(), UNFINISHED).unwrap();
        assert_eq!(state(venv.path()).unwrap(), State::Broken);
        write_state(venv.path(), &finished(venv.path()).unwrap()).unwrap();
        assert_eq!(state(venv.path()).unwrap(), State::Ready);
        write_state(venv.path(), "made from other requirements").unwrap();
        assert_eq!(state(venv.path()).unwrap(), State::Outdated);
        fs::remove_file(venv.path().join("bin/python")).unwrap();
        assert_eq!(state(venv.path()).unwrap(), State::Broken);
    }

    #[test]
    fn a_missing_environment_is_made_and_a_broken_link_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let venv = folder.path().join(".venv");
        assert_eq!(state(&venv).unwrap(), State::Missing);
        std::os::unix::fs::symlink(folder.path().join("gone"), &venv).unwrap();
        assert!(state(&venv).unwrap_err().to_string().contains("does not exist"));
        fs::create_dir(folder.path().join("gone")).unwrap();
        assert_eq!(state(&venv).unwrap(), State::Missing);
    }

    #[test]
    fn somebody_elses_environment_is_used_or_named_but_never_changed() {
        let venv = environment();
        assert_eq!(state(venv.path()).unwrap(), State::Ready);
        let torch = format!("torch-{}.dist-info", pin("torch"));
        fs::remove_dir(venv.path().join("lib/python3.12/site-packages").join(torch)).unwrap();
        let lacking = vec![format!("torch=={}", pin("torch"))];
        assert_eq!(state(venv.path()).unwrap(), State::Foreign(lacking));

        let root = tempfile::tempdir().unwrap();
        let error = install(root.path(), venv.path()).unwrap_err().to_string();
        assert!(error.contains("mv .venv .venv.mine"), "{error}");
        assert!(venv.path().join("pyvenv.cfg").exists() && !venv.path().join(STATE).exists());
    }

    #[test]
    fn clearing_keeps_the_file_that_says_whose_it_is() {
        let venv = environment();
        write_state(venv.path(), UNFINISHED).unwrap();
        clear(venv.path()).unwrap();
        let left: Vec<_> =
            fs::read_dir(venv.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [STATE]);
        assert_eq!(state(venv.path()).unwrap(), State::Broken);
    }

    #[test]
    fn pins_follow_the_version_of_python() {
        let text = "# a comment\na==1\nb==2 ; python_version >= \"3.11\"\nb==1 ; python_version < \"3.11\"\n";
        assert_eq!(pins(text, 10), [("a", "1"), ("b", "1")]);
        assert_eq!(pins(text, 11), [("a", "1"), ("b", "2")]);
        for minor in PYTHON_MINORS {
            assert_eq!(pins(REQUIREMENTS, minor).len(), 39, "Python 3.{minor}");
        }
    }

    #[test]
    fn only_pythons_with_wheels_are_taken() {
        assert!(supported(&[3, 10, 0]) && supported(&[3, 14, 0]) && supported(&[3, 14, 2]));
        assert!(!supported(&[3, 9, 18]) && !supported(&[3, 14, 1]) && !supported(&[3, 15, 0]));
        assert!(!supported(&[2, 7, 18]) && !supported(&[]));
    }

    #[test]
    fn libtorch_says_its_version_in_either_layout() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            libtorch_version(folder.path()).unwrap_err().to_string().contains("libtorch_cpu.so")
        );
        fs::create_dir(folder.path().join("lib")).unwrap();
        fs::write(folder.path().join("lib/libtorch_cpu.so"), "").unwrap();
        assert!(libtorch_version(folder.path()).is_err());
        fs::write(folder.path().join("version.py"), "x = 1\n__version__ = '2.11.0+cu130'\n")
            .unwrap();
        assert_eq!(libtorch_version(folder.path()).unwrap(), "2.11.0+cu130");
        fs::write(folder.path().join("build-version"), "2.10.0+cpu\n").unwrap();
        assert_eq!(libtorch_version(folder.path()).unwrap(), "2.10.0+cpu");
    }

    #[test]
    fn the_link_is_made_mended_and_left_alone() {
        let venv = environment();
        let link = venv.path().join("libtorch");
        let target = Path::new("lib/python3.12/site-packages/torch");
        for before in [None, Some("lib/python3.9/site-packages/torch"), None] {
            if let Some(before) = before {
                fs::remove_file(&link).unwrap();
                std::os::unix::fs::symlink(before, &link).unwrap();
            }
            link_libtorch(venv.path()).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), target);
        }
    }

    #[test]
    fn the_time_left_adds_what_is_to_fetch_and_to_unpack() {
        let second = Duration::from_secs;
        assert_eq!(seconds_left(0, second(1), 0, None), None);
        // Half fetched in 10 s: 10 s more, then 49 s at 100 MB/s.
        assert_eq!(seconds_left(FETCHED / 2, second(10), 0, None), Some(59));
        // Half unpacked in 20 s: 20 s more.
        assert_eq!(seconds_left(FETCHED, second(20), INSTALLED / 2, Some(second(20))), Some(20));
        assert_eq!(seconds_left(FETCHED, second(20), INSTALLED + 1, Some(second(40))), Some(0));
    }

    #[test]
    fn free_space_is_read_from_df() {
        let text =
            "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/a 100 40 60 40% /\n";
        assert_eq!(available(text), Some(60 * 1024));
        assert_eq!(available("nothing"), None);
    }

    #[test]
    fn bytes_below_counts_files_in_folders() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::write(folder.path().join("a/b"), [0; 300]).unwrap();
        fs::write(folder.path().join("c"), [0; 20]).unwrap();
        assert_eq!(bytes_below(folder.path()), 320);
    }
}
