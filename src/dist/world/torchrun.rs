//! What torchrun sets for a rank, and a PyTorchJob for a pod.

use super::error::WorldError;
use super::variables::{NEEDS, Variables};
use super::{Here, Launcher, Spec};
use crate::shim::c10d::{Member, Role};

/// What torchrun sets for a rank, or a PyTorchJob for a pod: then LOCAL_RANK is missing.
pub(super) fn torchrun(of: &Variables<'_>) -> Result<Spec, WorldError> {
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
