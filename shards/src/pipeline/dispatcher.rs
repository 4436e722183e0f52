//! The dispatcher: one thread that turns the order into tasks for the workers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, TryRecvError, select};

use super::LoaderOptions;
use super::sequence::{Finished, Work};
use crate::order::{Cursor, Epoch};
use crate::slab::{Slab, Slot};
use crate::stats::{Stage, Stats};
use crate::stream::ShardSet;
use crate::stream::remote::PinnedShard;
use crate::trace::Recorder;

/// The name of the dispatcher's thread.
pub(crate) const DISPATCHER: &str = "detco-dispatcher";

/// Recycled memory of a batch, opened for many workers at once.
pub(crate) trait Room: Send + 'static {
    /// The right to write one of its samples.
    type Slot: Send;

    /// A slot for each of the first `n` samples, in their order.
    fn open(self, n: usize) -> Vec<Self::Slot>;
}

impl Room for Slab {
    type Slot = Slot;

    fn open(self, n: usize) -> Vec<Slot> {
        self.into_slots(n)
    }
}

#[derive(Debug)]
pub(crate) struct Task<S> {
    pub(crate) work: Arc<Work>,
    /// The sample's index in the batch.
    pub(crate) index: usize,
    pub(crate) slot: S,
    /// Keeps a remote shard mapped until the sample has been read.
    pub(crate) held: Option<Arc<PinnedShard>>,
}

/// The dispatcher's source of free memory, and its signals to stop.
pub(crate) struct Rooms<R> {
    pub(crate) free: Receiver<R>,
    pub(crate) stopped: Receiver<()>,
    /// Ends the dispatcher's waits for remote shards, during which it does not see its channels.
    pub(crate) ended: Arc<AtomicBool>,
}

/// The dispatcher: turns the order into tasks, as far ahead as free memory and
/// [`TASKS_MAX`](super::TASKS_MAX) allow. `F` is the type of a finished batch.
pub(crate) struct Dispatcher<R: Room, F> {
    set: Arc<ShardSet>,
    options: LoaderOptions,
    rooms: Rooms<R>,
    tasks: Sender<Task<R::Slot>>,
    finish: Sender<Finished<F>>,
    stats: Arc<Stats>,
    recorder: Option<Recorder>,
    /// The shards last announced to the set, and their epoch.
    wanted: Option<(u32, Range<usize>)>,
    /// The shards that are read, if the set is remote and they are read in order.
    rising: Option<Vec<u32>>,
}

impl<R: Room, F> Dispatcher<R, F> {
    pub(crate) fn new(
        set: &Arc<ShardSet>,
        options: &LoaderOptions,
        rooms: Rooms<R>,
        tasks: Sender<Task<R::Slot>>,
        finish: Sender<Finished<F>>,
        stats: &Arc<Stats>,
    ) -> Dispatcher<R, F> {
        let recorder = options.trace.as_ref().map(|trace| trace.recorder(DISPATCHER.into()));
        let (set, options, stats) = (Arc::clone(set), options.clone(), Arc::clone(stats));
        let rising = (set.is_remote() && options.order.is_sequential()).then(|| {
            let of = |sample| set.shard_of(sample);
            options.order.epoch(0).shards(0, set.shards().len(), &of)
        });
        let wanted = None;
        Dispatcher { set, options, rooms, tasks, finish, stats, recorder, wanted, rising }
    }

    pub(crate) fn run(mut self) {
        let order = self.options.order.clone();
        let (rank, world) = self.options.rank;
        let mut cursor = self.options.start;
        let mut epoch = order.epoch(cursor.epoch);
        let mut number = 0;
        while cursor.epoch < self.options.epochs {
            if order.is_empty(cursor.step) {
                cursor = Cursor { epoch: cursor.epoch + 1, step: 0 };
                epoch = order.epoch(cursor.epoch);
                continue;
            }
            self.want(&epoch, cursor);
            let slots = order.slots(cursor.step, rank, world);
            let samples: Vec<u64> =
                slots.clone().map(|slot| epoch.sample(cursor.step, slot)).collect();
            let work = Work::new(cursor, number, slots.start, samples, self.options.labels);
            if !self.dispatch(Arc::new(work)) {
                return;
            }
            cursor.step += 1;
            number += 1;
        }
    }

