//! `detco pack`.
