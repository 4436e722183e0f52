//! Variables, read as numbers, hosts and ports; errors name them.

use super::error::WorldError;
use crate::shim::c10d::{Member, Role};

/// What a world's ranks need to find each other, in words for error messages.
pub(super) const NEEDS: &str = "torchrun, srun, mpirun and PyTorchJob set it; by hand, set RANK, WORLD_SIZE, \
                     MASTER_ADDR and MASTER_PORT for every rank";

/// The port of PyTorch's own launchers.
pub(super) const PORT: u16 = 29_500;

pub(super) struct Variables<'a>(pub(super) &'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    pub(super) fn text(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    pub(super) fn is_set(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    pub(super) fn number(&self, name: &'static str) -> Result<Option<usize>, WorldError> {
        let Some(value) = self.text(name) else { return Ok(None) };
        let number = value.trim().parse().ok().filter(|number| *number <= i32::MAX as usize);
        let expected = "a number".to_string();
        number.map(Some).ok_or(WorldError::Value { name, value, expected })
    }

    pub(super) fn member(
        &self,
        rank: &'static str,
        size: &'static str,
    ) -> Result<Member, WorldError> {
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
    pub(super) fn local(
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
    pub(super) fn host(&self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let host = text.trim();
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        Some(bare.unwrap_or(host).to_string())
    }

    pub(super) fn port(&self, name: &'static str) -> Result<Option<u16>, WorldError> {
        let Some(value) = self.text(name) else { return Ok(None) };
        let port = value.trim().parse().ok().filter(|port| *port > 0);
        let expected = "a port, 1 to 65535".to_string();
        port.map(Some).ok_or(WorldError::Value { name, value, expected })
    }
}

/// Rank 0 serves the store unless an agent does.
pub(super) fn role_of(member: Member) -> Role {
    if member.rank == 0 { Role::Serve } else { Role::Join }
}
