//! Who keeps whom waiting.
//!
//! A thread of every rank writes a beat into the store twice a second: what the rank does, since
//! when, and how many collectives it has begun. A rank that waits for long reads the beats of the
//! others: who has stopped beating is hung, killed or cut off, who has begun fewer collectives is
//! slow. The thread also ends a process whose main thread cannot: one that hangs in a collective
//! past its timeout, or whose store is gone. A call to a store behind a cut cable does not come
//! back at all: a second thread, which never calls, sees to that.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Move;
use crate::shim::ShimError;
use crate::shim::c10d::{self, Member, Role, Store};

/// Between two beats: a lost rank is known within seconds, and a thousand ranks load the store with
/// four thousand small requests a second.
const BEAT: Duration = Duration::from_millis(500);
/// Without a beat for so long a rank counts as silent, where something has failed already.
const SILENT: Duration = Duration::from_secs(3);
/// Without a beat for so long a rank is gone, though nothing has failed.
const GONE: Duration = Duration::from_secs(30);
/// Where collectives are only queued, others are looked at after so long without progress.
const LOOKED_AT: Duration = Duration::from_secs(5);
/// What the main thread has to end by itself, before the watch ends the process; longer where it saves.
const GRACE: Duration = Duration::from_secs(10);
/// Where the first rank that fails says why.
const FAILED: &str = "failed";

/// What a rank did when it was last heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The rank.
    pub rank: usize,
    /// Its step.
    pub step: u64,
    /// What it did.
    pub what: String,
    /// For how long it had done that, in milliseconds.
    pub busy_ms: u64,
    /// Since when nothing was heard of it, in milliseconds.
    pub silent_ms: u64,
}

/// Who is not where the others are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// A rank ended with an error and said so.
    Ended {
        /// `rank 2 of 4: …`
        message: String,
    },
    /// These have stopped beating.
    Silent(Vec<Sighting>),
    /// These are alive and behind.
    Late(Vec<Sighting>),
    /// The store does not answer.
    Store {
        /// `host:port`.
        address: String,
    },
    /// All ranks are alive, and as far as this one.
    Nobody,
}

impl Absence {
    /// The ranks that are named.
    fn ranks(&self) -> Vec<usize> {
        match self {
            Absence::Silent(all) | Absence::Late(all) => all.iter().map(|one| one.rank).collect(),
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| ms as f64 / 1e3;
        match self {
            Absence::Ended { message } => write!(f, "{message}"),
            Absence::Store { address } => {
                write!(
                    f,
                    "the store at {address} does not answer: it is gone, or the network is cut"
                )
            }
            Absence::Nobody => write!(f, "all ranks are alive and at the same point"),
            Absence::Silent(all) => {
                for (i, one) in all.iter().enumerate() {
                    let Sighting { rank, step, what, silent_ms, .. } = one;
                    let between = if i == 0 { "" } else { "; " };
                    let silent = seconds(*silent_ms);
                    write!(
                        f,
                        "{between}rank {rank} is lost: silent for {silent:.1} s, last seen at \
                         {what} of step {step}"
                    )?;
                }
                Ok(())
            }
            Absence::Late(all) => {
                for (i, one) in all.iter().enumerate() {
                    let Sighting { rank, step, what, busy_ms, .. } = one;
                    let between = if i == 0 { "" } else { "; " };
                    let busy = seconds(*busy_ms);
                    write!(
                        f,
                        "{between}rank {rank} is slow: for {busy:.1} s at {what} of step {step}"
                    )?;
                }
                Ok(())
            }
        }
    }
}

/// What a rank says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Beat {
    /// Counts up, so that a reader sees whether it is new.
    number: u64,
    step: u64,
    what: String,
    busy_ms: u64,
    /// Collectives begun.
    begun: u64,
}

/// How patient a rank is.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Those who let others wait for longer are named.
    pub slow: Duration,
    /// Those who let others wait for longer end the run.
    pub timeout: Duration,
}

