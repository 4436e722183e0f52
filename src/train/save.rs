//! Saving: when a checkpoint is due, and what happens where the disk has no room for it.

use std::path::Path;

use super::Run;
use super::error::TrainError;
use crate::checkpoint::{self, CheckpointError, State};
use crate::config::Config;
use crate::disk::Disk;
use crate::dist::Move;

/// Why a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The first, and by `checkpoint.*`.
    ByPlan,
    /// The run ends, or stops.
    AtTheEnd,
}

impl Run {
    pub(super) fn is_due(&self) -> bool {
        let every = &self.config.checkpoint;
        let epochs = u64::from(every.every_epochs);
        let by_epoch = epochs > 0
            && self.at_epoch_end()
            && u64::from(self.cursor.epoch).is_multiple_of(epochs);
        let by_step = every.every_steps > 0 && self.step.is_multiple_of(every.every_steps);
        by_epoch || by_step
    }

    /// Rank 0 saves, the others wait for it. Where there is no room, training goes on as long as an older
    /// checkpoint is whole and another save will come.
    pub(super) fn save(&mut self, due: Due) -> Result<(), TrainError> {
        self.look()?;
        self.world.at(self.step, Move::Save);
        if let Some(lead) = &mut self.lead {
            // Metrics first: a checkpoint promises that its steps are written down.
            lead.metrics.sync()?;
            match (self.write(), due) {
                (Err(TrainError::Checkpoint(error)), Due::ByPlan) if error.is_no_room() => {
                    self.go_on_unsaved(error)?;
                }
                (written, _) => written?,
            }
        }
        Ok(self.world.after_first()?)
    }

    /// Warns that a checkpoint was not written, unless there is none to go back to.
    fn go_on_unsaved(&self, error: CheckpointError) -> Result<(), TrainError> {
        let names = checkpoint::list(&self.folder)?;
        let Some(newest) = names.last() else { return Err(error.into()) };
        note!("warning: {error}");
        note!(
            "warning: no checkpoint of step {} was written; training goes on, and a kill now goes back to \
             {newest}. Make room, or lower checkpoint.keep",
            self.step
        );
        Ok(())
    }

    pub(super) fn write(&self) -> Result<(), TrainError> {
        let state = State {
            config: self.saved_config.clone(),
            ranks: self.begun_ranks,
            cursor: self.cursor,
            step: self.step,
            fingerprint: self.set.fingerprint(),
            samples: self.set.len(),
            collapsing: self.collapsing.clone(),
        };
        checkpoint::save(&self.folder, &state, &self.model.tensors(), &self.sgd.tensors())?;
        Ok(())
    }

    /// The newest checkpoint from before `step`, for an error message.
    pub(super) fn last_good(&self, step: u64) -> String {
        let names = checkpoint::list(&self.folder).unwrap_or_default();
        let before = |name: &&String| {
            name.trim_start_matches("step-").parse::<u64>().is_ok_and(|saved| saved <= step)
        };
        names.iter().rev().find(before).cloned().unwrap_or_else(|| "gone".into())
    }
}

/// Whether a new run can write its first checkpoint.
pub(crate) fn check_room(disk: &Disk) -> Result<(), TrainError> {
    match disk.free < disk.each {
        true => Err(TrainError::NoRoom { disk: disk.clone() }),
        false => Ok(()),
    }
}

/// Says at the start where the disk has no room for all checkpoints. A run that goes on has some already.
pub(super) fn tell_room(config: &Config, folder: &Path, resumed: bool) -> Result<(), TrainError> {
    let Some(disk) = Disk::of(config, folder) else { return Ok(()) };
    if !resumed {
        check_room(&disk)?;
    }
    let needed = if resumed { disk.each } else { disk.most() };
    if disk.free < needed {
        note!("warning: {disk}: lower checkpoint.keep, or make room");
    }
    Ok(())
}
