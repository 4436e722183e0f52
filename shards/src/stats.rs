//! Counters of the data path: time, occupancy, waiting.
