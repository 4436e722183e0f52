//! One TOML file to one validated configuration.