    /// Announces the next shards to a remote set when they change. A sequential order announces them with each
    /// sample instead, since one batch may be of more shards than the cache holds.
    fn want(&mut self, epoch: &Epoch<'_>, cursor: Cursor) {
        if !self.set.is_remote() || self.rising.is_some() {
            return;
        }
        let shards = self.set.shards().len();
        let of = |sample| self.set.shard_of(sample);
        let reading = epoch.reading(cursor.step, shards, &of);
        let now = Some((cursor.epoch, reading.clone()));
        if self.wanted == now {
            return;
        }
        self.wanted = now;
        let mut all = epoch.shards(cursor.step, shards, &of);
        all.drain(..reading.start);
        if cursor.epoch + 1 < self.options.epochs {
            let mut seen = vec![false; shards];
            all.iter().for_each(|shard| seen[*shard as usize] = true);
            let next = self.options.order.epoch(cursor.epoch + 1).shards(0, shards, &of);
            all.extend(next.into_iter().filter(|shard| !seen[*shard as usize]));
        }
        self.set.want(all, reading.len() as u32);
    }

    /// Announces the next shards of a sequential order to a remote set, from this sample's on.
    fn want_from(&mut self, epoch: u32, sample: u64) {
        let Some(all) = &self.rising else { return };
        let shard = self.set.shard_of(sample) as u32;
        let at = all.partition_point(|other| *other < shard);
        let now = Some((epoch, at..at + 1));
        if self.wanted == now {
            return;
        }
        self.wanted = now;
        let again = if epoch + 1 < self.options.epochs { &all[..at] } else { &[] };
        self.set.want([&all[at..], again].concat(), 1);
    }

    /// Hands out the tasks of a batch; returns false when the loader is gone.
    fn dispatch(&mut self, work: Arc<Work>) -> bool {
        if work.samples.is_empty() {
            return self.finish.send(Finished { work, room: None }).is_ok();
        }
        let (start, found) = (Instant::now(), self.rooms.free.len());
        let room = select! {
            recv(self.rooms.free) -> room => room.ok(),
            recv(self.rooms.stopped) -> _ => None,
        };
        let mut end = Instant::now();
        self.stats.dispatcher().get.waited(end - start, found);
        self.span("wait for a slab", start, end, work.number);
        let Some(room) = room else { return false };
        for (index, slot) in room.open(work.samples.len()).into_iter().enumerate() {
            let sample = work.samples[index];
            self.want_from(work.cursor.epoch, sample);
            // Without its shard the worker meets the same error, and tells it as the sample's.
            let ended = &self.rooms.ended;
            let held = self.set.ready(sample, &|| ended.load(Ordering::Relaxed)).ok().flatten();
            if self.set.is_remote() {
                self.stats.shard_waited(end.elapsed());
            }
            if let Some((Stage::Get, time)) = self.options.handicap {
                std::thread::sleep(time);
            }
            let (start, found) = (Instant::now(), self.tasks.len());
            self.span("read ahead", end, start, sample);
            let task = Task { work: Arc::clone(&work), index, slot, held };
            if self.tasks.send(task).is_err() {
                return false;
            }
            end = Instant::now();
            self.stats.dispatcher().put.waited(end - start, found);
        }
        // Checked once a batch as well: with many free slabs the select above may not look.
        !matches!(self.rooms.stopped.try_recv(), Err(TryRecvError::Disconnected))
    }

    fn span(&mut self, name: &'static str, start: Instant, end: Instant, of: u64) {
        if let Some(recorder) = &mut self.recorder {
            recorder.span(name, start, end, of);
        }
    }
}
