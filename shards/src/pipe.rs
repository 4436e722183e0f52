//! A pool of worker threads between two bounded channels.
