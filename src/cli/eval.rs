//! `detco eval`.
