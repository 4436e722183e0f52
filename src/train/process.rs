//! What a run takes of its process: the lock on its folder, signals, a device and its share of the batch.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;
use tch::Device;

use super::error::{TrainError, io_error};
use crate::config::{self, Config};
use crate::device::{self, Found};
use crate::dist;
use crate::shim::c10d::Member;

/// Takes the run for this process; the system gives it back however the process ends.
pub(super) fn lock(folder: &Path) -> Result<File, TrainError> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(io_error("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(TrainError::InUse { run: folder.to_path_buf() }),
        // As on some network shares: a run that is started twice there is not noticed.
        Err(fs::TryLockError::Error(error)) if has_no_locks(&error) => {
            note!("warning: {} cannot be locked, its file system has no locks", folder.display());
            Ok(file)
        }
        Err(fs::TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
    }
}

fn has_no_locks(error: &std::io::Error) -> bool {
    let none = [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS];
    Errno::from_io_error(error).is_some_and(|errno| none.contains(&errno))
}

/// A flag that SIGINT, SIGTERM, SIGHUP and SIGUSR1 raise; a second one of the first two ends the process. A
/// SIGHUP that `nohup` has the process ignore stays ignored.
pub(super) fn listen() -> Result<Arc<AtomicBool>, TrainError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // In this order: the first signal finds the flag down and raises it.
        let at_once = signal_hook::flag::register_conditional_shutdown(
            signal,
            128 + signal,
            Arc::clone(&stop),
        );
        at_once
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(TrainError::Signals)?;
    }
    let once = [signal_hook::consts::SIGUSR1, signal_hook::consts::SIGHUP];
    for signal in once.into_iter().filter(|signal| !dist::launch::is_ignored(*signal)) {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(TrainError::Signals)?;
    }
    Ok(stop)
}

/// Each rank of a machine takes a GPU of its own.
pub(crate) fn device(
    wanted: config::Device,
    member: Member,
    local_rank: usize,
    by_slurm: bool,
) -> Result<Found, TrainError> {
    let found = device::find(wanted)?;
    if member.size == 1 || !found.device.is_cuda() {
        return Ok(found);
    }
    let gpus = tch::Cuda::device_count();
    let index = match gpus {
        // Slurm with `--gpus-per-task` shows each rank its own and no other.
        1 if by_slurm => 0,
        _ if (local_rank as i64) < gpus => local_rank,
        _ => return Err(TrainError::RankGpu { local_rank, gpus }),
    };
    Ok(Found { device: Device::Cuda(index), missing: None })
}

/// What a config comes to on each of so many ranks that begin a run.
pub(crate) fn config_of_rank(config: &Config, ranks: usize) -> Result<Config, TrainError> {
    let mut config = config.clone();
    config.train.accumulate = micro_batches(&config, ranks, ranks)?;
    Ok(config)
}

/// Micro-batches of an update on each of `ranks` ranks: as few as keep a micro-batch no larger than
/// it was on the ranks that the run began with.
pub(super) fn micro_batches(
    config: &Config,
    begun_ranks: usize,
    ranks: usize,
) -> Result<i64, TrainError> {
    let (batch, groups) = (config.train.batch, config.model.bn_splits);
    let (size, ranks) = (ranks, ranks as i64);
    if batch % ranks != 0 {
        return Err(TrainError::RankBatch { batch, size });
    }
    let least = begun_ranks as i64 * config.train.accumulate;
    let mut parts = (1..=groups / ranks).filter(|parts| groups % (ranks * parts) == 0);
    // Where that would be smaller than a BN group, a group it is.
    let fits = parts.clone().find(|parts| ranks * parts >= least);
    fits.or_else(|| parts.next_back()).ok_or(TrainError::RankGroups { groups, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Micro-batches on each number of ranks, of a run that began on `begun`.
    fn parts(sets: &[&str], begun: usize, ranks: &[usize]) -> Vec<Option<i64>> {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        ranks.iter().map(|ranks| micro_batches(&config, begun, *ranks).ok()).collect()
    }

    #[test]
    fn fewer_ranks_make_more_micro_batches_of_the_same_size() {
        // Eight BN groups: three ranks cannot share them, nor can sixteen.
        let found = parts(&[], 8, &[8, 4, 2, 1, 3, 16]);
        assert_eq!(found, [Some(1), Some(2), Some(4), Some(8), None, None]);
        // Begun alone, a micro-batch may be the whole batch; asked for, it is a quarter.
        assert_eq!(parts(&[], 1, &[1, 2, 8]), [Some(1), Some(1), Some(1)]);
        assert_eq!(parts(&["train.accumulate=4"], 1, &[1, 2, 8]), [Some(4), Some(2), Some(1)]);
        // Three ranks of twelve groups: at least the four parts it began with, six in all.
        let twelve = ["model.bn_splits=12", "train.batch=48", "method.queue=4800"];
        assert_eq!(parts(&twelve, 4, &[1, 2, 3, 4, 5]), [Some(4), Some(2), Some(2), Some(1), None]);
    }
}
