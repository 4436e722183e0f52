//! The launcher: starts the ranks of this machine for `detco train --gpus N` and `--ranks N`. The machine may
//! be one of several with a launcher each, such as pods.
//!
//! The launcher of the first machine serves the store, so that the others notice the loss of any rank, rank 0
//! included. Its children get the variables that torchrun would set. Signals are passed on to all of them, and
//! one exit code is returned for all.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

use super::c10d::{FAREWELL, LEFT};
use super::heartbeat;
use super::world::{Launch, Spec};
use crate::shim::ShimError;
use crate::shim::c10d::{Member, Role, Store};

/// Address of the store when all ranks are on this machine.
const HERE: &str = "127.0.0.1";
/// Interval of checking the children.
const LOOK: Duration = Duration::from_millis(20);
/// Time that the other ranks have to report and end after the first has failed; then they are killed. A
/// checkpoint that is being written is waited for.
const GRACE: Duration = Duration::from_secs(45);
/// Rank 0 counts as no longer saving after so long without a beat.
const SILENT: Duration = Duration::from_secs(15);
/// How long ranks of other machines may take to notice a failure: they check twice a second.
const HEARD: Duration = Duration::from_secs(3);
/// The signals passed on to all ranks. The first may also come from a terminal.
const SIGNALS: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::USR1];

/// Why ranks could not be started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// No store.
    #[error("cannot serve a store for the ranks at port {port}: {source}")]
    Store {
        /// 0: any free one.
        port: u16,
        /// What libtorch said.
        source: ShimError,
    },
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Runs this program's own command line as so many ranks and waits for them; `patience` is how long they wait
/// for each other. Returns the exit code: 0 if all succeeded, else that of the rank that failed first, 128 + n
/// if signal n ended it.
///
/// # Errors
/// When the ranks cannot be started.
pub fn run(wanted: &Launch, patience: Duration) -> Result<u8, LaunchError> {
    let system = |what| move |source| LaunchError::System { what, source };
    let mut raised = Vec::new();
    for signal in SIGNALS.into_iter().filter(|signal| !is_ignored(signal.as_raw())) {
        let flag = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal.as_raw(), Arc::clone(&flag))
            .map_err(system("listen for signals"))?;
        raised.push((signal, flag));
    }
    let store = serve(wanted.node.as_ref(), patience)?;
    let port = store.as_ref().map_or(0, Store::port);
    let program = std::env::current_exe().map_err(system("find this program"))?;
    let mut children = Children::default();
    for rank in 0..wanted.ranks {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).envs(place(rank, wanted, port));
        // A terminal's interrupt then reaches the launcher alone, which hands it on once.
        command.process_group(0);
        children.0.push(Some(command.spawn().map_err(system("start a rank"))?));
    }
    let first = wanted.node.as_ref().map_or(0, |node| node.member.rank * wanted.ranks);
    let code = wait(&mut children, first, store.as_ref(), &raised);
    if let Some((store, node)) = store.as_ref().zip(wanted.node.as_ref()) {
        part(store, wanted.ranks * node.member.size, code);
    }
    Ok(code)
}

/// The store that the ranks meet at, unless another process serves it: the first machine's launcher, or
/// torchrun's agent.
fn serve(node: Option<&Spec>, patience: Duration) -> Result<Option<Store>, LaunchError> {
    let port = match node {
        None => 0,
        Some(Spec { role: Role::Join, .. }) => return Ok(None),
        Some(node) => node.port,
    };
    // What the ranks put before their keys, by the variables that `place` sets.
    let prefix = format!("detco/{}/0", run_of(node));
    let store = Store::open(HERE, port, Role::Serve, &prefix, patience);
    store.map(Some).map_err(|source| LaunchError::Store { port, source })
}

/// A name of this start that all machines know: a restart does not meet the keys of the start before.
fn run_of(node: Option<&Spec>) -> &str {
    node.map_or("", |node| &node.prefix)
}

/// Serves the store until the ranks of other machines have left as well, or have heard why this one's ended.
fn part(store: &Store, ranks: usize, code: u8) {
    let start = Instant::now();
    let limit = if code == 0 { FAREWELL } else { HEARD };
    let left = || store.add(LEFT, 0).is_ok_and(|left| (left as usize) < ranks);
    while left() && start.elapsed() < limit {
        thread::sleep(LOOK);
    }
}

