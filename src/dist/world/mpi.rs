//! What MPI's launchers set, family by family.

use super::error::WorldError;
use super::slurm::job_port;
use super::variables::{PORT, Variables, role_of};
use super::{Here, Launcher, Spec};

/// The variables of an MPI launcher, which give rank and size but not the address of rank 0.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) rank: &'static str,
    pub(super) size: &'static str,
    pub(super) local_rank: &'static [&'static str],
    pub(super) local_size: &'static [&'static str],
    /// Tells all ranks where the first is.
    pub(super) hint: &'static str,
    /// Whether srun sets them as well.
    pub(super) by_srun: bool,
}

/// In the order of precedence: jsrun and MVAPICH set PMI's variables too.
pub(super) const FAMILIES: &[Family] = &[
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
    pub(super) fn read(&self, of: &Variables<'_>) -> Result<Spec, WorldError> {
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
    pub(super) fn agrees(&self, of: &Variables<'_>, step: Option<&Spec>) -> bool {
        let same = |name, value: usize| {
            of.number(name).ok().flatten().is_none_or(|number| number == value)
        };
        step.is_some_and(|Spec { member, .. }| {
            let by_size = self.size == "WORLD_SIZE" || same(self.size, member.size);
            same(self.rank, member.rank) && by_size
        })
    }
}
