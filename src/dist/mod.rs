//! The world: ranks and their collectives.
