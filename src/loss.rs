//! InfoNCE over levels and scopes.
