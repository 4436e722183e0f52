//! Weights for other people's programs.
