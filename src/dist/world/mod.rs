//! Rank, world size and the address of rank 0, read from the variables of torchrun, Slurm, MPI's launchers
//! or a PyTorchJob.
//!
//! Pure: takes variables through a function, touches neither network nor environment. Errors name the
//! variable that is wrong or missing.

use self::mpi::{FAMILIES, Family};
use self::slurm::slurm;
use self::torchrun::torchrun;
use self::variables::{NEEDS, Variables};
use crate::shim::c10d::{Member, Role};

mod error;
mod mpi;
mod slurm;
mod torchrun;
mod variables;

pub use error::{ALONE, WorldError};
pub use slurm::nodes;

/// The launcher that started this process as one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// torchrun, `detco train --gpus`, or a PyTorchJob: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    Torchrun,
    /// srun.
    Slurm,
    /// An MPI launcher, by name.
    Mpi(&'static str),
}

impl std::fmt::Display for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Launcher::Torchrun => "torchrun",
            Launcher::Slurm => "srun",
            Launcher::Mpi(name) => name,
        })
    }
}

/// What the environment says about the processes of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// So many ranks, one process each.
    Ranks(usize),
    /// It says nothing.
    Unknown,
    /// This process stands for the machine (a pod), which may have several GPUs. The number of ranks to start
    /// on each, where the job says one.
    Machine(Option<usize>),
}

/// The place of a process in a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Who started it.
    pub launcher: Launcher,
    /// Rank and size.
    pub member: Member,
    /// Its number among the ranks of this machine, which is the GPU to use.
    pub local_rank: usize,
    /// Ranks of this machine; 1 if unknown.
    pub local_size: usize,
    /// What is known of this machine.
    pub here: Here,
    /// Host of the store: a name or an address; IPv6 without brackets.
    pub master: String,
    /// Its port.
    pub port: u16,
    /// Whether this process serves it.
    pub role: Role,
    /// Whether the launcher serves it, so that it outlives the ranks, in place of rank 0.
    pub agent: bool,
    /// Prefix that separates the keys of this start from those of an earlier one on the same store.
    pub prefix: String,
}

impl Spec {
    /// Address of the store, `host:port` or `[host]:port`.
    pub fn address(&self) -> String {
        let Spec { master, port, .. } = self;
        if master.contains(':') { format!("[{master}]:{port}") } else { format!("{master}:{port}") }
    }
}

/// An argument that asks for processes on this machine.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// `--gpus` or `--ranks`.
    pub flag: &'static str,
    /// How many.
    pub number: usize,
}

/// The role of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum World {
    /// Train alone.
    Alone,
    /// Be one of several ranks.
    Rank(Spec),
    /// Start ranks and wait for them.
    Launch(Launch),
}

/// Ranks to be started on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// How many.
    pub ranks: usize,
    /// This machine's place among several that start as many each: its `member` counts machines. None where
    /// there is no other machine.
    pub node: Option<Spec>,
}

/// Decides the role of this process from the command line and the environment. `terminal` says whether the
/// process reads from a terminal, which tasks of a cluster do not.
///
/// # Errors
/// When the environment describes a world incompletely or contradicts itself or the command line.
pub fn decide(
    variable: &dyn Fn(&str) -> Option<String>,
    asked: Option<Asked>,
    terminal: bool,
) -> Result<World, WorldError> {
    let launch = |ranks, node| Ok(World::Launch(Launch { ranks, node }));
    let asked = match asked {
        Some(Asked { number: 1, .. }) => return Ok(World::Alone),
        asked => asked,
    };
    let found = match (read(&Variables(variable), terminal), asked) {
        // One process that is to use all of this machine.
        (Err(WorldError::NotSrun { .. } | WorldError::Terminal { .. }), Some(_)) => None,
        (found, _) => found?,
    };
    let (spec, asked) = match (found, asked) {
        (Some(spec), Some(asked)) => (spec, asked),
        (None, Some(asked)) => return launch(asked.number, None),
        (None, None) => return Ok(World::Alone),
        (Some(spec), None) => {
            return match spec.here {
                Here::Machine(Some(ranks)) if ranks > 1 => launch(ranks, several(spec)),
                _ => Ok(several(spec).map_or(World::Alone, World::Rank)),
            };
        }
    };
    let Asked { flag, number } = asked;
    match spec.here {
        Here::Machine(Some(each)) if each > 1 && each != number => {
            Err(WorldError::Pod { flag, asked: number, each })
        }
        // The launcher's own children see its arguments.
        Here::Ranks(ranks) if ranks == number => Ok(World::Rank(spec)),
        Here::Machine(_) | Here::Ranks(1) => launch(number, several(spec)),
        _ if spec.member.size == 1 => launch(number, None),
        Here::Ranks(_) | Here::Unknown => {
            let (size, launcher) = (spec.member.size, spec.launcher);
            Err(WorldError::Asked { flag, asked: number, size, launcher })
        }
    }
}

/// The size of the world that the environment describes, where `--gpus 1` or `--ranks 1` passes over one.
pub fn passed_over(
    variable: &dyn Fn(&str) -> Option<String>,
    asked: Option<Asked>,
) -> Option<usize> {
    asked.filter(|asked| asked.number == 1)?;
    let found = read(&Variables(variable), false).ok().flatten();
    found.and_then(several).map(|spec| spec.member.size)
}

/// None where nobody else is in it.
fn several(spec: Spec) -> Option<Spec> {
    Some(spec).filter(|spec| spec.member.size > 1)
}

/// Reads a world from variables; `None` if they describe none.
fn read(of: &Variables<'_>, terminal: bool) -> Result<Option<Spec>, WorldError> {
    if of.is_set("RANK") || of.is_set("PET_NODE_RANK") {
        return torchrun(of).map(Some);
    }
    let set = |family: &&Family| of.is_set(family.rank);
    if let Some(family) = FAMILIES.iter().filter(|family| !family.by_srun).find(set) {
        return family.read(of).map(Some);
    }
    let step = slurm(of, terminal)?;
    match FAMILIES.iter().filter(|family| family.by_srun).find(set) {
        // Slurm's own, of the same task; else an MPI launcher runs inside of a Slurm step.
        Some(family) if !family.agrees(of, step.as_ref()) => family.read(of).map(Some),
        _ if step.is_some() => Ok(step),
        _ => nobody(of).map(|()| None),
    }
}

/// Without a rank the process is alone, unless other variables say that this was not meant.
fn nobody(of: &Variables<'_>) -> Result<(), WorldError> {
    let needs_rank = |present| {
        let rank = FAMILIES.iter().find(|family| family.size == present && present != "WORLD_SIZE");
        let missing = rank.map_or("RANK", |family| family.rank);
        Err(WorldError::Missing { present, missing, hint: NEEDS })
    };
    if of.is_set("LOCAL_RANK") {
        return needs_rank("LOCAL_RANK");
    }
    let sizes = ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "AWS_BATCH_JOB_NUM_NODES"];
    for size in sizes.into_iter().chain(FAMILIES.iter().map(|family| family.size)) {
        if of.number(size)?.is_some_and(|size| size > 1) {
            return needs_rank(size);
        }
    }
    let named =
        ["PET_NNODES", "PET_RDZV_ENDPOINT"].map(|name| of.text(name).map(|text| (name, text)));
    match named.into_iter().flatten().next() {
        Some((name, value)) if value != "1" => Err(WorldError::Elastic { name, value }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
