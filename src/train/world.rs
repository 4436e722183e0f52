//! The world that a run is made in: one process, or the ranks that have met.

use super::error::TrainError;
use crate::dist::Collective;
use crate::dist::c10d::C10d;
use crate::dist::local::Local;
use crate::dist::rendezvous::Rendezvous;

/// The world that a run is made in.
pub(super) enum World {
    One(Local),
    Several(Box<C10d>),
}

impl std::ops::Deref for World {
    type Target = dyn Collective;

    fn deref(&self) -> &Self::Target {
        match self {
            World::One(world) => world,
            World::Several(world) => world.as_ref(),
        }
    }
}

impl World {
    pub(super) fn fail(&self, message: &str) {
        if let World::Several(world) = self {
            world.fail(message);
        }
    }

    pub(super) fn leave(self) {
        if let World::Several(world) = self {
            world.leave();
        }
    }

    /// Bad samples of an epoch over all ranks, with `more` of this one.
    pub(super) fn count_bad(&self, epoch: u32, more: u64) -> Result<u64, TrainError> {
        match self {
            World::One(_) => Ok(more), // its loader counts
            World::Several(world) => Ok(world.count(&format!("bad/{epoch}"), more)?),
        }
    }
}

/// The way into a run, as far as it has come: who has to be told where it ends here.
pub(super) struct Entrance {
    pub(super) rendezvous: Option<Rendezvous>,
    pub(super) world: Option<Box<C10d>>,
}

impl Entrance {
    pub(super) fn fail(self, message: &str) {
        if let Some(rendezvous) = self.rendezvous {
            rendezvous.fail(message);
        }
        if let Some(world) = self.world {
            world.fail(message);
            // Its threads may wait for others: they are not joined.
            std::mem::forget(world);
        }
    }
}
