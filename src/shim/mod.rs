//! The wall between Rust and libtorch, for what the crate `tch` does not reach.
//!
//! The C++ beside this file is compiled by `build.rs` against the libtorch that `tch` names; its
//! contract stands at the top of `shim.h`. A call that fails becomes a [`ShimError`] with
//! libtorch's words.

#![expect(unsafe_code, reason = "foreign functions; each call carries its proof")]

pub mod c10d;
pub mod feed;
pub mod norm;
pub mod panics;
pub mod step;

use std::ffi::{CStr, c_char};

use thiserror::Error;

/// What libtorch said when a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("libtorch: {0}")]
pub struct ShimError(String);

impl ShimError {
    /// What a wrapper around the shim has to say itself.
    pub(crate) fn new(message: impl Into<String>) -> ShimError {
        ShimError(message.into())
    }

    /// Whether there was too little memory, on the host or on a GPU.
    pub fn is_out_of_memory(&self) -> bool {
        is_out_of_memory(&self.0)
    }
}

impl From<tch::TchError> for ShimError {
    fn from(error: tch::TchError) -> ShimError {
        let said = match error {
            tch::TchError::Torch(said) => said,
            other => other.to_string(),
        };
        ShimError(without_origin(&said).to_owned())
    }
}

/// What libtorch said, without where its own sources threw it.
fn without_origin(said: &str) -> &str {
    said.split("\nException raised from").next().unwrap_or_default()
}

/// Whether a message of libtorch's allocators says that there was too little memory.
pub fn is_out_of_memory(message: &str) -> bool {
    let words = ["out of memory", "can't allocate memory", "not enough memory"];
    words.iter().any(|words| message.contains(words))
}

/// Bytes of a message that are kept: libtorch's begin with what matters and end in a backtrace.
const MESSAGE_MAX: usize = 4096;

/// Makes a call that fills a buffer with its message and returns a status.
fn call(function: impl FnOnce(*mut c_char, i64) -> i32) -> Result<(), ShimError> {
    let mut message = [0_u8; MESSAGE_MAX];
    match function(message.as_mut_ptr().cast(), MESSAGE_MAX as i64) {
        0 => Ok(()),
        _ => {
            let text = text(&message);
            Err(ShimError(without_origin(&text).to_owned()))
        }
    }
}

/// The text up to the first NUL.
fn text(buffer: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(buffer).unwrap_or_default();
    text.to_string_lossy().trim_end().to_string()
}

mod ffi {
    use std::ffi::c_char;

    unsafe extern "C" {
        pub(super) fn detco_headers_version(
            text: *mut c_char,
            text_len: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// The version of libtorch whose headers the shim was compiled with, such as `2.11.0`.
///
/// # Errors
/// Never in practice: the function throws nothing.
pub fn headers_version() -> Result<String, ShimError> {
    let mut version = [0_u8; 64];
    call(|message, message_len| {
        // SAFETY: both buffers live through the call and are as long as said.
        unsafe {
            ffi::detco_headers_version(
                version.as_mut_ptr().cast(),
                version.len() as i64,
                message,
                message_len,
            )
        }
    })?;
    Ok(text(&version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_knows_its_headers() {
        assert!(headers_version().unwrap().starts_with("2.11."));
    }

    #[test]
    fn a_failed_call_carries_its_message() {
        let failing = |message: *mut c_char, _| {
            // SAFETY: `call` hands over a buffer of `MESSAGE_MAX` bytes.
            unsafe { message.copy_from_nonoverlapping(c"no such thing\n".as_ptr(), 15) };
            1
        };
        assert_eq!(call(failing).unwrap_err().to_string(), "libtorch: no such thing");
    }
}