/// Whether this process was started to ignore a signal, as `nohup` has it with SIGHUP.
pub(crate) fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The variables of a rank, as torchrun sets them. `port` is that of the store served here.
fn place(rank: usize, wanted: &Launch, port: u16) -> Vec<(&'static str, String)> {
    let ranks = wanted.ranks;
    let (machine, master, port) = match &wanted.node {
        None => (Member { rank: 0, size: 1 }, HERE.to_string(), port),
        Some(node) => (node.member, node.master.clone(), node.port),
    };
    let mut variables = vec![
        ("RANK", (machine.rank * ranks + rank).to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", (machine.size * ranks).to_string()),
        ("LOCAL_WORLD_SIZE", ranks.to_string()),
        ("MASTER_ADDR", master),
        ("MASTER_PORT", port.to_string()),
        ("TORCHELASTIC_USE_AGENT_STORE", "True".to_string()),
        ("TORCHELASTIC_RUN_ID", run_of(wanted.node.as_ref()).to_string()),
        ("TORCHELASTIC_RESTART_COUNT", "0".to_string()),
    ];
    // As torchrun does, but with a share of the cores for each: libtorch would take all of them.
    if crate::config::variable("OMP_NUM_THREADS").is_none() {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        variables.push(("OMP_NUM_THREADS", (cores / ranks).max(1).to_string()));
    }
    variables
}

/// Running ranks; those that still run when this is dropped are killed.
#[derive(Debug, Default)]
struct Children(Vec<Option<Child>>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in self.0.iter_mut().flatten() {
            // It may have ended just now.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits for all ranks, of which the first has the number `first`, handing signals on.
fn wait(
    children: &mut Children,
    first: usize,
    store: Option<&Store>,
    raised: &[(Signal, Arc<AtomicBool>)],
) -> u8 {
    let mut failed: Option<(u8, Grace)> = None;
    loop {
        for (signal, flag) in raised {
            if flag.swap(false, Ordering::Relaxed) {
                children.0.iter().flatten().for_each(|child| send(child, *signal));
            }
        }
        for (rank, place) in children.0.iter_mut().enumerate() {
            let Some(child) = place else { continue };
            let Ok(Some(status)) = child.try_wait() else { continue };
            *place = None;
            let code = code_of(status);
            if code != 0 && failed.is_none() {
                failed = Some((code, Grace::begin()));
                if let Some(signal) = status.signal() {
                    note!("rank {} was ended by {}", first + rank, name_of(signal));
                }
            }
        }
        if children.0.iter().all(Option::is_none) {
            return failed.map_or(0, |(code, _)| code);
        }
        if let Some((code, grace)) = &mut failed {
            // Rank 0 saves.
            let saver = store.filter(|_| first == 0 && children.0[0].is_some());
            if grace.is_over(saver) {
                let left = children.0.iter().enumerate().filter(|(_, child)| child.is_some());
                let left: Vec<usize> = left.map(|(rank, _)| first + rank).collect();
                note!("killing rank {}, which did not end", super::rank_list(&left));
                return *code; // dropping the children kills them
            }
        }
        thread::sleep(LOOK);
    }
}

/// How long ranks may go on after one has failed.
struct Grace {
    since: Instant,
    /// The last beat of rank 0 that was seen, while it saves, and when.
    saving: Option<(u64, Instant)>,
}

impl Grace {
    fn begin() -> Grace {
        Grace { since: Instant::now(), saving: None }
    }

    /// `saver` is the store, where rank 0 may be writing a checkpoint: it may go on as long as it beats.
    fn is_over(&mut self, saver: Option<&Store>) -> bool {
        if self.since.elapsed() < GRACE {
            return false;
        }
        let Some(beat) = saver.and_then(heartbeat::first_saves) else { return true };
        if self.saving.is_none_or(|(last, _)| last != beat) {
            self.saving = Some((beat, Instant::now()));
        }
        self.saving.is_some_and(|(_, since)| since.elapsed() > SILENT)
    }
}

/// `signal 11 (a crash: SIGSEGV)`.
fn name_of(signal: i32) -> String {
    use signal_hook::consts::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV};

    let why = match signal {
        SIGKILL => "killed from outside: the system does so where memory ends",
        SIGABRT | SIGBUS | SIGFPE | SIGILL | SIGSEGV => "a crash",
        _ => "sent from outside",
    };
    let name = signal_hook::low_level::signal_name(signal).unwrap_or("no name");
    format!("signal {signal} ({name}, {why})")
}

fn send(child: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended just now; it has not been waited for, so the number is still its own.
        let _ = kill_process(pid, signal);
    }
}

/// As a shell would report it.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
