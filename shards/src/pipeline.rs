//! The wiring: order, stream, decode, views, slab.

use serde::{Deserialize, Serialize};

/// What happens when a sample cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadSample {
    /// The run ends and names the sample.
    Fail,
    /// The sample is counted, logged and replaced by another, within a budget.
    Skip,
}
