//! Heartbeats: finds dead and slow ranks, and ends this one where its main thread cannot.
//!
//! A thread of every rank writes a beat into the store twice a second: what the rank is doing, since
//! when, and how many collectives it has begun. A rank that waits for long reads the beats of the
//! others. A rank without new beats hangs, was killed or is cut off; a rank that has begun fewer
//! collectives is slow. The thread also ends the process when the main thread hangs in a collective
//! past its timeout, or when the store is gone. A call to a store behind a cut cable does not return
//! at all; so a second thread, which never calls it, watches the first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use self::others::{FAILED, Others, beat_of};
use self::state::{Doing, Shared};
use self::watch::{beat, guard, run};
use super::Move;
use crate::shim::ShimError;
use crate::shim::c10d::{Member, Role, Store};

mod missing;
mod others;
mod state;
mod watch;

pub use missing::{LastSeen, Missing};
pub use state::Limits;

/// Time between two beats: a lost rank is known within seconds, and a thousand ranks load the store with
/// four thousand small requests a second.
const BEAT: Duration = Duration::from_millis(500);

/// A rank without a beat for so long counts as silent, once something has failed.
const SILENT: Duration = Duration::from_secs(3);

/// A rank without a beat for so long counts as gone, although nothing has failed.
const GONE: Duration = Duration::from_secs(30);

/// Where collectives are only queued, the others' beats are read after so long without progress.
const LOOKED_AT: Duration = Duration::from_secs(5);

/// The threads that send beats and check those of others; they end when this is dropped.
#[derive(Debug)]
pub struct Heartbeat {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Heartbeat {
    /// Sends the first beat and starts the threads. `exit_code` is the process's if they have to end it.
    ///
    /// # Errors
    /// When the store is gone, or the system refuses a thread.
    pub fn start(
        store: &Store,
        member: Member,
        address: String,
        limits: Limits,
        exit_code: u8,
    ) -> Result<Heartbeat, ShimError> {
        let own = store.another()?;
        let (step, what, since) = (0, Move::Start, Instant::now());
        let (waiting, queued) = (None, false);
        let doing = Doing { step, what, since, begun: 0, waiting, queued, limits };
        let shared = Arc::new(Shared {
            member,
            address,
            doing: Mutex::new(doing),
            ended: AtomicBool::new(false),
            answered: Mutex::new(since),
            failed: Mutex::new(None),
            heard: Mutex::new(vec![None; member.size]),
        });
        beat(&own, &shared, 0)?; // before anybody looks for it
        let (for_beats, for_guard) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            spawn("heartbeat", move || run(&own, &for_beats, exit_code))?,
            spawn("guard", move || guard(&for_guard, exit_code))?,
        ];
        Ok(Heartbeat { shared, threads })
    }

    /// Sets what this rank is doing from now on.
    pub fn at(&self, step: u64, what: Move) {
        let mut doing = self.shared.doing();
        *doing = Doing { step, what, since: Instant::now(), waiting: None, ..*doing };
    }

    /// Sets how long this rank waits for others from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.doing().limits = limits;
    }

    /// Says that collectives return before they are done and do not fail when a rank is lost, as NCCL's do. Then
    /// the threads end the process.
    pub fn collectives_are_queued(&self) {
        self.shared.doing().queued = true;
    }

    /// Notes that a collective begins.
    pub fn begin(&self) {
        let mut doing = self.shared.doing();
        doing.begun += 1;
        doing.waiting = Some(Instant::now());
    }

    /// Notes that it has ended.
    pub fn done(&self) {
        self.shared.doing().waiting = None;
    }

    /// The step that this rank is at.
    pub fn step(&self) -> u64 {
        self.shared.doing().step
    }

    /// The reason that the first rank to fail gave, if one has failed.
    pub fn failure(&self) -> Option<String> {
        self.shared.failed().clone()
    }

    /// What is known of the other ranks, for [`Heartbeat::lost`].
    pub(super) fn others(&self) -> Others {
        Others::new(self.shared.member)
    }

    /// While others work and this rank waits outside of a collective: whether one has failed, or
    /// has been silent for longer than [`GONE`] or the timeout.
    pub(super) fn lost(&self, store: &Store, others: &mut Others) -> Option<Missing> {
        match others.look(store, &self.shared) {
            Err(_) => Some(Missing::Store { address: self.shared.address.clone() }),
            Ok(Some(message)) => Some(Missing::Ended { message }),
            Ok(None) => {
                let silent = GONE.min(self.shared.doing().limits.timeout);
                let missing = others.missing(silent, 0);
                matches!(missing, Missing::Silent(_)).then_some(missing)
            }
        }
    }

    /// Tells the others why this rank ends; only the first to fail is heard. The rank that serves the store
    /// waits until they can have read it.
    pub fn fail(&self, store: &Arc<Store>, role: Role, message: &str) {
        let Member { rank, size } = self.shared.member;
        let text = format!("rank {rank} of {size} has ended: {message}");
        let store = Arc::clone(store);
        let told = within(SILENT, "tell", move || {
            // If the store is gone, the others know without being told.
            if let Ok(1) = store.add("failures", 1) {
                let _ = store.set(FAILED, text.as_bytes());
            }
        });
        if told.is_some() && role == Role::Serve {
            thread::sleep(3 * BEAT);
        }
    }

    /// Finds the cause of a failed collective. Takes a few seconds, in which a lost rank sends no beats.
    pub fn explain(&self, store: &Arc<Store>) -> Missing {
        self.done();
        let (shared, store) = (Arc::clone(&self.shared), Arc::clone(store));
        let found = within(2 * SILENT, "explain", move || find_missing(&store, &shared));
        found.unwrap_or_else(|| Missing::Store { address: self.shared.address.clone() })
    }
}

