//! Draw, then render: crops, colour, blur, jigsaw patches.

use serde::{Deserialize, Serialize};

/// What may be drawn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Global crops.
    pub global: GlobalRecipe,
    /// Jigsaw patches.
    pub local: Option<LocalRecipe>,
}

/// Global crops.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GlobalRecipe {
    /// Edge in pixels.
    pub size: u32,
}

/// Jigsaw patches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LocalRecipe {
    /// Edge before the cut, in pixels.
    pub size: u32,
    /// Edge of a patch, in pixels.
    pub patch: u32,
}

/// A field that makes no sense.
#[derive(Debug)]
pub struct RecipeFault {
    /// Dotted key.
    pub key: &'static str,
    /// The value as given.
    pub value: String,
    /// What was expected.
    pub reason: String,
}

impl Recipe {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), RecipeFault> {
        Ok(())
    }
}
