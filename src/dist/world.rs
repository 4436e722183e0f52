//! Which rank of how many this process is, and where the others are: read from what torchrun,
//! Slurm, Open MPI or a PyTorchJob put into the environment.
//!
//! Pure: takes variables through a function, touches neither network nor environment. What is wrong
//! or missing is said with the variable's name.

use thiserror::Error;

use crate::shim::c10d::{Member, Role};

/// Why an environment describes no world.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WorldError {
    /// A variable that the others call for.
    #[error("{present} is set, and {missing} is not: {hint}")]
    Missing {
        /// What made it necessary.
        present: &'static str,
        /// What is missing.
        missing: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A variable with a value that it cannot have.
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
    /// Several tasks are reserved and this process is none of them.
    #[error(
        "a Slurm job of {tasks} tasks, and this process was not started by srun: start it with \
         `srun detco train …`, or use `detco train --gpus N` for the GPUs of this node"
    )]
    NotSrun {
        /// SLURM_NTASKS.
        tasks: usize,
    },
    /// The command line asks for another world than the environment describes.
    #[error(
        "{flag} {asked} inside a world of {size} that {launcher} has started: leave {flag} away, \
         or start without {launcher}"
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

/// Who started this process as one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// torchrun, `detco train --gpus`, or a PyTorchJob: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    Torchrun,
    /// srun.
    Slurm,
    /// mpirun.
    OpenMpi,
}

impl std::fmt::Display for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Launcher::Torchrun => "torchrun",
            Launcher::Slurm => "srun",
            Launcher::OpenMpi => "mpirun",
        })
    }
}

/// A place in a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Who started it.
    pub launcher: Launcher,
    /// Rank and size.
    pub member: Member,
    /// Among the ranks of this machine: the GPU to use.
    pub local_rank: usize,
    /// Ranks of this machine, 1 if nobody says.
    pub local_size: usize,
    /// Where the store is served.
    pub master: String,
    /// Its port.
    pub port: u16,
    /// Whether this process serves it.
    pub role: Role,
    /// Whether the launcher serves it, so that it outlives the ranks; else rank 0 does.
    pub agent: bool,
    /// Sets the keys of this start apart from those of an earlier one on the same store.
    pub prefix: String,
}

/// What a world's ranks need to find each other, in words for error messages.
const NEEDS: &str = "torchrun, srun, mpirun and PyTorchJob set it; by hand, set RANK, WORLD_SIZE, \
                     MASTER_ADDR and MASTER_PORT for every rank";
/// The port of PyTorch's own launchers.
const PORT: u16 = 29_500;

/// Reads a world from variables; none if they describe no world, or one of a single process.
///
/// # Errors
/// When they describe one incompletely, or contradict themselves.
pub fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Spec>, WorldError> {
    let of = Variables(variable);
    let spec = if of.is_set("RANK") {
        torchrun(&of)?
    } else if of.is_set("OMPI_COMM_WORLD_RANK") {
        open_mpi(&of)?
    } else if of.is_set("SLURM_PROCID") && of.is_set("SLURM_STEP_ID") {
        slurm(&of)?
    } else {
        return alone(&of);
    };
    Ok(Some(spec).filter(|spec| spec.member.size > 1))
}

/// Without a rank: alone, unless something says that this was not meant.
fn alone(of: &Variables<'_>) -> Result<Option<Spec>, WorldError> {
    if of.number("WORLD_SIZE")?.is_some_and(|size| size > 1) {
        return Err(WorldError::Missing { present: "WORLD_SIZE", missing: "RANK", hint: NEEDS });
    }
    let tasks = of.number("SLURM_NTASKS")?.unwrap_or(1);
    if of.is_set("SLURM_PROCID") && tasks > 1 {
        return Err(WorldError::NotSrun { tasks });
    }
    Ok(None)
}

