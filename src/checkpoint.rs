//! Everything needed to go on, one atomic directory.
