//! [`ConfigError`]: why a configuration was refused.

use std::path::PathBuf;

use detco_shards::views::RecipeError;
use thiserror::Error;

use crate::method::Refused;

/// Why a configuration was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the config {path}: {source}")]
    Read {
        /// The file that was asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither a recipe nor a file.
    #[error("{name:?} is neither a built-in recipe nor a file{hint}\nbuilt-in recipes: {known}")]
    UnknownRecipe {
        /// What was asked for.
        name: String,
        /// The nearest built-in name, if one is near.
        hint: String,
        /// All built-in names.
        known: String,
    },
    /// A base that is none.
    #[error(
        "{origin}: base = {name:?}: a base is a built-in recipe, one of {known}; files do not chain"
    )]
    Base {
        /// The file that names it.
        origin: String,
        /// What it names.
        name: String,
        /// All built-in names.
        known: String,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{origin}: {message}{hint}")]
    Parse {
        /// The file or recipe the text came from.
        origin: String,
        /// What the parser said, with line and column.
        message: String,
        /// The nearest valid key, if a key was unknown.
        hint: String,
    },
    /// `--set` without `=`, or through a value that is no table.
    #[error("--set {text:?}: {reason}")]
    Set {
        /// The argument.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Views that cannot be drawn.
    #[error("views.{0}")]
    Views(#[from] RecipeError),
    /// A legal value that makes no sense here.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// Dotted key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What was expected.
        reason: String,
    },
}

impl From<Refused> for ConfigError {
    fn from(Refused { key, value, expected }: Refused) -> ConfigError {
        ConfigError::Value { key, value, reason: format!("expected {expected}") }
    }
}
