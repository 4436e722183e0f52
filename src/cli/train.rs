//! `detco train`.
