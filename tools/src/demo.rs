//! `cargo xtask demo`: the whole job of detco on a small data set, each step by the command line
//! that a user would type.
//!
//! Never trains by itself or looks into a tensor: it prepares images, runs `detco`, reads what it
//! prints and writes, and judges. Every step leaves its product under its final name only when it is
//! whole, so a demo that was stopped goes on where it was.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{objects, setup, shell};

/// Written into the demo's folder first: says that the folder is the demo's, and of what images.
const STATE: &str = "demo.txt";
/// Everything the demo makes in its folder.
const PRODUCTS: [&str; 10] = [
    "images",
    "images.part",
    "shards",
    "views.png",
    "run",
    "backbone.safetensors",
    "backbone.pth",
    "attention.png",
    "detect",
    STATE,
];
const SEED: u64 = 1;
/// Images of each generated class.
const TRAIN_EACH: usize = 300;
const TEST_EACH: usize = 100;
/// Of a user's images at most these many are taken: what two cores can train on in three minutes.
const IMAGES_MAX: usize = 1500;
const RECIPE: &str = "detco-small";
/// Samples seen in training; the number of epochs follows from the size of the data set.
const SAMPLES_SEEN: usize = 20_000;
/// A detection probe of seconds: its figures tell trained from random weights on average, and no more.
const PROBE: [&str; 10] =
    ["--scenes", "300", "--test-scenes", "100", "--steps", "150", "--width", "32", "--seeds", "2"];
/// Images of the attention grid.
const SHOWN: usize = 4;
/// Share of the epochs after which the run is killed.
const KILL_AT: f64 = 0.4;
/// A trained backbone must beat the untrained one by this many percentage points.
const GAIN_MIN: f64 = 10.0;
/// `detco train` ends with this code when a signal stopped it after it wrote a checkpoint.
const STOPPED: i32 = 75;

/// `cargo xtask demo [--images DIR] [--out DIR] [--fresh]`.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let options = Options::parse(root, arguments)?;
    let ready = setup::run(root)?;
    build(root)?;
    let signals = Signals::listen()?;
    let demo = Demo { root, options, python: ready.python, detco: binary()?, signals };
    match demo.all() {
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("\nStopped. Nothing is lost: the same command goes on from here.");
            Ok(ExitCode::from(130))
        }
        Err(error) => Err(error),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    /// The user's images; generated ones without.
    images: Option<PathBuf>,
    /// The demo's folder.
    out: PathBuf,
    fresh: bool,
}

impl Options {
    fn parse(root: &Path, arguments: &[String]) -> Result<Options> {
        let mut options = Options { images: None, out: root.join(".demo"), fresh: false };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (argument.as_str(), None),
            };
            let mut folder = || -> Result<PathBuf> {
                let value = inline.clone().or_else(|| arguments.next().cloned());
                let value = value.with_context(|| format!("{name} needs a folder"))?;
                std::path::absolute(&value).with_context(|| format!("{name} {value}"))
            };
            match name {
                "--images" => options.images = Some(folder()?),
                "--out" => options.out = folder()?,
                "--fresh" if inline.is_none() => options.fresh = true,
                _ => bail!("unknown option {argument}: there are --images DIR, --out DIR, --fresh"),
            }
        }
        Ok(options)
    }
}

/// In the profile of the tests: libtorch does the arithmetic, so a release build would take minutes
/// to make and save seconds.
fn build(root: &Path) -> Result<()> {
    shell::step(shell::cargo(root).args(["build", "--package", "detco"]))
}

/// `detco` lies beside this program, whatever the target folder is called.
fn binary() -> Result<PathBuf> {
    let here = std::env::current_exe().context("finding this program's own folder")?;
    let detco = here.with_file_name("detco");
    ensure!(detco.is_file(), "{} was not built", detco.display());
    Ok(detco)
}

