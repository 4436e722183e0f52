//! Slab to tensors: the only place where bytes become tensors.
