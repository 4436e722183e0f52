//! Backbone, heads, encoders, queues: pure.
