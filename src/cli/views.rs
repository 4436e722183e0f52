//! `detco views`.