/// Runs `body` in a thread; returns its result if it comes in time. Where the network is cut a store never
/// answers, and the thread is abandoned.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let started = spawn(name, move || {
        let _ = sender.send(body()); // nobody may wait any more
    });
    started.ok().and_then(|_| receiver.recv_timeout(limit).ok())
}

fn find_missing(store: &Store, shared: &Shared) -> Missing {
    let begun = shared.doing().begun;
    let mut others = Others::new(shared.member);
    let start = Instant::now();
    loop {
        let looked = others.look(store, shared);
        let waited = start.elapsed();
        match looked {
            Ok(Some(message)) => return Missing::Ended { message },
            Err(_) => return Missing::Store { address: shared.address.clone() },
            Ok(None) if waited < SILENT + BEAT => {}
            Ok(None) => return others.missing(SILENT, begun),
        }
        thread::sleep(BEAT / 4);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            let _ = thread.join(); // a panic of it has been printed
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ShimError> {
    let made = thread::Builder::new().name(name.into()).spawn(body);
    made.map_err(|error| {
        let hint = detco_shards::limits::of_threads(&error);
        ShimError::new(format!("cannot start a thread: {error}{hint}"))
    })
}

/// Whether rank 0 was writing a checkpoint at its last beat, and the beat's number.
pub(super) fn first_saves(store: &Store) -> Option<u64> {
    let beat = beat_of(store, 0).ok().flatten()?;
    (beat.what == Move::Save.to_string()).then_some(beat.number)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};

    use super::others::{Beat, key};
    use super::state::GRACE;
    use super::*;
    use crate::shim::c10d;

    #[test]
    fn where_collectives_are_queued_any_part_of_a_step_may_wait() {
        let limits = Limits { slow: Duration::from_secs(60), timeout: Duration::from_secs(600) };
        let since = Instant::now();
        let at = |what, queued| {
            Doing { step: 1, what, since, begun: 0, waiting: None, queued, limits }.waits()
        };
        for what in [Move::Shuffle, Move::Backward, Move::Report, Move::Update, Move::Check] {
            assert_eq!((at(what, false), at(what, true)), (None, Some(since)), "{what}");
        }
        for own in [Move::Start, Move::Data, Move::Save, Move::Monitor] {
            assert_eq!(at(own, true), None, "{own}");
        }
    }

    #[test]
    fn a_save_may_take_as_long_as_ranks_wait_for_each_other() {
        let limits = Limits { slow: Duration::from_secs(60), timeout: Duration::from_secs(600) };
        let grace = |what, limits| {
            let (since, waiting, queued) = (Instant::now(), None, false);
            Doing { step: 1, what, since, begun: 0, waiting, queued, limits }.grace()
        };
        assert_eq!(grace(Move::Save, limits), limits.timeout);
        for what in [Move::Backward, Move::Data, Move::Monitor] {
            assert_eq!(grace(what, limits), GRACE, "{what}");
        }
        let short = Limits { timeout: Duration::from_secs(3), ..limits };
        assert_eq!(grace(Move::Save, short), GRACE);
    }

    /// A rank of a test: this program again, for that test alone, with what it is to be in a variable.
    const ROLE: &str = "DETCO_TEST_PORT";
    const PATIENCE: Duration = Duration::from_secs(60);

    fn start(test: &str, role: &str) -> std::process::Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(ROLE, role);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Rank 0, and where it serves.
    fn start_first(test: &str) -> (std::process::Child, String) {
        let mut first = start(test, "serve");
        let lines = BufReader::new(first.stdout.take().unwrap()).lines();
        let port = lines
            .map_while(Result::ok)
            .find_map(|line| line.split_once("port ").map(|(_, port)| port.trim().to_string()));
        (first, port.expect("rank 0 says where it serves"))
    }

    /// The store as rank 0, which serves it, or as rank 1 has it, and which of them this is.
    fn meet(role: &str) -> (Arc<Store>, usize) {
        let (port, what, rank) = match role.parse() {
            Ok(port) => (port, Role::Join, 1),
            Err(_) => (0, Role::Serve, 0),
        };
        let store = Store::open("127.0.0.1", port, what, "test", PATIENCE).unwrap();
        if rank == 0 {
            println!("port {}", store.port());
        }
        (Arc::new(store), rank)
    }

    fn watch_as(store: &Store, rank: usize, limits: Limits) -> Heartbeat {
        let member = Member { rank, size: 2 };
        Heartbeat::start(store, member, "here".into(), limits, 69).unwrap()
    }

    /// Rank 1 fails while rank 0 writes a checkpoint, which takes longer than the others have to end.
    #[test]
    fn a_save_is_finished_when_another_rank_fails() {
        const NAME: &str = "dist::heartbeat::tests::a_save_is_finished_when_another_rank_fails";
        let limits = Limits { slow: PATIENCE, timeout: PATIENCE };
        if let Some(role) = crate::config::variable(ROLE) {
            let (store, rank) = meet(&role);
            let heartbeat = watch_as(&store, rank, limits);
            heartbeat.at(5, Move::Save);
            if rank == 1 {
                heartbeat.fail(&store, Role::Join, "of itself");
                c10d::exit(9);
            }
            while heartbeat.failure().is_none() {
                thread::sleep(BEAT);
            }
            thread::sleep(GRACE + 4 * BEAT);
            c10d::exit(7);
        }
        let (first, port) = start_first(NAME);
        let second = start(NAME, &port).wait_with_output().unwrap();
        assert_eq!(second.status.code(), Some(9));
        let output = first.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "the save was ended: {said}");
    }

    /// As on GPUs: rank 0 hangs in its own work, since what it reads waits for rank 1, which is gone
    /// without a word. For how long is told, though nobody looked for it before.
    #[test]
    fn a_rank_whose_collectives_are_queued_ends_when_another_is_gone() {
        const NAME: &str =
            "dist::heartbeat::tests::a_rank_whose_collectives_are_queued_ends_when_another_is_gone";
        let limits = Limits { slow: Duration::from_secs(3), timeout: Duration::from_secs(6) };
        if let Some(role) = crate::config::variable(ROLE) {
            let (store, rank) = meet(&role);
            let heartbeat = watch_as(&store, rank, limits);
            heartbeat.collectives_are_queued();
            heartbeat.at(5, Move::Update);
            thread::sleep(if rank == 0 { PATIENCE } else { Duration::from_secs(2) });
            c10d::exit(9);
        }
        let (first, port) = start_first(NAME);
        assert_eq!(start(NAME, &port).wait().unwrap().code(), Some(9));
        let output = first.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(69), "{said}");
        assert!(
            said.contains("at the update of step 5, ends: rank 1 is lost: silent for"),
            "{said}"
        );
    }

    /// Whoever begins to look for a lost rank knows how long it has been silent.
    #[test]
    fn a_lost_rank_is_told_with_its_whole_silence() {
        let store = Store::open("127.0.0.1", 0, Role::Serve, "silence", PATIENCE).unwrap();
        let limits = Limits { slow: PATIENCE, timeout: PATIENCE };
        let heartbeat = watch_as(&store, 0, limits);
        let gone = Beat { number: 7, step: 3, what: "backward".into(), busy_ms: 0, begun: 1 };
        store.set(&key(1), &serde_json::to_vec(&gone).unwrap()).unwrap();
        let since = heartbeat.shared.heard(1, 7);
        thread::sleep(4 * BEAT);
        let mut others = heartbeat.others();
        others.look(&store, &heartbeat.shared).unwrap();
        thread::sleep(BEAT);
        let Missing::Silent(lost) = others.missing(BEAT / 2, 0) else { panic!("{others:?}") };
        assert_eq!((lost[0].rank, lost[0].step), (1, 3));
        let all = since.elapsed().as_millis() as u64;
        assert!(lost[0].silent_ms + 1 >= 5 * BEAT.as_millis() as u64 && lost[0].silent_ms <= all);
    }
}
