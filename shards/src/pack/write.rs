//! Writing shards: threads that read, convert and append the images of one shard after another.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::convert::{Converter, Oddities};
use super::layout::Layout;
use super::source::Source;
use super::state::{Done, State};
use super::{Job, OnError, PackError, Progress, Skip};
use crate::format::name;
use crate::format::writer::ShardWriter;
use crate::pipe::side_by_side;

pub(super) fn write_shards(
    job: &Job,
    source: &Source,
    layout: &Layout,
    mine: Range<u64>,
    state: &State,
    progress: &Progress,
) -> Result<Vec<Done>, PackError> {
    let count = usize::try_from(mine.end - mine.start).unwrap_or(usize::MAX);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let results = Mutex::new(Vec::with_capacity(count));
    let work = Work { job, source, layout, state, progress, stop: &stop };
    let threads = job.workers.clamp(1, count.max(1));
    let started = side_by_side(threads, &stop, || {
        let mut buffer = Vec::new();
        let mut converter = Converter::default();
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                break;
            }
            let shard = mine.start + at as u64;
            let result = work.shard(shard, &mut buffer, &mut converter);
            stop.fetch_or(result.is_err(), Ordering::Relaxed);
            // A poisoned lock means that a sibling panicked; the scope passes that on.
            let mut all = results.lock().unwrap_or_else(|poison| poison.into_inner());
            all.push((shard, result));
        }
    });
    started.map_err(|source| PackError::Thread { source })?;
    let mut results = results.into_inner().unwrap_or_else(|poison| poison.into_inner());
    results.sort_by_key(|(shard, _)| *shard);
    let mut done = Vec::with_capacity(count);
    for (_, result) in results {
        // `None`: stopped because of a sibling's error, which is in the list too.
        done.extend(result?);
    }
    Ok(done)
}

struct Work<'a> {
    job: &'a Job,
    source: &'a Source,
    layout: &'a Layout,
    state: &'a State,
    progress: &'a Progress,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    fn shard(
        &self,
        shard: u64,
        buffer: &mut Vec<u8>,
        converter: &mut Converter,
    ) -> Result<Option<Done>, PackError> {
        let positions = self.layout.shard(shard);
        let count = positions.end - positions.start;
        if let Some(done) = self.state.done(shard)? {
            self.progress.images.fetch_add(count, Ordering::Relaxed);
            self.progress.resumed.fetch_add(count, Ordering::Relaxed);
            return Ok(Some(done));
        }
        let mut writer = ShardWriter::create(&self.job.out, &shard_name(shard))?;
        let mut oddities = Oddities::new();
        let mut classes = BTreeMap::new();
        let mut skips = Vec::new();
        let mut member = String::new();
        for position in positions.clone() {
            if self.stop.load(Ordering::Relaxed) {
                writer.discard();
                return Ok(None);
            }
            let entry = &self.source.entries[self.layout.entry(position)];
            if position + 1 < positions.end {
                self.source.will_need(&self.source.entries[self.layout.entry(position + 1)]);
            }
            let stored = self.source.read(entry, buffer).and_then(|bytes| {
                let extension = name::extension(&entry.name);
                converter.convert(bytes, extension, &self.job.options, &mut oddities)
            });
            match stored {
                Ok(stored) => {
                    member.clear();
                    member.push_str(&self.source.key(entry));
                    let stem = member.len();
                    member.push_str(".jpg");
                    writer.append(&member, &stored)?;
                    if let Some(class) = entry.class() {
                        member.truncate(stem);
                        member.push_str(".cls");
                        writer.append(&member, class.to_string().as_bytes())?;
                        *classes.entry(class).or_default() += 1;
                    }
                }
                Err(reason) => {
                    let skip = Skip::new(&entry.name, &reason);
                    // That the source shrank is no image's fault: `close` says so.
                    let own = self.source.check().is_ok();
                    if own && self.job.options.on_error == OnError::Fail {
                        writer.discard();
                        let (path, reason) = (skip.path, skip.reason);
                        return Err(PackError::FileMeanwhile { path, reason });
                    }
                    skips.push(skip);
                }
            }
            self.progress.images.fetch_add(1, Ordering::Relaxed);
            self.progress.bytes.fetch_add(entry.size, Ordering::Relaxed);
        }
        self.close(shard, writer, Done { record: None, oddities, classes, skips })
    }

    /// Renames a shard to its final name, unless it is empty or its source has changed.
    fn close(
        &self,
        shard: u64,
        writer: ShardWriter,
        mut done: Done,
    ) -> Result<Option<Done>, PackError> {
        if let Err(changed) = self.source.check() {
            // Zeros stand where the source was: nothing of this shard is to be believed.
            writer.discard();
            return Err(changed.into());
        }
        if writer.samples() == 0 {
            writer.discard();
            self.state.record(shard, &done)?;
            return Ok(Some(done));
        }
        let written = writer.finish()?;
        done.record = Some(written.record.clone());
        // First the record, then the names: a shard that has its name has its record.
        self.state.record(shard, &done)?;
        written.seal()?;
        Ok(Some(done))
    }
}

/// `000000.tar`.
pub(super) fn shard_name(shard: u64) -> String {
    format!("{shard:06}.tar")
}
