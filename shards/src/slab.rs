//! Recycled host buffers that hold a batch of pixels.
