//! Spans of the pipeline's threads, for a timeline.
//!
//! Each thread writes spans into memory of its own and hands them over when it ends, so recording
//! takes no lock; a loader without a trace records nothing. A full track drops later spans and counts
//! them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A span of one thread's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// What the thread did.
    pub name: &'static str,
    /// When it began, in nanoseconds since the trace did.
    pub start: u64,
    /// How long it took, in nanoseconds.
    pub nanos: u64,
    /// The sample's id, or the batch's number.
    pub of: u64,
}

/// The spans of one thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Track {
    /// The thread's name.
    pub name: String,
    /// Its spans, in the order of their ends.
    pub spans: Vec<Span>,
    /// Spans that did not fit.
    pub cut: u64,
}

/// A recording that threads add their tracks to.
#[derive(Debug)]
pub struct Trace {
    begin: Instant,
    on: AtomicBool,
    spans_max: usize,
    tracks: Mutex<Vec<Track>>,
}

impl Trace {
    /// A recording that is paused. Each thread keeps `spans_max` spans of 40 bytes at most.
    pub fn new(spans_max: usize) -> Trace {
        let tracks = Mutex::new(Vec::new());
        Trace { begin: Instant::now(), on: AtomicBool::new(false), spans_max, tracks }
    }

    /// Records from now on.
    pub fn start(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    /// Records no longer.
    pub fn stop(&self) {
        self.on.store(false, Ordering::Relaxed);
    }

    /// The tracks of the threads that have ended, by name; call it after the loader was dropped.
    pub fn take(&self) -> Vec<Track> {
        let mut tracks = self.tracks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tracks = std::mem::take(&mut *tracks);
        tracks.sort_by(|a, b| a.name.cmp(&b.name));
        tracks
    }

    /// A recorder for a thread, which hands over its track when it is dropped.
    pub fn recorder(self: &Arc<Trace>, name: String) -> Recorder {
        let track = Track { name, spans: Vec::new(), cut: 0 };
        Recorder { trace: Arc::clone(self), track }
    }
}

/// The recorder of one thread.
#[derive(Debug)]
pub struct Recorder {
    trace: Arc<Trace>,
    track: Track,
}

impl Recorder {
    /// Records what the thread did from `start` to `end`, if the recording is on.
    pub fn span(&mut self, name: &'static str, start: Instant, end: Instant, of: u64) {
        if !self.trace.on.load(Ordering::Relaxed) {
            return;
        }
        if self.track.spans.len() >= self.trace.spans_max {
            self.track.cut += 1;
            return;
        }
        let nanos = end.saturating_duration_since(start).as_nanos() as u64;
        let start = start.saturating_duration_since(self.trace.begin).as_nanos() as u64;
        self.track.spans.push(Span { name, start, nanos, of });
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let empty = Track { name: String::new(), spans: Vec::new(), cut: 0 };
        let track = std::mem::replace(&mut self.track, empty);
        self.trace.tracks.lock().unwrap_or_else(PoisonError::into_inner).push(track);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_track_is_bounded_and_says_what_it_left_out() {
        let trace = Arc::new(Trace::new(3));
        let mut recorder = trace.recorder("worker 0".into());
        let now = Instant::now();
        recorder.span("before", now, now, 0);
        trace.start();
        for of in 0..5 {
            recorder.span("decode", now, now + std::time::Duration::from_nanos(7), of);
        }
        trace.stop();
        recorder.span("after", now, now, 9);
        assert!(trace.take().is_empty(), "the thread still runs");
        drop(recorder);
        let tracks = trace.take();
        assert_eq!((tracks.len(), tracks[0].cut), (1, 2));
        let spans: Vec<_> = tracks[0].spans.iter().map(|s| (s.name, s.nanos, s.of)).collect();
        assert_eq!(spans, [("decode", 7, 0), ("decode", 7, 1), ("decode", 7, 2)]);
    }
}
