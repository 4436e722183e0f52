//! The wiring: order, stream, decode, views, slab.
