//! `detco inspect`.
