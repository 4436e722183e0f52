//! A worker: one thread that reads, decodes and renders samples into their slots.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::{Receiver, Sender};

use super::dispatcher::Task;
use super::sequence::{Finished, Work};
use super::{LoaderOptions, SampleError, Views, touch};
use crate::decode::{DecodeError, Decoder, Frame, Image, Part, probe};
use crate::order::Cursor;
use crate::slab::{Slab, Slot};
use crate::stats::{Mark, Stage, WorkerStats};
use crate::stream::ShardSet;
use crate::trace::Recorder;
use crate::views::{Note, Renderer, SamplePlan};

/// A worker: one thread's decoder, renderer and scratch memory, made before the first sample.
pub(super) struct Worker<'a> {
    set: &'a ShardSet,
    options: &'a LoaderOptions,
    stats: &'a WorkerStats,
    recorder: Option<Recorder>,
    /// The beginning of the current stage.
    since: Mark,
    decoder: Decoder,
    renderer: Renderer,
    plan: SamplePlan,
    image: Image,
    ended: &'a AtomicBool,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        set: &'a ShardSet,
        options: &'a LoaderOptions,
        stats: &'a WorkerStats,
        recorder: Option<Recorder>,
        ended: &'a AtomicBool,
    ) -> Worker<'a> {
        let (decoder, renderer) = (Decoder::new(), Renderer::new());
        let (since, plan, image) = (Mark::now(), SamplePlan::default(), Image::new());
        Worker { set, options, stats, recorder, since, decoder, renderer, plan, image, ended }
    }

    pub(super) fn run(&mut self, tasks: &Receiver<Task<Slot>>, finish: &Sender<Finished<Slab>>) {
        self.since = Mark::now();
        loop {
            let (start, found) = (self.since.wall, tasks.len());
            let Ok(Task { work, index, mut slot, mut held }) = tasks.recv() else { return };
            self.lap(Stage::Get, work.samples[index]);
            self.stats.get().waited(self.since.wall - start, found);
            let (set, options) = (self.set, self.options);
            work.settle(index, set, options, |id| {
                let made = self.sample(id, &work, &mut slot);
                held = None; // its shard may go, before a substitute's is waited for
                made
            });
            let Some(slab) = slot.done() else { continue };
            let (start, found, number) = (self.since.wall, finish.len(), work.number);
            self.hold(Stage::Put);
            if finish.send(Finished { work, room: Some(slab) }).is_err() {
                return;
            }
            self.lap(Stage::Put, number);
            self.stats.put().waited(self.since.wall - start, found);
        }
    }

    /// Ends a stage and counts the time since the last one ended for it.
    fn lap(&mut self, stage: Stage, of: u64) {
        let start = self.since.wall;
        self.since = self.stats.lap(stage, self.since);
        if let Some(recorder) = &mut self.recorder {
            recorder.span(stage.name(), start, self.since.wall, of);
        }
    }

    /// Waits for the injected delay of a stage, if there is one.
    fn hold(&self, stage: Stage) {
        let Some((_, time)) = self.options.handicap.filter(|(held, _)| *held == stage) else {
            return;
        };
        if matches!(stage, Stage::Read | Stage::Put) {
            return std::thread::sleep(time);
        }
        let start = Mark::now().cpu;
        while u128::from(Mark::now().cpu - start) < time.as_nanos() {
            std::hint::spin_loop();
        }
    }

    fn sample(&mut self, id: u64, work: &Work, slot: &mut Slot) -> Result<(), SampleError> {
        let caught = catch_unwind(AssertUnwindSafe(|| self.render(id, work, slot)));
        caught.unwrap_or_else(|panic| {
            // What the panic left half-done is thrown away.
            (self.decoder, self.renderer) = (Decoder::new(), Renderer::new());
            self.image = Image::new();
            Err(SampleError::panicked(&*panic))
        })
    }

    fn render(&mut self, id: u64, work: &Work, slot: &mut Slot) -> Result<(), SampleError> {
        let sample = self.set.sample_until(id, &|| self.ended.load(Ordering::Relaxed))?;
        touch(sample.jpeg(), &self.options.views);
        self.hold(Stage::Read);
        self.lap(Stage::Read, id);
        let mut part = None;
        if !matches!(self.options.views, Views::Read) {
            let decoded = self.decode(id, work.cursor, sample.jpeg());
            self.hold(Stage::Decode);
            self.lap(Stage::Decode, id);
            match decoded {
                Ok(decoded) => part = Some(decoded),
                Err(error) => {
                    self.set.check_file(&sample)?;
                    return Err(error.into());
                }
            }
        }
        // Zeros in the place of a shard that shrank may decode as well.
        self.set.check(&sample)?;
        if let Some(part) = part {
            self.views(part, slot);
            self.hold(Stage::Views);
            self.lap(Stage::Views, id);
        }
        if self.options.labels {
            work.label(slot.index(), &sample);
        }
        self.stats.sample(sample.jpeg().len());
        Ok(())
    }

    /// Draws the views and decodes the part of the image that they need.
    fn decode(&mut self, id: u64, cursor: Cursor, jpeg: &[u8]) -> Result<Part, DecodeError> {
        let header = probe(jpeg)?;
        let (options, image) = (self.options, [header.width, header.height]);
        options.views.draw(image, (options.seed, cursor.epoch, id), &mut self.plan);
        let reduction = if options.reduce { u32::MAX } else { 1 };
        let wanted = Views::part(&self.plan, image, reduction);
        self.decoder.decode_part(jpeg, &header, wanted, &mut self.image)
    }

    /// Renders the views of the decoded part.
    fn views(&mut self, part: Part, slot: &mut Slot) {
        let frame = Frame { image: &self.image, part };
        for (number, plan) in self.plan.views.iter().enumerate() {
            self.renderer.view(frame, plan, slot.view(number));
            slot.note(number, &Note::of(plan));
        }
    }
}