/// Ctrl-C was pressed, or SIGTERM came.
#[derive(Debug)]
struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Signals set flags instead of ending this program, so that it outlives the child that a Ctrl-C
/// reaches as well, and can say what happened.
#[derive(Debug)]
struct Signals {
    interrupt: Arc<AtomicBool>,
    terminate: Arc<AtomicBool>,
}

impl Signals {
    fn listen() -> Result<Signals> {
        let signals = Signals { interrupt: Arc::default(), terminate: Arc::default() };
        use signal_hook::consts::{SIGINT, SIGTERM};
        for (signal, flag) in [(SIGINT, &signals.interrupt), (SIGTERM, &signals.terminate)] {
            signal_hook::flag::register(signal, Arc::clone(flag))
                .context("listening for signals")?;
        }
        Ok(signals)
    }

    /// Waits for a child. A terminal's Ctrl-C reaches it by itself; a SIGTERM is passed on.
    fn wait(&self, child: &mut Child) -> Result<ExitStatus> {
        let mut passed_on = false;
        loop {
            if let Some(status) = child.try_wait()? {
                return if self.came() { Err(Interrupted.into()) } else { Ok(status) };
            }
            if self.terminate.load(Ordering::Relaxed) && !passed_on {
                shell::output(Command::new("kill").args(["-TERM", &child.id().to_string()]))?;
                passed_on = true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn came(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed) || self.terminate.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        if self.came() { Err(Interrupted.into()) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct Demo<'a> {
    root: &'a Path,
    options: Options,
    python: PathBuf,
    detco: PathBuf,
    signals: Signals,
}

/// What the images are, once they lie in the demo's folder.
#[derive(Debug)]
struct Images {
    train: usize,
    /// Enough images a class, in both parts, to ask kNN.
    labelled: bool,
}

impl Demo<'_> {
    fn all(&self) -> Result<()> {
        let started = Instant::now();
        self.begin()?;
        eprintln!("\n`detco` below is {}", shown(self.root, &self.detco));

        let images = self.images()?;
        self.pack(images.labelled)?;
        let train = self.path("shards/train");
        self.say("What is in the shards, and is every byte as it was written?");
        self.detco(&["inspect", &train])?;
        self.detco(&["verify", &train])?;
        self.say("What the model is shown: crops and patches as the recipe draws them");
        self.detco(&["views", &train, "--recipe", RECIPE, "-o", &self.path("views.png")])?;

        self.train(&images)?;
        let answers = self.knn(&images)?;
        self.export(&answers)?;
        self.judge(&answers)?;
        self.measure(&images)?;
        self.end(started.elapsed())
    }

    /// Takes the folder: goes on with an unfinished demo of the same images, else starts anew.
    fn begin(&self) -> Result<()> {
        let out = &self.options.out;
        let source = self.source();
        let state = out.join(STATE);
        let before = fs::read_to_string(&state).ok();
        let empty = !out.exists() || fs::read_dir(out)?.next().is_none();
        let going_on = match &before {
            None if empty => false,
            None => bail!(
                "{} holds something that is not a demo's; name another folder with --out",
                out.display()
            ),
            Some(text) => *text == source && !self.options.fresh,
        };
        if going_on {
            eprintln!("\nGoing on with the demo in {} (--fresh starts anew)", out.display());
        } else if before.is_some() {
            eprintln!("\nStarting anew in {}: removing the last demo's files", out.display());
            for product in PRODUCTS {
                remove(&out.join(product))?;
            }
        }
        fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
        fs::write(&state, source).with_context(|| format!("writing {}", state.display()))
    }

    /// The text of the state file while this demo is not finished.
    fn source(&self) -> String {
        match &self.options.images {
            None => format!(
                "a demo on generated images, seed {SEED}, {TRAIN_EACH} + {TEST_EACH} a class\n"
            ),
            Some(folder) => format!("a demo on the images of {}\n", folder.display()),
        }
    }

    fn images(&self) -> Result<Images> {
        let images = self.options.out.join("images");
        if !images.exists() {
            let part = self.options.out.join("images.part");
            remove(&part)?;
            let started = Instant::now();
            match &self.options.images {
                None => {
                    self.say("Drawing objects: four classes, each a shape with a texture");
                    objects::write_set(&part, SEED, TRAIN_EACH, TEST_EACH)?;
                }
                Some(folder) => {
                    self.say("Taking a train and a test part of your images");
                    take(folder, &part)?;
                }
            }
            fs::rename(&part, &images).with_context(|| format!("making {}", images.display()))?;
            eprintln!("  ({})", shell::duration(started.elapsed()));
        }
        let counts = |part: &str| -> Result<Vec<usize>> {
            let folders = classes(&images.join(part))?;
            folders.iter().map(|folder| Ok(files(folder)?.len())).collect()
        };
        let (train, test) = (counts("train")?, counts("test")?);
        let images = Images { train: train.iter().sum(), labelled: enough_for_knn(&train, &test) };
        eprintln!(
            "  {} train and {} test images, {} classes, in {}",
            images.train,
            test.iter().sum::<usize>(),
            train.len(),
            self.path("images"),
        );
        if !images.labelled {
            eprintln!("  too few images a class for a kNN: before and after will not be compared");
        }
        Ok(images)
    }

    fn pack(&self, labelled: bool) -> Result<()> {
        self.say("Packing the images into shards: WebDataset tars with an index");
        let parts: &[&str] = if labelled { &["train", "test"] } else { &["train"] };
        for part in parts {
            let (from, to) =
                (self.path(&format!("images/{part}")), self.path(&format!("shards/{part}")));
            if self.options.out.join("shards").join(part).join("manifest.json").exists() {
                eprintln!("  {to} is packed already");
                continue;
            }
            let mut words = vec!["pack", &from, &to];
            if self.options.out.join("shards").join(part).exists() {
                words.push("--resume");
            }
            self.detco(&words)?;
        }
        Ok(())
    }

    /// kNN before and after training.
    fn knn(&self, images: &Images) -> Result<Option<[Knn; 2]>> {
        if !images.labelled {
            return Ok(None);
        }
        let run = self.path("run");
        let (train, test) = (self.path("shards/train"), self.path("shards/test"));
        let ask = |more: &[&str]| -> Result<Knn> {
            let words = ["eval", "knn", &run, "--train", &train, "--test", &test];
            let said = self.detco(&[&words, more].concat())?;
            Knn::read(&said).with_context(|| format!("`detco eval knn` printed no result:\n{said}"))
        };
        self.say("Before: kNN on the features of the random weights that the run started from");
        let before = ask(&["--init"])?;
        self.say("After: the same kNN on the trained features");
        Ok(Some([before, ask(&[])?]))
    }

    /// Trains, with a kill in the middle; goes on with a run that is already there.
    fn train(&self, images: &Images) -> Result<()> {
        let run = self.options.out.join("run");
        let resume = ["train", "--resume", &self.path("run")];
        if run.join("checkpoints/latest").exists() {
            self.say("Training: going on from the last checkpoint");
            return self.detco(&resume).map(drop);
        }
        remove(&run)?;
        let epochs = (SAMPLES_SEEN / images.train.max(1)).clamp(2, 200);
        let kill_in = (epochs as f64 * KILL_AT) as u64;
        self.say("Training a small DetCo, and killing it halfway");
        let (data, out) = (self.path("shards/train"), self.path("run"));
        let epochs = format!("train.epochs={epochs}");
        let words = ["train", RECIPE, "--data", &data, "--out", &out, "--set", &epochs];
        let mut child = self.start(&words, Stdio::inherit())?;
        if self.kill_midway(&mut child, &run, kill_in)? {
            self.say(
                "Going on with the killed run: same losses, same weights, as if nothing had been",
            );
            self.detco(&resume)?;
        }
        Ok(())
    }

    /// Kills the run with SIGKILL in the middle of an epoch (counted from 0), once it has a
    /// checkpoint to go on from. `false` if it ended before.
    fn kill_midway(&self, child: &mut Child, run: &Path, epoch: u64) -> Result<bool> {
        loop {
            if let Some(status) = child.try_wait()? {
                self.signals.check()?;
                ensure!(status.success(), "`detco train` failed ({status})");
                eprintln!("  it was done before it could be killed");
                return Ok(false);
            }
            if self.signals.came() {
                self.signals.wait(child)?;
            }
            let saved = run.join("checkpoints/latest").exists();
            if let Some((step, at)) = reached(&run.join("metrics.jsonl"))
                && saved
                && at >= epoch
            {
                child.kill().context("killing the run")?;
                child.wait()?;
                eprintln!("\n\n  killed with SIGKILL after step {step}, inside epoch {}", at + 1);
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn export(&self, answers: &Option<[Knn; 2]>) -> Result<()> {
        self.say("Exporting the backbone for other programs");
        let run = self.path("run");
        let (safetensors, pth) = (self.path("backbone.safetensors"), self.path("backbone.pth"));
        self.detco(&["export", &run, "-o", &safetensors])?;
        self.detco(&["export", &run, "-o", &pth])?;
        self.say("Loading both files in torchvision");
        let mut command = Command::new(&self.python);
        command.args(["tools/load_in_torchvision.py", &safetensors, &pth]);
        if let Some([_, after]) = answers {
            let (train, test) = (self.path("shards/train"), self.path("shards/test"));
            command.args(["--train", &train, "--test", &test, "--size", &after.pixels]);
        }
        self.child(&mut command, Stdio::inherit()).map(drop)
    }

    fn judge(&self, answers: &Option<[Knn; 2]>) -> Result<()> {
        let Some([before, after]) = answers else { return Ok(()) };
        let (before, after) = (before.top1, after.top1);
        self.say("Did it learn?");
        eprintln!("  kNN top-1 before {before:.1} %, after {after:.1} %");
        ensure!(
            self.options.images.is_some() || after >= before + GAIN_MIN,
            "the trained backbone is not clearly better ({before:.1} % to {after:.1} %, at least \
             {GAIN_MIN} points were expected): please report this with {}",
            self.path("run/metrics.jsonl")
        );
        Ok(())
    }

    /// Three more of what `detco eval` measures, each in seconds.
    fn measure(&self, images: &Images) -> Result<()> {
        let run = self.path("run");
        let (train, test) = (self.path("shards/train"), self.path("shards/test"));
        if images.labelled {
            self.say("A linear classifier on the frozen features");
            self.detco(&["eval", "linear", &run, "--train", &train, "--test", &test])?;
            self.say(
                "A small detector on the frozen maps, beside random initialisations: the images are pasted \
                 on each other and have to be found",
            );
            let words = ["eval", "detect", &run, "--composites", "--objects", &train];
            let keep = self.path("detect");
            let of = ["--test-objects", &test, "--photos", &train, "--keep", &keep];
            self.detco(&[&words[..], &of, &PROBE].concat())?;
        }
        self.say("Where the maps of Res4 and Res5 are large, before and after training");
        let shown = self.some_images()?;
        let grid = self.path("attention.png");
        let words = ["eval", "attention", &run, "--init", "--with", &run, "--levels", "4,5"];
        let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
        self.detco(&[&words[..], &["--size", "96", "-o", &grid, "--"], &shown].concat()).map(drop)
    }

    /// An image of each of the first classes.
    fn some_images(&self) -> Result<Vec<String>> {
        let mut shown = Vec::new();
        for folder in classes(&self.options.out.join("images/train"))?.into_iter().take(SHOWN) {
            let mut all = files(&folder)?;
            all.sort();
            shown.extend(all.first().map(|image| self::shown(self.root, image)));
        }
        Ok(shown)
    }

    fn end(&self, time: Duration) -> Result<()> {
        let state = self.options.out.join(STATE);
        fs::write(&state, format!("{}finished\n", self.source()))?;
        eprintln!("\nDone in {}. Worth a look:", shell::duration(time));
        let notes = [
            ("views.png", "what the model is shown"),
            ("shards/train/manifest.json", "what is in the shards, with checksums"),
            ("run/config.toml", "every setting of the run, resolved"),
            ("run/metrics.jsonl", "losses, logits, speed, a line each few steps"),
            ("run/checkpoints", "where `detco train --resume` goes on"),
            ("backbone.safetensors", "the backbone, in torchvision's names"),
            ("backbone.pth", "the same for torch.load"),
            ("attention.png", "where maps of random and of trained weights are large"),
        ];
        for (product, note) in notes {
            if self.options.out.join(product).exists() {
                eprintln!("  {:<36} {note}", self.path(product));
            }
        }
        eprintln!("\nNext, your own images:  cargo xtask demo --images DIR --out DIR");
        Ok(())
    }

    fn say(&self, what: &str) {
        eprintln!("\n== {what}");
    }

    /// A path in the demo's folder, relative to the workspace where it lies inside.
    fn path(&self, below: &str) -> String {
        shown(self.root, &self.options.out.join(below))
    }

    /// Runs `detco` to its end and returns its standard output, which is also shown.
    fn detco(&self, words: &[&str]) -> Result<String> {
        self.child(Command::new(&self.detco).args(words), Stdio::piped())
    }

    /// Announces and starts `detco`.
    fn start(&self, words: &[&str], stdout: Stdio) -> Result<Child> {
        self.spawn(Command::new(&self.detco).args(words), stdout)
    }

    fn spawn(&self, command: &mut Command, stdout: Stdio) -> Result<Child> {
        self.signals.check()?;
        let line = shell::line(command);
        eprintln!("$ {line}");
        command.current_dir(self.root).stdin(Stdio::null()).stdout(stdout);
        command.spawn().with_context(|| format!("starting `{line}`"))
    }

    fn child(&self, command: &mut Command, stdout: Stdio) -> Result<String> {
        let started = Instant::now();
        let mut child = self.spawn(command, stdout)?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).lines() {
                let line = line.context("reading what the command prints")?;
                println!("{line}");
                said.push_str(&line);
                said.push('\n');
            }
        }
        let status = self.signals.wait(&mut child)?;
        if status.code() == Some(STOPPED) {
            return Err(Interrupted.into());
        }
        ensure!(status.success(), "`{}` failed ({status})", shell::line(command));
        eprintln!("  ({})", shell::duration(started.elapsed()));
        Ok(said)
    }
}

/// A path as short as it can be said from the workspace.
fn shown(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.with_context(|| format!("removing {}", path.display()))
}

/// The last step in a metrics file and its epoch. A line that is being written is not whole yet and
/// is passed over.
fn reached(metrics: &Path) -> Option<(u64, u64)> {
    let text = fs::read_to_string(metrics).ok()?;
    text.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        Some((line.get("step")?.as_u64()?, line.get("epoch")?.as_u64()?))
    })
}

/// What `detco eval knn` printed.
#[derive(Debug, PartialEq)]
struct Knn {
    /// In percent.
    top1: f64,
    /// Edge of the images that the network was shown.
    pixels: String,
}

impl Knn {
    /// The percentage after the word `top-1`, the number before `px`.
    fn read(said: &str) -> Option<Knn> {
        let (_, rest) = said.split_once("top-1")?;
        let (number, rest) = rest.split_once('%')?;
        let top1 = number.trim_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
        let pixels = rest.split_once(" px")?.0.rsplit(' ').next()?.to_string();
        Some(Knn { top1, pixels })
    }
}

/// Copies a train and a test part of a user's images: class folders, `train` and `val` or `test`
/// with class folders, or a folder of images. At most [`IMAGES_MAX`] in all, evenly from the classes.
fn take(folder: &Path, to: &Path) -> Result<()> {
    ensure!(folder.is_dir(), "--images {}: not a folder", folder.display());
    let part =
        |names: &[&str]| names.iter().map(|name| folder.join(name)).find(|path| path.is_dir());
    let (train, test) = (part(&["train"]), part(&["val", "test"]));
    let mut found = of_classes(train.as_deref().unwrap_or(folder), test.is_some())?;
    if let Some(test) = &test {
        for (class, images) in of_classes(test, false)? {
            let known = found.iter_mut().find(|(name, _)| *name == class);
            if let Some((_, all)) = known {
                all.extend(images.into_iter().map(|(_, path)| (Part::Test, path)));
            }
        }
    }
    let each = share_of_each(&found.iter().map(|(_, images)| images.len()).collect::<Vec<_>>());
    let mut taken = 0;
    for (class, mut images) in found {
        // By hash, which is the same on every machine and not the order of a camera's day.
        images.sort_by_key(|(_, path)| hash(path));
        for (part, path) in images.into_iter().take(each) {
            let to = to.join(if part == Part::Train { "train" } else { "test" }).join(&class);
            fs::create_dir_all(&to)?;
            let name = path.file_name().context("an image without a name")?;
            fs::copy(&path, to.join(name))
                .with_context(|| format!("copying {}", path.display()))?;
            taken += 1;
        }
    }
    ensure!(taken > 0, "--images {}: no JPEG or PNG was found in class folders", folder.display());
    fs::create_dir_all(to.join("test"))?;
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Train,
    Test,
}

type ClassImages = (String, Vec<(Part, PathBuf)>);

/// Classes below a folder with their images; a fifth is the test part unless all are for training.
fn of_classes(folder: &Path, all_train: bool) -> Result<Vec<ClassImages>> {
    let mut folders = classes(folder)?;
    if folders.is_empty() {
        folders.push(folder.to_path_buf());
    }
    let mut found = Vec::new();
    for class in folders {
        let name = class.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let images = files(&class)?.into_iter();
        let part = |path: &Path| if all_train { Part::Train } else { split(path) };
        found.push((name, images.map(|path| (part(&path), path)).collect()));
    }
    Ok(found)
}

/// A fifth of the images, by the name of file and class: the same wherever the folder lies, and
/// whatever else lies in it.
fn split(path: &Path) -> Part {
    if hash(path).is_multiple_of(5) { Part::Test } else { Part::Train }
}

/// FNV-1a over the last two components of a path, then mixed: FNV's low bits alone follow the last
/// letters.
fn hash(path: &Path) -> u64 {
    let mut components: Vec<_> = path.components().rev().take(2).collect();
    components.reverse();
    let name = components.iter().collect::<PathBuf>();
    let bytes = name.as_os_str().as_encoded_bytes();
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (fnv ^ (fnv >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

/// How many images a class may give so that all together stay below [`IMAGES_MAX`].
fn share_of_each(counts: &[usize]) -> usize {
    let total = |each: usize| counts.iter().map(|count| (*count).min(each)).sum::<usize>();
    let most = counts.iter().copied().max().unwrap_or(0);
    (1..=most).rev().find(|each| total(*each) <= IMAGES_MAX).unwrap_or(1)
}

/// kNN says something when two classes or more have neighbours to find and images to ask.
fn enough_for_knn(train: &[usize], test: &[usize]) -> bool {
    let enough = |counts: &[usize], least: usize| counts.iter().filter(|n| **n >= least).count();
    enough(train, 5) >= 2 && enough(test, 1) >= 2
}

/// Folders in a folder, sorted; hidden ones are not classes.
fn classes(folder: &Path) -> Result<Vec<PathBuf>> {
    entries(folder, |path| path.is_dir())
}

/// JPEG and PNG files in a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    entries(folder, |path| {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        path.is_file() && ["jpg", "jpeg", "png"].contains(&extension.as_str())
    })
}

fn entries(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let hidden = |path: &Path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
    };
    paths.retain(|path| !hidden(path) && wanted(path));
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: PathBuf) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }

    #[test]
    fn options_are_read_and_others_refused() {
        let parse = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
            Options::parse(Path::new("/w"), &words)
        };
        let plain = parse(&[]).unwrap();
        assert_eq!(plain, Options { images: None, out: "/w/.demo".into(), fresh: false });
        let all = parse(&["--images", "/a", "--out=/b", "--fresh"]).unwrap();
        assert_eq!(all, Options { images: Some("/a".into()), out: "/b".into(), fresh: true });
        assert!(parse(&["--out"]).is_err() && parse(&["--nothing"]).is_err());
        assert!(parse(&["--fresh=yes"]).is_err());
    }

    #[test]
    fn the_split_is_by_name_and_about_a_fifth() {
        let parts: Vec<Part> =
            (0..2000).map(|i| split(Path::new(&format!("/data/cat/{i:04}.jpg")))).collect();
        let test = parts.iter().filter(|part| **part == Part::Test).count();
        assert!((330..470).contains(&test), "{test} of 2000");
        // Where the folder lies does not matter; the class does.
        let moved = |i: usize| split(Path::new(&format!("/elsewhere/cat/{i:04}.jpg")));
        assert!((0..2000).all(|i| moved(i) == parts[i]));
        let other = |i: usize| split(Path::new(&format!("/data/dog/{i:04}.jpg")));
        assert!((0..2000).any(|i| other(i) != parts[i]));
    }

    #[test]
    fn class_folders_are_taken_in_two_parts_that_share_nothing() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for class in ["cat", "dog"] {
            (0..40).for_each(|i| touch(from.path().join(format!("{class}/{i}.JPEG"))));
            touch(from.path().join(class).join("notes.txt"));
        }
        take(from.path(), to.path()).unwrap();
        for class in ["cat", "dog"] {
            let train = files(&to.path().join("train").join(class)).unwrap();
            let test = files(&to.path().join("test").join(class)).unwrap();
            assert_eq!(train.len() + test.len(), 40);
            assert!((2..=16).contains(&test.len()));
        }
    }

    #[test]
    fn a_test_part_of_the_users_own_is_used() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        (0..9).for_each(|i| touch(from.path().join(format!("train/cat/{i}.png"))));
        (0..4).for_each(|i| touch(from.path().join(format!("val/cat/v{i}.png"))));
        take(from.path(), to.path()).unwrap();
        assert_eq!(files(&to.path().join("train/cat")).unwrap().len(), 9);
        assert_eq!(files(&to.path().join("test/cat")).unwrap().len(), 4);
        let nothing = tempfile::tempdir().unwrap();
        assert!(take(nothing.path(), &to.path().join("x")).is_err());
    }

    #[test]
    fn many_images_are_thinned_evenly() {
        assert_eq!(share_of_each(&[10, 20]), 20);
        assert_eq!(share_of_each(&[5000, 5000]), IMAGES_MAX / 2);
        assert_eq!(share_of_each(&[10, 9000]), IMAGES_MAX - 10);
        assert_eq!(share_of_each(&[1; 9000]), 1);
    }

    #[test]
    fn labels_count_when_there_are_neighbours_to_find() {
        assert!(enough_for_knn(&[150; 8], &[38; 8]));
        assert!(!enough_for_knn(&[1; 800], &[0; 800]));
        assert!(!enough_for_knn(&[500], &[100]));
    }

    #[test]
    fn the_result_is_read_from_the_line_that_states_it() {
        let said = "note: k\nkNN top-1 61.25 %, top-5 90.0 %  (run; k = 7, images of 48 px)\n";
        let expected = Knn { top1: 61.25, pixels: "48".into() };
        assert_eq!(Knn::read(said), Some(expected));
        assert_eq!(Knn::read("kNN top-1 7 %"), None);
        assert_eq!(Knn::read("nothing"), None);
    }

    #[test]
    fn the_last_whole_line_of_the_metrics_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "{\"step\": 10, \"epoch\": 0}\n{\"step\": 20, \"epoch\": 1}\n{\"step\": 3";
        fs::write(file.path(), text).unwrap();
        assert_eq!(reached(file.path()), Some((20, 1)));
        fs::write(file.path(), "").unwrap();
        assert_eq!(reached(file.path()), None);
    }
}
