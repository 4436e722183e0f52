//! Which samples each update was made of, and which were bad: JSON lines, a file a rank.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use detco_shards::order::Cursor;
use detco_shards::pipeline::{BadSample, PipelineError, bad_budget};

use super::Run;
use super::error::{TrainError, io_error};
use crate::checkpoint;
use crate::shim::c10d::Member;
use crate::source::Taken;

/// Bad samples of a run, one JSON object a line.
pub(super) const QUARANTINE: &str = "quarantine";

/// Which samples each step was made of, one JSON object a line.
const SAMPLES: &str = "samples";

impl Run {
    /// Appends what the batch was made of to `samples.jsonl`, if asked to, and its bad samples to
    /// `quarantine.jsonl`.
    pub(super) fn quarantine(&mut self, taken: &Taken) -> Result<(), TrainError> {
        if self.config.monitor.samples {
            let Cursor { epoch, step } = taken.cursor();
            let (rank, size) = (self.world.rank() as u32, self.world.size() as u32);
            let slot = self.order.slots(step, rank, size).start;
            let (at, samples) = (self.step + 1, taken.samples());
            let line = serde_json::json!({
                "step": at, "rank": rank, "epoch": epoch, "batch": step, "slot": slot, "samples": samples,
            });
            self.append(SAMPLES, &format!("{line}\n"))?;
        }
        let Some(last) = taken.bad().last() else { return Ok(()) };
        self.replaced += taken.bad().len() as u64;
        self.list_bad(taken.bad())?;
        let (epoch, samples) = (taken.cursor().epoch, self.set.len());
        let bad = self.world.count_bad(epoch, taken.bad().len() as u64)?;
        let budget = bad_budget(samples, self.config.data.bad_share_max);
        if self.world.size() > 1 && bad > budget {
            // Those of this batch are in the list already.
            let (last, list) = (last.error.to_string(), Vec::new());
            return Err(
                PipelineError::TooManyBad { bad, samples, epoch, budget, last, list }.into()
            );
        }
        Ok(())
    }

    /// Adds to `quarantine.jsonl` what the next update was to be made of.
    pub(super) fn list_bad(&self, samples: &[BadSample]) -> Result<(), TrainError> {
        let mut lines = String::new();
        for bad in samples {
            let line = serde_json::json!({
                "step": self.step + 1,
                "rank": self.world.rank(),
                "sample": bad.sample,
                "shard": bad.shard.display().to_string(),
                "key": bad.key,
                "offset": bad.offset,
                "reason": bad.error.to_string(),
                "substitute": bad.substitute,
            });
            lines.push_str(&line.to_string());
            lines.push('\n');
        }
        self.append(QUARANTINE, &lines)
    }

    /// Adds to this rank's file of that name.
    fn append(&self, name: &str, lines: &str) -> Result<(), TrainError> {
        if lines.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(file_of(name, self.world.rank()));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(io_error("append to", &path))
    }
}

/// Ranks do not write into each other's files: `samples.jsonl`, `samples.1.jsonl`.
pub(super) fn file_of(name: &str, rank: usize) -> String {
    if rank == 0 { format!("{name}.jsonl") } else { format!("{name}.{rank}.jsonl") }
}

/// Drops the lines of steps after `step`, which are about to be made again: those of this rank, and on the
/// last rank those of ranks that there were before as well.
pub(super) fn cut_lines(folder: &Path, member: Member, step: u64) -> Result<(), TrainError> {
    for name in [QUARANTINE, SAMPLES] {
        cut(&folder.join(file_of(name, member.rank)), member.rank, step)?;
        let gone = (member.size..).map(|rank| (rank, folder.join(file_of(name, rank))));
        let last = member.rank + 1 == member.size;
        // Ranks leave no gaps, but for those that had nothing to write: look a few further.
        for (rank, path) in gone.take(RANKS_BEFORE).filter(|(_, path)| last && path.exists()) {
            cut(&path, rank, step)?;
        }
    }
    Ok(())
}

/// Ranks beyond this world's whose files are looked for.
const RANKS_BEFORE: usize = 4096;

/// Keeps the lines of steps up to `step`. Lines from before steps were counted from 1 here, as everywhere, name
/// no rank: they are counted on.
fn cut(path: &Path, rank: usize, step: u64) -> Result<(), TrainError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    let before = |line: &str| {
        let mut value = serde_json::from_str::<serde_json::Value>(line).ok()?;
        let from_0 = value.get("rank").is_none();
        let at = value.get("step")?.as_u64()?.checked_add(u64::from(from_0))?;
        if from_0 {
            (value["step"], value["rank"]) = (at.into(), rank.into());
        }
        (at <= step).then(|| format!("{value}\n"))
    };
    let kept: String = text.lines().filter_map(before).collect();
    Ok(checkpoint::write_whole(path, kept.as_bytes())?)
}
