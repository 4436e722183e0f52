//! Tests: variables as launchers set them, and the worlds that they describe.

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
    assert_eq!(launched(&format!("{slurm} SLURM_STEP_TASKS_PER_NODE=1(x2)"), 4), (4, Some((1, 2))));
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
        ("JSM_NAMESPACE_RANK=1 JSM_NAMESPACE_SIZE=2 PMIX_RANK=1 MASTER_ADDR=h", (0, 1), "jsrun"),
        ("FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_TASK_LOCAL_ID=1 MASTER_ADDR=h", (1, 1), "flux run"),
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
        let all =
            [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", written), ("MASTER_PORT", "5")];
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
