//! What Slurm sets for a task, and its lists of nodes.

use super::error::WorldError;
use super::variables::{Variables, role_of};
use super::{Here, Launcher, Spec};

/// Slurm's numbers for steps that no srun has started begin here: batch scripts, salloc's own shells.
const OWN_STEPS: u64 = 0xffff_fff0;

/// The shell that salloc opens.
const SALLOC_STEP: u64 = 0xffff_fffa;

/// The task of a Slurm step; `None` outside of one.
pub(super) fn slurm(of: &Variables<'_>, terminal: bool) -> Result<Option<Spec>, WorldError> {
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

/// A port that every rank of a job computes alike; below 32768, from where Linux hands ports out.
pub(super) fn job_port(job: u64) -> u16 {
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
