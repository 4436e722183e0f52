//! The shard format, byte by byte.
