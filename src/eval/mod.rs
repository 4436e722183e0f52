//! How good is the backbone: without training anything more on it; and average precision of anybody's detections.

pub mod ap;
pub mod classes;
pub mod knn;
