//! The ends of a shard: whether its members begin and end where an index says.

use std::path::Path;

use super::super::tar::{self, BLOCK, Kind, Walker};
use super::super::{ShardError, StaleFault};
use super::{Span, split_name};

/// Where an index says that the members of its shard begin and end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ends {
    /// The first member of all.
    pub(super) first: Span,
    /// End of the last one, padding included.
    pub(super) end: u64,
}

impl Ends {
    /// The shard's first member is the index's first, and after the index's last only the end
    /// follows.
    ///
    /// # Errors
    ///
    /// [`ShardError::Disagree`] otherwise.
    pub fn check(&self, bytes: &[u8], index: &Path, shard: &Path) -> Result<(), ShardError> {
        check_ends(bytes, self).map_err(|fault| ShardError::Disagree {
            index: index.to_path_buf(),
            shard: shard.to_path_buf(),
            fault,
        })
    }
}

fn check_ends(bytes: &[u8], ends: &Ends) -> Result<(), StaleFault> {
    let unindexed = |member: &tar::Member<'_>| {
        let name = String::from_utf8_lossy(&member.name).into_owned();
        StaleFault::Unindexed { name, offset: member.data }
    };
    let header = |error: tar::TarError| StaleFault::Header {
        offset: error.offset.saturating_add(BLOCK),
        fault: error.fault,
    };
    for member in Walker::new(bytes) {
        let member = member.map_err(header)?;
        if member.data == ends.first.offset {
            let (indexed, actual) = (ends.first.size, member.payload.len() as u64);
            if indexed != actual {
                let offset = member.data;
                return Err(StaleFault::Size { offset, indexed, actual });
            }
            break;
        }
        if belongs(&member) {
            return Err(unindexed(&member));
        }
    }
    for member in Walker::at(bytes, ends.end) {
        let member = member.map_err(header)?;
        if belongs(&member) {
            return Err(unindexed(&member));
        }
    }
    Ok(())
}

/// Whether the member is part of a sample.
fn belongs(member: &tar::Member<'_>) -> bool {
    member.kind == Kind::File
        && std::str::from_utf8(&member.name).is_ok_and(|name| split_name(name).is_some())
}
