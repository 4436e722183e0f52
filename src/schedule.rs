//! Learning rate over epochs.
