//! [`Missing`]: the ranks that keep this one waiting, and why.

use std::fmt;

/// The last beat of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastSeen {
    /// The rank.
    pub rank: usize,
    /// Its step.
    pub step: u64,
    /// What it was doing.
    pub what: String,
    /// For how long it had been doing that, in milliseconds.
    pub busy_ms: u64,
    /// Time since that beat, in milliseconds.
    pub silent_ms: u64,
}

/// The ranks that keep this one waiting, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A rank ended with an error and told the others.
    Ended {
        /// `rank 2 of 4: …`
        message: String,
    },
    /// These ranks send no beats any more.
    Silent(Vec<LastSeen>),
    /// These ranks are alive and behind.
    Late(Vec<LastSeen>),
    /// The store does not answer.
    Store {
        /// `host:port`.
        address: String,
    },
    /// All ranks are alive, and as far as this one.
    Nobody,
}

impl Missing {
    /// The ranks that it names.
    pub(super) fn ranks(&self) -> Vec<usize> {
        match self {
            Missing::Silent(all) | Missing::Late(all) => all.iter().map(|one| one.rank).collect(),
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| ms as f64 / 1e3;
        match self {
            Missing::Ended { message } => write!(f, "{message}"),
            Missing::Store { address } => {
                write!(
                    f,
                    "the store at {address} does not answer: it is gone, or the network is cut"
                )
            }
            Missing::Nobody => write!(f, "all ranks are alive and at the same point"),
            Missing::Silent(all) => {
                for (i, one) in all.iter().enumerate() {
                    let LastSeen { rank, step, what, silent_ms, .. } = one;
                    let between = if i == 0 { "" } else { "; " };
                    let silent = seconds(*silent_ms);
                    write!(
                        f,
                        "{between}rank {rank} is lost: silent for {silent:.1} s, last seen at \
                         {what} of step {step}"
                    )?;
                }
                Ok(())
            }
            Missing::Late(all) => {
                for (i, one) in all.iter().enumerate() {
                    let LastSeen { rank, step, what, busy_ms, .. } = one;
                    let between = if i == 0 { "" } else { "; " };
                    let busy = seconds(*busy_ms);
                    write!(
                        f,
                        "{between}rank {rank} is slow: for {busy:.1} s at {what} of step {step}"
                    )?;
                }
                Ok(())
            }
        }
    }
}
