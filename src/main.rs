//! `detco`.
fn main() {}
