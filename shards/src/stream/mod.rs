//! Opened shards: sample ids to slices of the map.
