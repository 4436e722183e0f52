//! Ranks of one machine, started by this process: `detco train --gpus N`, `--ranks N`.
//!
//! The launcher serves the store, so that the loss of any rank, the first included, is seen by the
//! others; its children find their places in the variables that torchrun would set. Signals are
//! handed on, and one exit code stands for all.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

use crate::shim::ShimError;
use crate::shim::c10d::{Role, Store};

/// Where the ranks of one machine meet.
const HERE: &str = "127.0.0.1";
/// Between two looks at the children.
const LOOK: Duration = Duration::from_millis(20);
/// After the first rank has failed, the others have this long to say what they saw; then they are
/// killed.
const GRACE: Duration = Duration::from_secs(45);
/// What is handed on to all ranks: the first also comes from a terminal.
const SIGNALS: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::USR1];

/// Why ranks could not be started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// No store.
    #[error("cannot serve a store for the ranks: {0}")]
    Store(#[from] ShimError),
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Runs this program's own command line as `ranks` ranks and waits for them. Returns the exit code:
/// 0 if all succeeded, else that of the rank that failed first, 128 + n if signal n ended it.
///
/// # Errors
/// When the ranks cannot be started.
pub fn run(ranks: usize) -> Result<u8, LaunchError> {
    let system = |what| move |source| LaunchError::System { what, source };
    let mut raised = Vec::new();
    for signal in SIGNALS.into_iter().filter(|signal| !is_ignored(signal.as_raw())) {
        let flag = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal.as_raw(), Arc::clone(&flag))
            .map_err(system("listen for signals"))?;
        raised.push((signal, flag));
    }
    let store = Store::open(HERE, 0, Role::Serve, "", Duration::from_secs(60))?;
    let program = std::env::current_exe().map_err(system("find this program"))?;
    let mut children = Children::default();
    for rank in 0..ranks {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).envs(place(rank, ranks, store.port()));
        // A terminal's interrupt then reaches the launcher alone, which hands it on once.
        command.process_group(0);
        children.0.push(Some(command.spawn().map_err(system("start a rank"))?));
    }
    Ok(wait(&mut children, &raised))
}

/// Whether this process was started to ignore a signal, as `nohup` has it with SIGHUP.
pub(crate) fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The variables of a rank, as torchrun sets them.
fn place(rank: usize, ranks: usize, port: u16) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", ranks.to_string()),
        ("LOCAL_WORLD_SIZE", ranks.to_string()),
        ("MASTER_ADDR", HERE.to_string()),
        ("MASTER_PORT", port.to_string()),
        ("TORCHELASTIC_USE_AGENT_STORE", "True".to_string()),
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

/// Waits for all ranks, handing signals on.
fn wait(children: &mut Children, raised: &[(Signal, Arc<AtomicBool>)]) -> u8 {
    let mut failed: Option<(u8, Instant)> = None;
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
                failed = Some((code, Instant::now()));
                if let Some(signal) = status.signal() {
                    note!("rank {rank} was ended by signal {signal}");
                }
            }
        }
        if children.0.iter().all(Option::is_none) {
            return failed.map_or(0, |(code, _)| code);
        }
        if failed.is_some_and(|(_, since)| since.elapsed() > GRACE) {
            let left = children.0.iter().enumerate().filter(|(_, child)| child.is_some());
            let left: Vec<usize> = left.map(|(rank, _)| rank).collect();
            note!("killing rank {}, which did not end", super::rank_list(&left));
            return failed.map_or(1, |(code, _)| code); // dropping the children kills them
        }
        thread::sleep(LOOK);
    }
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
