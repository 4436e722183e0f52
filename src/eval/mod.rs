//! How good is the backbone, without training anything more on it.

pub mod classes;
pub mod knn;
