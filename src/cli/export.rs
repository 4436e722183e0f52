//! `detco export`.
