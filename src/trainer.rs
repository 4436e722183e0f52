//! `detco-train`: the commands that need libtorch; `detco` hands over to it.
fn main() {}
