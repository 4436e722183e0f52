//! One update, ten moves.
