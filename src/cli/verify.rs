//! `detco verify`.