/// What the main thread does, for the thread that beats.
#[derive(Clone, Copy, Debug)]
struct Doing {
    step: u64,
    what: Move,
    since: Instant,
    begun: u64,
    /// In a collective since.
    waiting: Option<Instant>,
    /// Whether collectives are only queued, and waited for elsewhere: on GPUs.
    queued: bool,
    limits: Limits,
}

impl Doing {
    /// Since when this rank may be waiting for others. Where collectives are queued that can be in
    /// whatever reads a result, so in any part of a step.
    fn waits(&self) -> Option<Instant> {
        let own = [Move::Start, Move::Data, Move::Save, Move::Monitor].contains(&self.what);
        self.waiting.or((self.queued && !own).then_some(self.since))
    }

    /// How long this rank may go on after another has failed. A checkpoint that is being written is wanted more
    /// than ever.
    fn grace(&self) -> Duration {
        match self.what {
            Move::Save => self.limits.timeout.max(GRACE),
            _ => GRACE,
        }
    }
}

#[derive(Debug)]
struct Shared {
    member: Member,
    address: String,
    doing: Mutex<Doing>,
    ended: AtomicBool,
    /// When the store last answered.
    answered: Mutex<Instant>,
    /// What the first rank that failed has said.
    failed: Mutex<Option<String>>,
    /// The newest beat that this rank has seen of each other, and when it first saw it. Every rank is looked at
    /// in turn, so that it is known since when a lost one has been silent.
    heard: Mutex<Vec<Option<(u64, Instant)>>>,
}

impl Shared {
    fn doing(&self) -> MutexGuard<'_, Doing> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answered(&self) -> MutexGuard<'_, Instant> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> MutexGuard<'_, Option<String>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when the beat with this number has been the newest of a rank, as far as this rank has seen.
    fn heard(&self, rank: usize, number: u64) -> Instant {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut heard[rank] {
            Some((last, since)) if *last == number => *since,
            place => place.insert((number, Instant::now())).1,
        }
    }
}

/// The threads that beat and that guard; they end when it is dropped.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Begins to beat. `exit_code` is what the process ends with if the watch has to end it.
    ///
    /// # Errors
    /// When the store is gone, or the system refuses a thread.
    pub fn start(
        store: &Store,
        member: Member,
        address: String,
        limits: Limits,
        exit_code: u8,
    ) -> Result<Watch, ShimError> {
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
        let (for_watch, for_guard) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            spawn("watch", move || watch(&own, &for_watch, exit_code))?,
            spawn("guard", move || guard(&for_guard, exit_code))?,
        ];
        Ok(Watch { shared, threads })
    }

    /// What this rank does from now on.
    pub fn at(&self, step: u64, what: Move) {
        let mut doing = self.shared.doing();
        *doing = Doing { step, what, since: Instant::now(), waiting: None, ..*doing };
    }

    /// How patient this rank is from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.doing().limits = limits;
    }

    /// From now on collectives return before they are done, and fail nobody when a rank is lost: NCCL's
    /// do. The watch then ends the process itself.
    pub fn collectives_are_queued(&self) {
        self.shared.doing().queued = true;
    }

    /// A collective begins.
    pub fn begin(&self) {
        let mut doing = self.shared.doing();
        doing.begun += 1;
        doing.waiting = Some(Instant::now());
    }

    /// It has ended.
    pub fn done(&self) {
        self.shared.doing().waiting = None;
    }

    /// The step that this rank is at.
    pub fn step(&self) -> u64 {
        self.shared.doing().step
    }

    /// What the first rank that failed has said, if one has.
    pub fn failure(&self) -> Option<String> {
        self.shared.failed().clone()
    }

    /// What is known of the other ranks, for [`Watch::lost`].
    pub(super) fn others(&self) -> Others {
        Others::new(self.shared.member)
    }

    /// While others work and this rank waits outside of a collective: whether one has failed, or
    /// has been silent for longer than [`GONE`] or the timeout.
    pub(super) fn lost(&self, store: &Store, others: &mut Others) -> Option<Absence> {
        match others.look(store, &self.shared) {
            Err(_) => Some(Absence::Store { address: self.shared.address.clone() }),
            Ok(Some(message)) => Some(Absence::Ended { message }),
            Ok(None) => {
                let silent = GONE.min(self.shared.doing().limits.timeout);
                let absence = others.absence(silent, 0);
                matches!(absence, Absence::Silent(_)).then_some(absence)
            }
        }
    }

    /// Tells the others why this rank ends; the first to fail is heard. Who serves the store stays
    /// until they may have heard it.
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

    /// After a collective has failed: who is to blame. Takes a few seconds, in which the beats of a
    /// lost rank do not come.
    pub fn explain(&self, store: &Arc<Store>) -> Absence {
        self.done();
        let (shared, store) = (Arc::clone(&self.shared), Arc::clone(store));
        let found = within(2 * SILENT, "explain", move || look_for_absence(&store, &shared));
        found.unwrap_or_else(|| Absence::Store { address: self.shared.address.clone() })
    }
}