fn torchrun(of: &Variables<'_>) -> Result<Spec, WorldError> {
    let member = of.member("RANK", "WORLD_SIZE")?;
    let (local_rank, local_size) = of.local("LOCAL_RANK", "LOCAL_WORLD_SIZE")?;
    let (master, port) = if member.size > 1 {
        (of.needed("RANK", "MASTER_ADDR")?, of.port()?.ok_or_else(|| no_port("RANK"))?)
    } else {
        (String::new(), 0)
    };
    // The agent's store outlives the ranks: a restart meets the keys of the start before.
    let agent = of.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
    let run = of.text("TORCHELASTIC_RUN_ID").unwrap_or_default();
    let restart = of.text("TORCHELASTIC_RESTART_COUNT").unwrap_or_default();
    let role = if member.rank == 0 && !agent { Role::Serve } else { Role::Join };
    let prefix = format!("detco/{run}/{restart}");
    let launcher = Launcher::Torchrun;
    Ok(Spec { launcher, member, local_rank, local_size, master, port, role, agent, prefix })
}

fn no_port(present: &'static str) -> WorldError {
    WorldError::Missing { present, missing: "MASTER_PORT", hint: NEEDS }
}

fn open_mpi(of: &Variables<'_>) -> Result<Spec, WorldError> {
    let member = of.member("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
    let (local_rank, local_size) =
        of.local("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")?;
    let master = match of.text("MASTER_ADDR") {
        Some(master) => master,
        None if local_size == member.size => "127.0.0.1".into(),
        None => {
            return Err(WorldError::Missing {
                present: "OMPI_COMM_WORLD_RANK",
                missing: "MASTER_ADDR",
                hint: "Open MPI does not say where rank 0 runs: mpirun -x MASTER_ADDR=HOST …",
            });
        }
    };
    // Two jobs on one machine have namespaces of their own.
    let job = of.text("PMIX_NAMESPACE").unwrap_or_default();
    let port = match of.port()? {
        Some(port) => port,
        None if job.is_empty() => PORT,
        None => job_port(u64::from(crc32c::crc32c(job.as_bytes()))),
    };
    let role = role_of(member);
    let launcher = Launcher::OpenMpi;
    let prefix = format!("detco/{job}");
    let agent = false;
    Ok(Spec { launcher, member, local_rank, local_size, master, port, role, agent, prefix })
}

fn slurm(of: &Variables<'_>) -> Result<Spec, WorldError> {
    // A step may have fewer tasks than the job.
    let tasks =
        if of.is_set("SLURM_STEP_NUM_TASKS") { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let member = of.member("SLURM_PROCID", tasks)?;
    let local_rank = of.number("SLURM_LOCALID")?.unwrap_or(0);
    // "2(x3),1": two tasks on each of three nodes, one on the fourth.
    let per_node = of.text("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default();
    let node = of.number("SLURM_NODEID")?.unwrap_or(0);
    let local_size = tasks_of(&per_node, node).unwrap_or(1);
    let job = of.number("SLURM_JOB_ID")?.unwrap_or(0) as u64;
    let step = of.text("SLURM_STEP_ID").unwrap_or_default();
    let restart = of.text("SLURM_RESTART_COUNT").unwrap_or_default();
    let master = match of.text("MASTER_ADDR") {
        Some(master) => master,
        None => first_node(of)?,
    };
    let steps = step.parse::<u64>().unwrap_or(0);
    let port = of.port()?.unwrap_or_else(|| job_port(job.wrapping_add(steps.wrapping_mul(97))));
    let role = role_of(member);
    let launcher = Launcher::Slurm;
    let prefix = format!("detco/{job}.{step}/{restart}");
    let agent = false;
    Ok(Spec { launcher, member, local_rank, local_size, master, port, role, agent, prefix })
}

/// Rank 0 serves where no agent does.
fn role_of(member: Member) -> Role {
    if member.rank == 0 { Role::Serve } else { Role::Join }
}

/// A port that every rank of a job computes alike; below 32768, from where Linux hands ports out.
fn job_port(job: u64) -> u16 {
    12_000 + (job % 20_000) as u16 // below 20,000
}

fn first_node(of: &Variables<'_>) -> Result<String, WorldError> {
    let names = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    let Some((name, value)) = names.into_iter().find_map(|name| Some((name, of.text(name)?)))
    else {
        return Err(WorldError::Missing {
            present: "SLURM_PROCID",
            missing: "SLURM_JOB_NODELIST",
            hint: "rank 0 runs on its first node; or set MASTER_ADDR",
        });
    };
    let fault = || WorldError::Nodes { name, value: value.clone() };
    nodes(&value).and_then(|all| all.into_iter().next()).ok_or_else(fault)
}

/// Most nodes that a list may name: a typing error must not fill the memory.
const NODES_MAX: usize = 1 << 20;

/// Expands Slurm's list of nodes: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login. None if
/// it is written otherwise.
pub fn nodes(list: &str) -> Option<Vec<String>> {
    let mut all = Vec::new();
    for part in split_outside(list)? {
        expand(part, &mut all)?;
    }
    (!all.is_empty()).then_some(all)
}

/// Splits at commas that stand outside of brackets.
fn split_outside(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, character) in list.char_indices() {
        match character {
            '[' if depth == 0 => depth = 1,
            ']' if depth == 1 => depth = 0,
            '[' | ']' => return None,
            ',' if depth == 0 => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    (depth == 0).then_some(parts)
}

/// `rack[1-2]n[0-1]`: the first bracket's values in the outer loop.
fn expand(part: &str, all: &mut Vec<String>) -> Option<()> {
    let Some((before, rest)) = part.split_once('[') else {
        let plain = !part.is_empty() && !part.contains(char::is_whitespace);
        all.push(plain.then(|| part.to_string())?);
        return Some(());
    };
    let (ranges, after) = rest.split_once(']')?;
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(first) || !digits(last) {
            return None;
        }
        let (low, high): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        if low > high || high - low >= NODES_MAX as u64 {
            return None;
        }
        for number in low..=high {
            expand(&format!("{before}{number:0width$}{after}", width = first.len()), all)?;
            (all.len() <= NODES_MAX).then_some(())?;
        }
    }
    Some(())
}

/// The tasks of a node in Slurm's short form, `4(x2),3`.
fn tasks_of(list: &str, node: usize) -> Option<usize> {
    let mut left = node;
    for part in list.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        if left < times {
            return tasks.parse().ok().filter(|tasks| *tasks > 0);
        }
        left -= times;
    }
    None
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn is_set(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    fn number(&self, name: &'static str) -> Result<Option<usize>, WorldError> {
        let Some(value) = self.text(name) else { return Ok(None) };
        let number = value.trim().parse().ok().filter(|number| *number <= i32::MAX as usize);
        let expected = "a number".to_string();
        number.map(Some).ok_or(WorldError::Value { name, value, expected })
    }

    fn needed(&self, present: &'static str, missing: &'static str) -> Result<String, WorldError> {
        self.text(missing).ok_or(WorldError::Missing { present, missing, hint: NEEDS })
    }

    fn member(&self, rank: &'static str, size: &'static str) -> Result<Member, WorldError> {
        let missing = |present, missing| WorldError::Missing { present, missing, hint: NEEDS };
        let found = self.number(rank)?.ok_or_else(|| missing(size, rank))?;
        let ranks = self.number(size)?.ok_or_else(|| missing(rank, size))?;
        let value = |name, value: usize, expected: String| {
            Err(WorldError::Value { name, value: value.to_string(), expected })
        };
        match (found, ranks) {
            (_, 0) => value(size, 0, "at least 1".into()),
            (found, ranks) if found >= ranks => {
                value(rank, found, format!("below {size} = {ranks}"))
            }
            (rank, size) => Ok(Member { rank, size }),
        }
    }

    /// Place and number on this machine; alone on it if nobody says.
    fn local(&self, rank: &'static str, size: &'static str) -> Result<(usize, usize), WorldError> {
        match (self.number(rank)?, self.number(size)?) {
            (Some(local), Some(ranks)) if local >= ranks => {
                let expected = format!("below {size} = {ranks}");
                Err(WorldError::Value { name: rank, value: local.to_string(), expected })
            }
            (local, ranks) => Ok((local.unwrap_or(0), ranks.unwrap_or(1).max(1))),
        }
    }

    fn port(&self) -> Result<Option<u16>, WorldError> {
        let name = "MASTER_PORT";
        let Some(value) = self.text(name) else { return Ok(None) };
        let port = value.trim().parse().ok().filter(|port| *port > 0);
        let expected = "a port, 1 to 65535".to_string();
        port.map(Some).ok_or(WorldError::Value { name, value, expected })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &str) -> Result<Option<Spec>, WorldError> {
        let all: std::collections::BTreeMap<String, String> = variables
            .split_whitespace()
            .map(|pair| pair.split_once('=').unwrap())
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        read(&|name| all.get(name).cloned())
    }

    fn fault(variables: &str) -> String {
        world(variables).expect_err(variables).to_string()
    }

    #[test]
    fn nothing_set_is_a_world_of_one() {
        assert_eq!(world(""), Ok(None));
        assert_eq!(world("RANK=0 WORLD_SIZE=1"), Ok(None));
        assert_eq!(world("SLURM_PROCID=0 SLURM_NTASKS=1"), Ok(None));
        assert_eq!(world("MASTER_ADDR=a MASTER_PORT=7 WORLD_SIZE=1"), Ok(None));
    }

    #[test]
    fn torchrun_with_its_agents_store() {
        let all = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=n0 \
                   MASTER_PORT=29400 TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=a \
                   TORCHELASTIC_RESTART_COUNT=2";
        let spec = world(all).unwrap().unwrap();
        assert_eq!(spec.member, Member { rank: 3, size: 4 });
        assert_eq!((spec.local_rank, spec.local_size), (1, 2));
        assert_eq!((spec.master.as_str(), spec.port), ("n0", 29_400));
        assert_eq!((spec.role, spec.prefix.as_str()), (Role::Join, "detco/a/2"));
        let first = world(&all.replace("RANK=3 ", "RANK=0 ")).unwrap().unwrap();
        assert_eq!((first.role, first.agent), (Role::Join, true), "the agent serves");
    }

    #[test]
    fn a_pytorchjob_has_no_agent() {
        let all = "WORLD_SIZE=2 MASTER_ADDR=job-master-0 MASTER_PORT=23456";
        let master = world(&format!("RANK=0 {all}")).unwrap().unwrap();
        let worker = world(&format!("RANK=1 {all}")).unwrap().unwrap();
        assert_eq!((master.role, worker.role), (Role::Serve, Role::Join));
        assert_eq!((worker.local_rank, worker.local_size), (0, 1));
        assert_eq!(master.prefix, worker.prefix);
    }

    #[test]
    fn slurm_finds_the_first_node_and_a_port_of_the_job() {
        let all = "SLURM_NTASKS=5 SLURM_STEP_ID=0 SLURM_JOB_ID=4100123 SLURM_NODELIST=gpu[07-08] \
                   SLURM_STEP_TASKS_PER_NODE=4,1";
        let spec = world(&format!("{all} SLURM_PROCID=3 SLURM_LOCALID=3 SLURM_NODEID=0"));
        let spec = spec.unwrap().unwrap();
        assert_eq!((spec.launcher, spec.member.size), (Launcher::Slurm, 5));
        assert_eq!((spec.master.as_str(), spec.port), ("gpu07", 12_123));
        assert_eq!((spec.local_rank, spec.local_size, spec.role), (3, 4, Role::Join));
        let last = world(&format!("{all} SLURM_PROCID=4 SLURM_LOCALID=0 SLURM_NODEID=1"));
        assert_eq!(last.unwrap().unwrap().local_size, 1);
        // What a batch script has set by hand counts; torchrun under srun comes first.
        let own = world(&format!("{all} SLURM_PROCID=0 MASTER_ADDR=ib7 MASTER_PORT=5000"));
        let own = own.unwrap().unwrap();
        assert_eq!((own.master.as_str(), own.port, own.role), ("ib7", 5000, Role::Serve));
        let inner =
            world(&format!("{all} SLURM_PROCID=0 RANK=1 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=6"));
        assert_eq!(inner.unwrap().unwrap().launcher, Launcher::Torchrun);
        // A step of fewer tasks, and another step of the same job, which has a port of its own.
        let step = all.replace("STEP_ID=0", "STEP_ID=1 SLURM_STEP_NUM_TASKS=2");
        let step = world(&format!("{step} SLURM_PROCID=1")).unwrap().unwrap();
        assert_eq!((step.member.size, step.port), (2, 12_220));
    }

    #[test]
    fn open_mpi_needs_an_address_only_across_machines() {
        let all = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1";
        let local = world(&format!("{all} OMPI_COMM_WORLD_LOCAL_SIZE=2")).unwrap().unwrap();
        assert_eq!((local.master.as_str(), local.port, local.local_rank), ("127.0.0.1", 29_500, 1));
        let apart = all.replace("LOCAL_RANK=1", "LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1");
        let error = fault(&apart);
        assert!(error.contains("MASTER_ADDR") && error.contains("mpirun -x"), "{error}");
        let far = format!("{all} OMPI_COMM_WORLD_LOCAL_SIZE=2 MASTER_ADDR=h PMIX_NAMESPACE=j1");
        let (one, two) = (world(&far), world(&far.replace("j1", "j2")));
        assert_ne!(one.unwrap().unwrap().port, two.unwrap().unwrap().port);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let torchrun = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1";
        for (without, named) in [
            ("WORLD_SIZE=2", "WORLD_SIZE is not"),
            ("MASTER_ADDR=a", "MASTER_ADDR is not"),
            ("MASTER_PORT=1", "MASTER_PORT is not"),
            ("RANK=0", "WORLD_SIZE is set, and RANK is not"),
        ] {
            let error = fault(&torchrun.replace(without, ""));
            assert!(error.contains(named) && error.contains("torchrun"), "{error}");
        }
        for (from, to) in [
            ("RANK=0", "RANK=2"),
            ("RANK=0", "RANK=x"),
            ("RANK=0", "RANK=-1"),
            ("WORLD_SIZE=2", "WORLD_SIZE=0"),
            ("MASTER_PORT=1", "MASTER_PORT=70000"),
            ("MASTER_PORT=1", "MASTER_PORT=0"),
        ] {
            let error = fault(&torchrun.replace(from, to));
            assert!(error.contains(to), "{to}: {error}");
        }
        let error = fault(&format!("{torchrun} LOCAL_RANK=2 LOCAL_WORLD_SIZE=2"));
        assert!(error.contains("LOCAL_RANK=2: expected below LOCAL_WORLD_SIZE = 2"), "{error}");
        let error = fault("SLURM_PROCID=0 SLURM_NTASKS=8");
        assert!(error.contains("8 tasks") && error.contains("srun"), "{error}");
        let error = fault("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_ID=0");
        assert!(error.contains("SLURM_JOB_NODELIST"), "{error}");
        let error = fault("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_ID=0 SLURM_NODELIST=a[1-");
        assert!(error.contains("SLURM_NODELIST=a[1-"), "{error}");
    }

    #[test]
    fn lists_of_nodes_are_expanded_as_slurm_does() {
        let expanded = |list| nodes(list).map(|all| all.join(" "));
        assert_eq!(expanded("a").as_deref(), Some("a"));
        assert_eq!(expanded("a,b-1.x").as_deref(), Some("a b-1.x"));
        assert_eq!(expanded("n[08-11,3]").as_deref(), Some("n08 n09 n10 n11 n3"));
        assert_eq!(expanded("r[1-2]n[0-1],z").as_deref(), Some("r1n0 r1n1 r2n0 r2n1 z"));
        for wrong in ["", ",", "a[", "a]", "a[[1]]", "a[2-1]", "a[x]", "a[1-99999999999]", "a b"] {
            assert_eq!(expanded(wrong), None, "{wrong}");
        }
    }
}
