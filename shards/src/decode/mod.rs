//! JPEG bytes to RGB pixels.
