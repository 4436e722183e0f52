//! `detco profile`.
