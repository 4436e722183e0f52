//! JSON lines, TensorBoard, progress.
