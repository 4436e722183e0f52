//! Ranks started by hand, as torchrun would start them, and what they leave behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use detco::shim::c10d::{Role, Store};

use crate::support::{DETCO, path};

/// Milliseconds an update; 12 BN groups, so that 1, 2, 3 and 4 ranks can share them.
const TINY: &[&str] = &[
    "model.width=8",
    "model.bn_splits=12",
    "method.dim=16",
    "method.queue=96",
    "train.batch=24",
    "train.threads=1",
    "optim.lr=0.02",
    "optim.lr_batch=24",
    "views.crops.size=32",
    "views.patches.size=36",
    "views.patches.grid.patch=8",
    "monitor.every_steps=1",
    "monitor.samples=true",
    "data.workers=1",
    "train.device=cpu",
];

pub(crate) fn new_run<'a>(data: &'a Path, run: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "detco-small", "--data", path(data), "--out", path(run)];
    for set in TINY {
        args.extend(["--set", set]);
    }
    args.extend(more);
    args
}

/// Ranks started by hand, as torchrun would; what they say goes to files.
pub(crate) struct Ranks {
    pub(crate) children: Vec<Child>,
    folder: PathBuf,
    /// The store that torchrun's agent would serve.
    _store: Option<Store>,
}

impl Ranks {
    pub(crate) fn start(folder: &Path, args: &[Vec<&str>]) -> Ranks {
        let store = Store::open("127.0.0.1", 0, Role::Serve, "", Duration::from_secs(60)).unwrap();
        let port = store.port();
        let agent = [("TORCHELASTIC_USE_AGENT_STORE", "True")];
        let mut ranks = Ranks::start_at(port, &agent, "127.0.0.1", folder, args);
        ranks._store = Some(store);
        ranks
    }

    /// Without an agent: rank 0 serves the store.
    pub(crate) fn start_without_agent(folder: &Path, args: &[Vec<&str>]) -> Ranks {
        Ranks::start_at_address("127.0.0.1", folder, args)
    }

    /// The same, with an address of this machine.
    pub(crate) fn start_at_address(address: &str, folder: &Path, args: &[Vec<&str>]) -> Ranks {
        Ranks::start_at(free_port(), &[], address, folder, args)
    }

    fn start_at(
        port: u16,
        more: &[(&str, &str)],
        address: &str,
        folder: &Path,
        args: &[Vec<&str>],
    ) -> Ranks {
        let size = args.len();
        let start = |(rank, args): (usize, &Vec<&str>)| {
            let said = File::create(folder.join(format!("said.{rank}"))).unwrap();
            let mut command = Command::new(DETCO);
            command.args(args).env("RANK", rank.to_string());
            command.env("WORLD_SIZE", size.to_string());
            command.env("MASTER_ADDR", address).env("MASTER_PORT", port.to_string());
            command.envs(more.iter().copied()).env("OMP_NUM_THREADS", "1");
            command.stdout(said.try_clone().unwrap()).stderr(said).spawn().unwrap()
        };
        let children = args.iter().enumerate().map(start).collect();
        Ranks { children, folder: folder.to_path_buf(), _store: None }
    }

    pub(crate) fn said(&self, rank: usize) -> String {
        std::fs::read_to_string(self.folder.join(format!("said.{rank}"))).unwrap()
    }

    /// Waits for all; exit codes, none where a signal ended one.
    pub(crate) fn codes(&mut self) -> Vec<Option<i32>> {
        self.children.iter_mut().map(|child| child.wait().unwrap().code()).collect()
    }

    pub(crate) fn signal(&self, rank: usize, signal: &str) {
        send(self.children[rank].id(), signal);
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill(); // most have ended
            let _ = child.wait();
        }
    }
}

/// A port that nobody listens at.
pub(crate) fn free_port() -> u16 {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap().port()
}

pub(crate) fn send(process: u32, signal: &str) {
    assert!(try_send(process, signal), "there is no process {process}");
}

/// As [`send`]; false where the process is gone.
pub(crate) fn try_send(process: u32, signal: &str) -> bool {
    use rustix::process::{Pid, Signal, kill_process};
    let signal = match signal {
        "KILL" => Signal::KILL,
        "STOP" => Signal::STOP,
        "TERM" => Signal::TERM,
        "USR1" => Signal::USR1,
        "INT" => Signal::INT,
        "CONT" => Signal::CONT,
        "SEGV" => Signal::SEGV,
        "ABRT" => Signal::ABORT,
        other => panic!("no signal {other}"),
    };
    let process = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(process, signal).is_ok()
}

/// Steps whose metrics are written.
fn steps_written(run: &Path) -> u64 {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains("\"loss\"")).count() as u64
}

pub(crate) fn wait_for_step(run: &Path, step: u64, child: &mut Child) {
    let start = Instant::now();
    while steps_written(run) < step && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(300), "no step {step} after five minutes");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Loss by step.
pub(crate) fn losses(run: &Path) -> BTreeMap<u64, f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut losses = BTreeMap::new();
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("whole lines");
        if let Some(loss) = value["loss"].as_f64() {
            let step = value["step"].as_u64().unwrap();
            assert!(losses.insert(step, loss).is_none(), "step {step} twice");
        }
    }
    losses
}

/// The global batch of each `(epoch, batch)`, put together from all ranks' files.
pub(crate) fn batches(run: &Path) -> BTreeMap<(u64, u64), Vec<u64>> {
    let mut parts: BTreeMap<(u64, u64), BTreeMap<u64, Vec<u64>>> = BTreeMap::new();
    for entry in std::fs::read_dir(run).unwrap() {
        let path = entry.unwrap().path();
        if !path.file_name().unwrap().to_str().unwrap().starts_with("samples.") {
            continue;
        }
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let value: serde_json::Value = serde_json::from_str(line).expect("whole lines");
            let number = |name: &str| value[name].as_u64().unwrap();
            let samples = value["samples"].as_array().unwrap().iter();
            let samples = samples.map(|sample| sample.as_u64().unwrap()).collect();
            let of = parts.entry((number("epoch"), number("batch"))).or_default();
            assert!(of.insert(number("slot"), samples).is_none(), "{value} is there twice");
        }
    }
    let joined = |parts: BTreeMap<u64, Vec<u64>>| {
        let mut batch = Vec::new();
        for (slot, samples) in parts {
            assert_eq!(slot, batch.len() as u64, "a slot is missing or there twice");
            batch.extend(samples);
        }
        batch
    };
    parts.into_iter().map(|(at, parts)| (at, joined(parts))).collect()
}
