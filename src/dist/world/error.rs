//! [`WorldError`]: why no world can be read from the environment.

use thiserror::Error;

use super::Launcher;

/// Why no world can be read from the environment.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WorldError {
    /// A variable is set (RANK, say) and one that belongs to it (WORLD_SIZE) is not.
    #[error("{present} is set, and {missing} is not: {hint}; {ALONE}")]
    Missing {
        /// The variable that is set.
        present: &'static str,
        /// The variable that is not.
        missing: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A variable has a value that is not allowed.
    #[error("{name}={value}: expected {expected}")]
    Value {
        /// The variable.
        name: &'static str,
        /// As it is set.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// Slurm's list of nodes in a form that is unknown.
    #[error("{name}={value}: not a list of nodes as Slurm writes them")]
    Nodes {
        /// The variable.
        name: &'static str,
        /// As it is set.
        value: String,
    },
    /// A Slurm job reserves several tasks, and this process was not started by srun.
    #[error(
        "a Slurm job of {reserved}, and this process was not started by srun: start it with \
         `srun detco train …`, or use `detco train --gpus N` for the GPUs of this node; {ALONE}"
    )]
    NotSrun {
        /// `8 tasks`, `2 nodes`.
        reserved: String,
    },
    /// An interactive shell that is one of several Slurm tasks; the others run no training.
    #[error(
        "this terminal is one task of {tasks} of a Slurm step (`srun --pty`), and the others run no such \
         command: start all of them with `srun detco train …`, or use `detco train --gpus N` for the GPUs of \
         this node; {ALONE}"
    )]
    Terminal {
        /// Tasks of the step.
        tasks: usize,
    },
    /// The number of pods is left to torchrun.
    #[error(
        "{name}={value}: who is which rank of an elastic PyTorchJob is for torchrun to say: start \
         `torchrun --no-python detco train …`; {ALONE}"
    )]
    Elastic {
        /// The variable.
        name: &'static str,
        /// As it is set.
        value: String,
    },
    /// The command line and the job differ in the number of processes per pod.
    #[error(
        "{flag} {asked} where PET_NPROC_PER_NODE={each}: leave {flag} away, or give the job \
         `nprocPerNode: \"{asked}\"`"
    )]
    Pod {
        /// The argument.
        flag: &'static str,
        /// Its number.
        asked: usize,
        /// The job's.
        each: usize,
    },
    /// The command line asks for ranks on this machine, and the environment's world has others.
    #[error(
        "{flag} {asked} inside a world of {size} that {launcher} has started: leave {flag} away, have \
         {launcher} start one process a machine, or start without {launcher}; {ALONE}"
    )]
    Asked {
        /// The argument.
        flag: &'static str,
        /// Its number.
        asked: usize,
        /// Ranks in the environment's world.
        size: usize,
        /// Who made it.
        launcher: Launcher,
    },
}

/// The hint for users who do not mean the environment's world.
pub const ALONE: &str =
    "to train alone whatever the environment says: --gpus 1, or --ranks 1 on CPUs";
