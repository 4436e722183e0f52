//! Rank, world size and the address of rank 0, read from the variables of torchrun, Slurm, MPI's launchers
//! or a PyTorchJob.
//!
//! Pure: takes variables through a function, touches neither network nor environment. Errors name the
//! variable that is wrong or missing.

use thiserror::Error;

use crate::shim::c10d::{Member, Role};

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

/// What a world's ranks need to find each other, in words for error messages.
const NEEDS: &str = "torchrun, srun, mpirun and PyTorchJob set it; by hand, set RANK, WORLD_SIZE, \
                     MASTER_ADDR and MASTER_PORT for every rank";
/// The hint for users who do not mean the environment's world.
pub const ALONE: &str =
    "to train alone whatever the environment says: --gpus 1, or --ranks 1 on CPUs";
/// The port of PyTorch's own launchers.
const PORT: u16 = 29_500;

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

/// What torchrun sets for a rank, or a PyTorchJob for a pod: then LOCAL_RANK is missing.
fn torchrun(of: &Variables<'_>) -> Result<Spec, WorldError> {
    let is_rank = of.is_set("LOCAL_RANK") && of.is_set("RANK");
    let (member, here) = match is_rank {
        true => (of.member("RANK", "WORLD_SIZE")?, of.number("LOCAL_WORLD_SIZE")?),
        false => (pod(of)?, None),
    };
    let here = match is_rank {
        true => here.map_or(Here::Unknown, Here::Ranks),
        false => Here::Machine(of.text("PET_NPROC_PER_NODE").and_then(|each| each.parse().ok())),
    };
    let (local_rank, local_size) = of.local(Some("LOCAL_RANK"), Some("LOCAL_WORLD_SIZE"))?;
    let (master, port) = if member.size > 1 {
        let master = of.host("MASTER_ADDR").or_else(|| of.host("PET_MASTER_ADDR"));
        let port = match of.port("MASTER_PORT")? {
            None => of.port("PET_MASTER_PORT")?,
            port => port,
        };
        let needed = |missing| WorldError::Missing { present: "RANK", missing, hint: NEEDS };
        (master.ok_or_else(|| needed("MASTER_ADDR"))?, port.ok_or_else(|| needed("MASTER_PORT"))?)
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
    Ok(Spec { launcher, member, local_rank, local_size, here, master, port, role, agent, prefix })
}

/// Number of this pod and of all pods. The operator's WORLD_SIZE counts pods, or pods times `nprocPerNode`.
fn pod(of: &Variables<'_>) -> Result<Member, WorldError> {
    let rank = if of.is_set("PET_NODE_RANK") { "PET_NODE_RANK" } else { "RANK" };
    let Some(pods) = of.text("PET_NNODES") else { return of.member(rank, "WORLD_SIZE") };
    if pods.contains(':') {
        return Err(WorldError::Elastic { name: "PET_NNODES", value: pods });
    }
    let member = of.member(rank, "PET_NNODES")?;
    let each = of.text("PET_NPROC_PER_NODE").and_then(|each| each.parse::<usize>().ok());
    let ranks = each.map_or(member.size, |each| each.saturating_mul(member.size));
    let differs = |name, value: usize, expected| {
        Err(WorldError::Value { name, value: value.to_string(), expected })
    };
    match (of.number("RANK")?, of.number("WORLD_SIZE")?) {
        (Some(other), _) if other != member.rank => {
            differs("RANK", other, format!("{} = {}, or LOCAL_RANK beside it", rank, member.rank))
        }
        (_, Some(size)) if size != member.size && size != ranks => {
            let each = if ranks == member.size { String::new() } else { format!(" or {ranks}") };
            differs("WORLD_SIZE", size, format!("PET_NNODES = {}{each}", member.size))
        }
        _ => Ok(member),
    }
}

/// The variables of an MPI launcher, which give rank and size but not the address of rank 0.
#[derive(Debug)]
struct Family {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
    /// Tells all ranks where the first is.
    hint: &'static str,
    /// Whether srun sets them as well.
    by_srun: bool,
}

/// In the order of precedence: jsrun and MVAPICH set PMI's variables too.
const FAMILIES: &[Family] = &[
    Family {
        name: "mpirun",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
        hint: "Open MPI does not say where rank 0 runs: mpirun -x MASTER_ADDR=HOST …",
        by_srun: false,
    },
    Family {
        name: "mpirun_rsh",
        rank: "MV2_COMM_WORLD_RANK",
        size: "MV2_COMM_WORLD_SIZE",
        local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
        local_size: &["MV2_COMM_WORLD_LOCAL_SIZE"],
        hint: "MVAPICH does not say where rank 0 runs: mpirun_rsh … MASTER_ADDR=HOST detco …",
        by_srun: false,
    },
    Family {
        name: "jsrun",
        rank: "JSM_NAMESPACE_RANK",
        size: "JSM_NAMESPACE_SIZE",
        local_rank: &["JSM_NAMESPACE_LOCAL_RANK"],
        local_size: &["JSM_NAMESPACE_LOCAL_SIZE"],
        hint: "jsrun does not say where rank 0 runs: jsrun -E MASTER_ADDR=HOST …",
        by_srun: false,
    },
    Family {
        name: "flux run",
        rank: "FLUX_TASK_RANK",
        size: "FLUX_JOB_SIZE",
        local_rank: &["FLUX_TASK_LOCAL_ID"],
        local_size: &[],
        hint: "Flux does not say where rank 0 runs: flux run --env=MASTER_ADDR=HOST …",
        by_srun: false,
    },
    Family {
        name: "mpiexec",
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"],
        local_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"],
        hint: "PMI does not say where rank 0 runs: mpiexec -genv MASTER_ADDR HOST … (MPICH, Intel MPI), \
               mpiexec --env MASTER_ADDR=HOST … (Cray)",
        by_srun: true,
    },
    Family {
        name: "mpiexec",
        rank: "PALS_RANKID",
        size: "WORLD_SIZE",
        local_rank: &["PALS_LOCAL_RANKID"],
        local_size: &["PALS_LOCAL_SIZE"],
        hint: "Cray's PALS does not say where rank 0 runs: mpiexec --env MASTER_ADDR=HOST …",
        by_srun: true,
    },
    Family {
        name: "the PMIx launcher",
        rank: "PMIX_RANK",
        size: "WORLD_SIZE",
        local_rank: &["PMIX_LOCAL_RANK"],
        local_size: &["PMIX_LOCAL_SIZE"],
        hint: "PMIx says neither where rank 0 runs nor how many there are: set WORLD_SIZE, MASTER_ADDR and \
               MASTER_PORT for all ranks",
        by_srun: true,
    },
];

/// A name that tells the jobs of one machine apart.
const JOBS: &[&str] =
    &["PMIX_NAMESPACE", "FLUX_JOB_ID", "PALS_APID", "PBS_JOBID", "LSB_JOBID", "SLURM_JOB_ID"];

impl Family {
    fn read(&self, of: &Variables<'_>) -> Result<Spec, WorldError> {
        let Family { rank: present, hint, .. } = *self;
        let missing = |missing| WorldError::Missing { present, missing, hint };
        if !of.is_set(self.size) {
            return Err(missing(self.size));
        }
        let member = of.member(self.rank, self.size)?;
        let first = |names: &[&'static str]| names.iter().copied().find(|name| of.is_set(name));
        let (local_rank, local_size) = (first(self.local_rank), first(self.local_size));
        let here = local_size.map_or(Ok(None), |name| of.number(name))?;
        let here = here.map_or(Here::Unknown, Here::Ranks);
        let (local_rank, local_size) = of.local(local_rank, local_size)?;
        let master = match of.host("MASTER_ADDR") {
            Some(master) => master,
            None if here == Here::Ranks(member.size) || member.size == 1 => "127.0.0.1".into(),
            None => return Err(missing("MASTER_ADDR")),
        };
        let job = JOBS.iter().find_map(|name| of.text(name)).unwrap_or_default();
        let port = match of.port("MASTER_PORT")? {
            Some(port) => port,
            None if job.is_empty() => PORT,
            None => job_port(u64::from(crc32c::crc32c(job.as_bytes()))),
        };
        let (role, launcher) = (role_of(member), Launcher::Mpi(self.name));
        let (prefix, agent) = (format!("detco/{job}"), false);
        Ok(Spec {
            launcher,
            member,
            local_rank,
            local_size,
            here,
            master,
            port,
            role,
            agent,
            prefix,
        })
    }

    /// Whether these variables describe the task of a Slurm step as Slurm does.
    fn agrees(&self, of: &Variables<'_>, step: Option<&Spec>) -> bool {
        let same = |name, value: usize| {
            of.number(name).ok().flatten().is_none_or(|number| number == value)
        };
        step.is_some_and(|Spec { member, .. }| {
            let by_size = self.size == "WORLD_SIZE" || same(self.size, member.size);
            same(self.rank, member.rank) && by_size
        })
    }
}

/// Slurm's numbers for steps that no srun has started begin here: batch scripts, salloc's own shells.
const OWN_STEPS: u64 = 0xffff_fff0;
/// The shell that salloc opens.
const SALLOC_STEP: u64 = 0xffff_fffa;

/// The task of a Slurm step; `None` outside of one.
fn slurm(of: &Variables<'_>, terminal: bool) -> Result<Option<Spec>, WorldError> {
    let named = ["SLURM_STEP_ID", "SLURM_STEPID"].into_iter().find_map(|name| of.text(name));
    let step = named.as_ref().map(|step| step.parse::<u64>().unwrap_or(0));
    // A step may have fewer tasks than the job.
    let sizes = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];
    let size = sizes.into_iter().find(|name| of.is_set(name)).unwrap_or("SLURM_NTASKS");
    match step {
        Some(step) if step < OWN_STEPS => {}
        Some(SALLOC_STEP) => return Ok(None),
        _ => return not_a_task(of).map(|()| None),
    }
    let tasks = of.number(size)?;
    if tasks == Some(1) || tasks.is_none() && !of.is_set("SLURM_PROCID") {
        return Ok(None);
    }
    if let Some(tasks) = tasks.filter(|_| terminal) {
        return Err(WorldError::Terminal { tasks });
    }
    slurm_task(of, size, &named.unwrap_or_default()).map(Some)
}

/// In a batch script, which runs once: whether the job reserves several tasks.
fn not_a_task(of: &Variables<'_>) -> Result<(), WorldError> {
    if !of.is_set("SLURM_PROCID") {
        return Ok(());
    }
    let counts = [
        ("SLURM_NTASKS", "tasks"),
        ("SLURM_NPROCS", "tasks"),
        ("SLURM_JOB_NUM_NODES", "nodes"),
        ("SLURM_NNODES", "nodes"),
    ];
    for (name, what) in counts {
        if let Some(count) = of.number(name)?.filter(|count| *count > 1) {
            return Err(WorldError::NotSrun { reserved: format!("{count} {what}") });
        }
    }
    Ok(())
}

fn slurm_task(of: &Variables<'_>, tasks: &'static str, step: &str) -> Result<Spec, WorldError> {
    let member = of.member("SLURM_PROCID", tasks)?;
    let local_rank = of.number("SLURM_LOCALID")?.unwrap_or(0);
    // "2(x3),1": two tasks on each of three nodes, one on the fourth.
    let per_node = of.text("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default();
    let node = of.number("SLURM_NODEID")?.unwrap_or(0);
    let here = tasks_of(&per_node, node).map_or(Here::Unknown, Here::Ranks);
    let local_size = tasks_of(&per_node, node).unwrap_or(1);
    let job = of.number("SLURM_JOB_ID")?.unwrap_or(0) as u64;
    let restart = of.text("SLURM_RESTART_COUNT").unwrap_or_default();
    let master = match of.host("MASTER_ADDR") {
        Some(master) => master,
        None => first_node(of)?,
    };
    let steps = step.parse::<u64>().unwrap_or(0);
    let port = of.port("MASTER_PORT")?;
    let port = port.unwrap_or_else(|| job_port(job.wrapping_add(steps.wrapping_mul(97))));
    let (role, launcher) = (role_of(member), Launcher::Slurm);
    let (prefix, agent) = (format!("detco/{job}.{step}/{restart}"), false);
    Ok(Spec { launcher, member, local_rank, local_size, here, master, port, role, agent, prefix })
}

/// Rank 0 serves the store unless an agent does.
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

/// Expands Slurm's list of nodes: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login. `None` if
/// it has another form.
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
    fn local(
        &self,
        rank: Option<&'static str>,
        size: Option<&'static str>,
    ) -> Result<(usize, usize), WorldError> {
        let number = |name: Option<&'static str>| name.map_or(Ok(None), |name| self.number(name));
        match (rank.zip(number(rank)?), size.zip(number(size)?)) {
            (Some((name, local)), Some((size, ranks))) if local >= ranks => {
                let expected = format!("below {size} = {ranks}");
                Err(WorldError::Value { name, value: local.to_string(), expected })
            }
            (local, ranks) => {
                Ok((local.map_or(0, |local| local.1), ranks.map_or(1, |ranks| ranks.1.max(1))))
            }
        }
    }

    /// A name or an address, which may be one of IPv6 in brackets.
    fn host(&self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let host = text.trim();
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        Some(bare.unwrap_or(host).to_string())
    }

    fn port(&self, name: &'static str) -> Result<Option<u16>, WorldError> {
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
        let variable = |name: &str| all.get(name).cloned();
        Ok(read(&Variables(&variable), false)?.and_then(several))
    }

    /// What the process is to do; `asked` is the number of `--ranks`, or 0.
    fn decided(variables: &str, asked: usize, terminal: bool) -> Result<World, WorldError> {
        let of = |name: &str| {
            let pairs = variables.split_whitespace().filter_map(|pair| pair.split_once('='));
            pairs.filter(|(other, _)| *other == name).map(|(_, value)| value.to_string()).next()
        };
        let asked = (asked > 0).then_some(Asked { flag: "--ranks", number: asked });
        decide(&of, asked, terminal)
    }

    /// Ranks to start here, and which machine of how many this is.
    fn launched(variables: &str, asked: usize) -> (usize, Option<(usize, usize)>) {
        match decided(variables, asked, false) {
            Ok(World::Launch(Launch { ranks, node })) => {
                (ranks, node.map(|node| (node.member.rank, node.member.size)))
            }
            other => panic!("{variables}: {other:?}"),
        }
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
    fn ranks_1_is_alone_in_any_environment() {
        for variables in [
            "",
            "RANK=1 WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=7",
            "RANK=x",
            "WORLD_SIZE=4",
            "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2",
            "SLURM_PROCID=0 SLURM_NTASKS=8",
            "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_ID=0 SLURM_NODELIST=a[1-",
            "PMI_RANK=1",
            "PET_NNODES=1:4",
        ] {
            assert_eq!(decided(variables, 1, false), Ok(World::Alone), "{variables}");
        }
    }

    #[test]
    fn a_pod_starts_a_rank_on_each_of_its_gpus() {
        let pods = "RANK=1 WORLD_SIZE=2 MASTER_ADDR=job-master-0 MASTER_PORT=23456";
        let auto = format!("{pods} PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=auto");
        let two = format!("{pods} PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=2");
        // Newer operators count processes.
        let four = two.replace("WORLD_SIZE=2", "WORLD_SIZE=4");
        let trainer = "PET_NNODES=2 PET_NPROC_PER_NODE=2 PET_NODE_RANK=1 PET_MASTER_ADDR=n0 \
                       PET_MASTER_PORT=29400";
        for (variables, asked, ranks) in [
            (pods, 2, 2),
            (pods, 3, 3),
            (auto.as_str(), 8, 8),
            (two.as_str(), 2, 2),
            (two.as_str(), 0, 2),
            (four.as_str(), 0, 2),
            (four.as_str(), 2, 2),
            (trainer, 0, 2),
        ] {
            assert_eq!(launched(variables, asked), (ranks, Some((1, 2))), "{variables}");
        }
        for variables in [pods, auto.as_str()] {
            let Ok(World::Rank(spec)) = decided(variables, 0, false) else { panic!("{variables}") };
            assert_eq!(spec.member, Member { rank: 1, size: 2 }, "{variables}");
        }
        let Ok(World::Launch(launch)) = decided(trainer, 0, false) else { panic!("{trainer}") };
        let node = launch.node.unwrap();
        assert_eq!((node.address().as_str(), node.role), ("n0:29400", Role::Join));
        assert_eq!(launched("RANK=0 WORLD_SIZE=1", 2), (2, None), "one pod");
        assert_eq!(launched("PET_NNODES=1 PET_NODE_RANK=0 PET_NPROC_PER_NODE=4", 0), (4, None));
        for (variables, asked, said) in [
            (two.as_str(), 3, "--ranks 3 where PET_NPROC_PER_NODE=2"),
            (
                two.replace("WORLD_SIZE=2", "WORLD_SIZE=3").as_str(),
                0,
                "WORLD_SIZE=3: expected PET_NNODES = 2",
            ),
            (
                two.replace("PET_NODE_RANK=1", "PET_NODE_RANK=0").as_str(),
                0,
                "RANK=1: expected PET_NODE_RANK",
            ),
            (two.replace("NNODES=2", "NNODES=1:2").as_str(), 0, "torchrun --no-python"),
            ("PET_NNODES=1:3 PET_RDZV_ENDPOINT=a:1", 0, "torchrun --no-python"),
            ("PET_NNODES=2 PET_MASTER_ADDR=a", 0, "torchrun --no-python"),
        ] {
            let error = decided(variables, asked, false).unwrap_err().to_string();
            assert!(error.contains(said), "{variables}: {error}");
        }
    }

    #[test]
    fn one_process_a_machine_starts_the_ranks_there() {
        let slurm = "SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_JOB_ID=7 SLURM_NODELIST=a[1-2] SLURM_PROCID=1 \
                     SLURM_NODEID=1 SLURM_LOCALID=0";
        assert_eq!(
            launched(&format!("{slurm} SLURM_STEP_TASKS_PER_NODE=1(x2)"), 4),
            (4, Some((1, 2)))
        );
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_LOCAL_RANK=0 \
                   OMPI_COMM_WORLD_LOCAL_SIZE=1 MASTER_ADDR=h";
        assert_eq!(launched(mpi, 4), (4, Some((1, 3))));
        let all = "RANK=1 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1";
        let Ok(World::Rank(spec)) = decided(all, 2, false) else { panic!("{all}") };
        assert_eq!(spec.member.size, 4, "a launcher's child sees its arguments");
        let two = format!("{slurm} SLURM_STEP_TASKS_PER_NODE=2,2");
        for variables in [all, two.as_str(), slurm] {
            let error = decided(variables, 3, false).unwrap_err().to_string();
            assert!(error.contains("--ranks 3 inside a world of "), "{error}");
        }
    }

    #[test]
    fn launchers_of_mpis_kind_are_read() {
        let none = "PMI_RANK=1 PMI_SIZE=2";
        for (variables, local, name) in [
            ("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", (1, 2), "mpiexec"),
            ("PMI_RANK=1 PMI_SIZE=2 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2", (1, 2), "mpiexec"),
            ("PMI_RANK=1 PMI_SIZE=2 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=2", (1, 2), "mpiexec"),
            ("PMI_RANK=1 PMI_SIZE=2 MASTER_ADDR=h", (0, 1), "mpiexec"),
            ("MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2 MASTER_ADDR=h", (0, 1), "mpirun_rsh"),
            (
                "JSM_NAMESPACE_RANK=1 JSM_NAMESPACE_SIZE=2 PMIX_RANK=1 MASTER_ADDR=h",
                (0, 1),
                "jsrun",
            ),
            (
                "FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_TASK_LOCAL_ID=1 MASTER_ADDR=h",
                (1, 1),
                "flux run",
            ),
            ("PMIX_RANK=1 WORLD_SIZE=2 MASTER_ADDR=h", (0, 1), "the PMIx launcher"),
        ] {
            let spec = world(variables).unwrap().unwrap();
            assert_eq!(spec.member, Member { rank: 1, size: 2 }, "{variables}");
            assert_eq!((spec.local_rank, spec.local_size), local, "{variables}");
            assert_eq!(spec.launcher, Launcher::Mpi(name));
        }
        for (variables, missing) in [
            (none, "MASTER_ADDR"),
            ("PMI_RANK=0", "PMI_SIZE"),
            ("PMI_SIZE=2", "PMI_RANK"),
            ("PMIX_RANK=0", "WORLD_SIZE"),
            ("PMIX_RANK=0 WORLD_SIZE=2", "MASTER_ADDR"),
            ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK"),
            ("PALS_RANKID=0", "WORLD_SIZE"),
            ("FLUX_TASK_RANK=0 FLUX_JOB_SIZE=2", "MASTER_ADDR"),
        ] {
            let error = fault(variables);
            assert!(error.contains(&format!("{missing} is not: ")), "{variables}: {error}");
            assert!(error.contains("--ranks 1"), "{error}");
        }
        assert_eq!(world("PMI_RANK=0 PMI_SIZE=1"), Ok(None));
        // srun sets PMI's for its own tasks; an MPI launcher inside of a step has ranks of its own.
        let step = "SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_NODELIST=a[1-2]";
        for own in ["PMI_RANK=1 PMI_SIZE=2", "PMIX_RANK=1"] {
            let spec = world(&format!("{step} {own}")).unwrap().unwrap();
            assert_eq!((spec.launcher, spec.master.as_str()), (Launcher::Slurm, "a1"), "{own}");
        }
        let inner = world(&format!("{step} PMI_RANK=5 PMI_SIZE=8 MASTER_ADDR=h")).unwrap().unwrap();
        assert_eq!(inner.member, Member { rank: 5, size: 8 });
    }

    #[test]
    fn a_shell_of_a_slurm_step_is_not_taken_for_its_first_task() {
        let pty = "SLURM_JOB_ID=77 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=4 \
                   SLURM_JOB_NODELIST=n1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4";
        let error = decided(pty, 0, true).unwrap_err().to_string();
        assert!(error.contains("one task of 4") && error.contains("--ranks 1"), "{error}");
        assert_eq!(decided(pty, 1, true), Ok(World::Alone));
        let two = World::Launch(Launch { ranks: 2, node: None });
        assert_eq!(decided(pty, 2, true), Ok(two));
        // What srun starts does not read from a terminal.
        assert!(matches!(decided(pty, 0, false), Ok(World::Rank(_))));
        let salloc =
            pty.replace("STEP_ID=0", "STEP_ID=4294967290").replace("NUM_TASKS=4", "NUM_TASKS=1");
        for terminal in [true, false] {
            assert_eq!(decided(&salloc, 0, terminal), Ok(World::Alone));
        }
        // A batch script, in two ways of writing; and a job of several nodes.
        for batch in [
            "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_ID=4294967291",
            "SLURM_PROCID=0 SLURM_NPROCS=4",
            "SLURM_PROCID=0 SLURM_JOB_NUM_NODES=2",
        ] {
            assert!(matches!(decided(batch, 0, false), Err(WorldError::NotSrun { .. })), "{batch}");
        }
        let error = fault("SLURM_NTASKS=4 SLURM_STEP_ID=0");
        assert!(error.contains("SLURM_NTASKS is set, and SLURM_PROCID is not"), "{error}");
        assert_eq!(world("SLURM_NTASKS=4 SLURM_JOB_ID=1"), Ok(None), "salloc on a login node");
    }

    #[test]
    fn addresses_of_ipv6_may_stand_in_brackets() {
        for written in ["fd00::7", "[fd00::7]", " fd00::7 "] {
            let all = [
                ("RANK", "0"),
                ("WORLD_SIZE", "2"),
                ("MASTER_ADDR", written),
                ("MASTER_PORT", "5"),
            ];
            let of = |name: &str| {
                all.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_string())
            };
            let Ok(World::Rank(spec)) = decide(&of, None, false) else { panic!("{written}") };
            assert_eq!((spec.master.as_str(), spec.address().as_str()), ("fd00::7", "[fd00::7]:5"));
        }
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
        let error = fault("LOCAL_RANK=0 MASTER_ADDR=a");
        assert!(error.contains("LOCAL_RANK is set, and RANK is not"), "{error}");
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
