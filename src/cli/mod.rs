//! The one command line.