/// What `body` returns, if it does so in time: where the network is cut, a store's answer does not
/// come. Its thread is then left alone.
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

fn look_for_absence(store: &Store, shared: &Shared) -> Absence {
    let begun = shared.doing().begun;
    let mut others = Others::new(shared.member);
    let start = Instant::now();
    loop {
        let looked = others.look(store, shared);
        let waited = start.elapsed();
        match looked {
            Ok(Some(message)) => return Absence::Ended { message },
            Err(_) => return Absence::Store { address: shared.address.clone() },
            Ok(None) if waited < SILENT + BEAT => {}
            Ok(None) => return others.absence(SILENT, begun),
        }
        thread::sleep(BEAT / 4);
    }
}

impl Drop for Watch {
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

/// Ends the process when the store has not answered for longer than ranks wait for each other.
fn guard(shared: &Shared, exit_code: u8) {
    loop {
        thread::park_timeout(BEAT);
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let timeout = shared.doing().limits.timeout;
        if shared.answered().elapsed() > timeout + GRACE {
            end(shared, &Absence::Store { address: shared.address.clone() }, exit_code);
        }
    }
}

fn beat(store: &Store, shared: &Shared, number: u64) -> Result<(), ShimError> {
    let Doing { step, what, since, begun, .. } = *shared.doing();
    let busy_ms = since.elapsed().as_millis() as u64;
    let beat = Beat { number, step, what: what.to_string(), busy_ms, begun };
    let text = serde_json::to_vec(&beat).expect("numbers and a text have a JSON form");
    store.set(&key(shared.member.rank), &text)
}

fn key(rank: usize) -> String {
    format!("beat/{rank}")
}

/// The thread's body.
fn watch(store: &Store, shared: &Shared, exit_code: u8) {
    let mut others = Others::new(shared.member);
    let mut reported = None; // the wait that was reported last, and its length then
    let mut broken: Option<Instant> = None;
    for number in 1.. {
        thread::park_timeout(BEAT);
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let alive = beat(store, shared, number).and_then(|()| store.get(FAILED));
        if alive.is_ok() {
            *shared.answered() = Instant::now();
        }
        match &alive {
            Ok(Some(message)) => {
                let message = String::from_utf8_lossy(message).into_owned();
                shared.failed().get_or_insert(message);
            }
            Ok(None) => broken = None,
            Err(_) => {}
        }
        let grace = shared.doing().grace();
        if !matches!(alive, Ok(None)) && broken.get_or_insert_with(Instant::now).elapsed() > grace {
            let reason = shared.failed().clone().map_or_else(
                || Absence::Store { address: shared.address.clone() },
                |message| Absence::Ended { message },
            );
            end(shared, &reason, exit_code);
        }
        look_at_one(store, shared, number);
        let doing = *shared.doing();
        let Doing { queued, limits, begun, .. } = doing;
        let from = watched_from(limits).min(if queued { LOOKED_AT } else { Duration::MAX });
        let Some(since) = doing.waits().filter(|since| since.elapsed() > from) else {
            others = Others::new(shared.member);
            continue;
        };
        if others.look(store, shared).is_err() {
            continue; // counted above
        }
        let waited = since.elapsed();
        let due = match reported {
            Some((wait, length)) if wait == since => waited > 2 * length,
            _ => waited > limits.slow,
        };
        let absence = others.absence(SILENT, begun);
        // Outside of a collective it may be this rank's own work that takes long.
        if due && (doing.waiting.is_some() || absence != Absence::Nobody) {
            reported = Some((since, waited));
            report(shared, &absence, waited);
        }
        let silent = || others.absence(GONE.min(limits.timeout), begun);
        let gone = queued && matches!(silent(), Absence::Silent(_));
        if gone || waited > limits.timeout + GRACE {
            end(shared, &others.absence(SILENT, begun), exit_code);
        }
    }
}

/// Reads the beat of one other rank, of another one each time.
fn look_at_one(store: &Store, shared: &Shared, number: u64) {
    let Member { rank, size } = shared.member;
    let other = (number % size as u64) as usize;
    if other == rank {
        return;
    }
    // Where the store is gone the next beat will tell.
    if let Ok(Some(beat)) = beat_of(store, other) {
        shared.heard(other, beat.number);
    }
}

/// The last beat of a rank; none before its first, or of another program.
fn beat_of(store: &Store, rank: usize) -> Result<Option<Beat>, ShimError> {
    Ok(store.get(&key(rank))?.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// Whether rank 0 was writing a checkpoint at its last beat, and the beat's number.
pub(super) fn first_saves(store: &Store) -> Option<u64> {
    let beat = beat_of(store, 0).ok().flatten()?;
    (beat.what == Move::Save.to_string()).then_some(beat.number)
}

/// How long a wait is before the others' beats are read: long enough before a report to know who is
/// silent.
fn watched_from(limits: Limits) -> Duration {
    (limits.slow / 2).min(limits.slow.saturating_sub(SILENT + 2 * BEAT))
}

/// Names those who let others wait; said once, by the lowest rank that is not itself among them.
fn report(shared: &Shared, absence: &Absence, waited: Duration) {
    let Member { rank, size } = shared.member;
    let named = absence.ranks();
    let speaker = (0..size).find(|rank| !named.contains(rank));
    if speaker != Some(rank) {
        return;
    }
    let Doing { step, what, limits, .. } = *shared.doing();
    let (waited, timeout) = (waited.as_secs_f64(), limits.timeout.as_secs());
    note!(
        "rank {rank} of {size} has waited {waited:.0} s at {what} of step {step} (the run ends at \
         {timeout} s): {absence}"
    );
}

fn end(shared: &Shared, absence: &Absence, exit_code: u8) -> ! {
    let Member { rank, size } = shared.member;
    let Doing { step, what, .. } = *shared.doing();
    note!("error: rank {rank} of {size}, at {what} of step {step}, ends: {absence}");
    c10d::exit(i32::from(exit_code))
}

/// What was heard of the other ranks.
#[derive(Debug)]
pub(super) struct Others {
    member: Member,
    /// The last beat of each rank.
    seen: Vec<Option<Seen>>,
}

#[derive(Clone, Debug)]
struct Seen {
    beat: Beat,
    /// Since when it has been the newest that this rank has seen.
    heard: Instant,
    /// Since when it has been looked for a newer one without a pause: a process that was stopped itself, with
    /// all others, knows nothing of them.
    looked: Instant,
}

impl Others {
    fn new(member: Member) -> Others {
        Others { member, seen: vec![None; member.size] }
    }

    /// Reads all beats; returns what a rank that failed has said.
    fn look(&mut self, store: &Store, shared: &Shared) -> Result<Option<String>, ShimError> {
        if let Some(message) = store.get(FAILED)? {
            let message = String::from_utf8_lossy(&message).into_owned();
            return Ok(Some(shared.failed().get_or_insert(message).clone()));
        }
        for rank in (0..self.member.size).filter(|rank| *rank != self.member.rank) {
            let Some(beat) = beat_of(store, rank)? else { continue };
            let seen = &mut self.seen[rank];
            if seen.as_ref().is_none_or(|seen| seen.beat.number != beat.number) {
                let heard = shared.heard(rank, beat.number);
                *seen = Some(Seen { beat, heard, looked: Instant::now() });
            }
        }
        Ok(None)
    }

    /// Who is silent for longer than `silent`, else who has begun fewer collectives than `begun`.
    fn absence(&self, silent: Duration, begun: u64) -> Absence {
        let sightings = |of: &dyn Fn(&Beat, Duration) -> bool| -> Vec<Sighting> {
            let heard = self.seen.iter().enumerate();
            heard
                .filter_map(|(rank, seen)| {
                    let Seen { beat, heard, looked } = seen.as_ref()?;
                    let silent = heard.elapsed();
                    of(beat, looked.elapsed()).then(|| Sighting {
                        rank,
                        step: beat.step,
                        what: beat.what.clone(),
                        busy_ms: beat.busy_ms + silent.as_millis() as u64,
                        silent_ms: silent.as_millis() as u64,
                    })
                })
                .collect()
        };
        let lost = sightings(&|_, age| age >= silent);
        if !lost.is_empty() {
            return Absence::Silent(lost);
        }
        match sightings(&|beat, _| beat.begun < begun) {
            late if late.is_empty() => Absence::Nobody,
            late => Absence::Late(late),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

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

    fn watch_as(store: &Store, rank: usize, limits: Limits) -> Watch {
        let member = Member { rank, size: 2 };
        Watch::start(store, member, "here".into(), limits, 69).unwrap()
    }

    /// Rank 1 fails while rank 0 writes a checkpoint, which takes longer than the others have to end.
    #[test]
    fn a_save_is_finished_when_another_rank_fails() {
        const NAME: &str = "dist::watch::tests::a_save_is_finished_when_another_rank_fails";
        let limits = Limits { slow: PATIENCE, timeout: PATIENCE };
        if let Some(role) = crate::config::variable(ROLE) {
            let (store, rank) = meet(&role);
            let watch = watch_as(&store, rank, limits);
            watch.at(5, Move::Save);
            if rank == 1 {
                watch.fail(&store, Role::Join, "of itself");
                c10d::exit(9);
            }
            while watch.failure().is_none() {
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
            "dist::watch::tests::a_rank_whose_collectives_are_queued_ends_when_another_is_gone";
        let limits = Limits { slow: Duration::from_secs(3), timeout: Duration::from_secs(6) };
        if let Some(role) = crate::config::variable(ROLE) {
            let (store, rank) = meet(&role);
            let watch = watch_as(&store, rank, limits);
            watch.collectives_are_queued();
            watch.at(5, Move::Update);
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
        let watch = watch_as(&store, 0, limits);
        let gone = Beat { number: 7, step: 3, what: "backward".into(), busy_ms: 0, begun: 1 };
        store.set(&key(1), &serde_json::to_vec(&gone).unwrap()).unwrap();
        let since = watch.shared.heard(1, 7);
        thread::sleep(4 * BEAT);
        let mut others = watch.others();
        others.look(&store, &watch.shared).unwrap();
        thread::sleep(BEAT);
        let Absence::Silent(lost) = others.absence(BEAT / 2, 0) else { panic!("{others:?}") };
        assert_eq!((lost[0].rank, lost[0].step), (1, 3));
        let all = since.elapsed().as_millis() as u64;
        assert!(lost[0].silent_ms + 1 >= 5 * BEAT.as_millis() as u64 && lost[0].silent_ms <= all);
    }
}
