//! SGD whose state can be saved.
