//! Stores of keys and values that all ranks see.

use std::ptr::NonNull;
use std::time::Duration;

use super::{ffi, made, millis};
use crate::shim::{ShimError, call};

/// Whether a store is served here or elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In this process.
    Serve,
    /// By another process.
    Join,
}

/// A connection to a store of keys and values that all ranks see (c10d's TCPStore).
#[derive(Debug)]
pub struct Store {
    pub(super) handle: NonNull<ffi::Opaque>,
    port: u16,
}

// SAFETY: c10d's stores belong to no thread.
unsafe impl Send for Store {}

// SAFETY: a TCPStore takes a lock around every operation, and a PrefixStore only puts a text, which
// nobody changes, before its keys.
unsafe impl Sync for Store {}

impl Store {
    /// Serves a store at `host:port` (port 0: any free one), or joins the one there; waits for it
    /// up to `timeout`. Keys are put under `prefix`.
    ///
    /// # Errors
    /// When the port is taken, or nobody answers.
    pub fn open(
        host: &str,
        port: u16,
        role: Role,
        prefix: &str,
        timeout: Duration,
    ) -> Result<Store, ShimError> {
        let (mut handle, mut found) = (std::ptr::null_mut(), 0);
        call(|message, message_len| {
            // SAFETY: both texts live through the call and are as long as said; the two results are
            // written to variables of ours.
            unsafe {
                ffi::detco_store_open(
                    host.as_ptr().cast(),
                    host.len() as i64,
                    port,
                    i32::from(role == Role::Serve),
                    millis(timeout),
                    prefix.as_ptr().cast(),
                    prefix.len() as i64,
                    &mut handle,
                    &mut found,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Store { handle: made(handle), port: found })
    }

    /// Where the store is served.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A connection of its own to the same store, for another thread.
    ///
    /// # Errors
    /// When the store is gone.
    pub fn another(&self) -> Result<Store, ShimError> {
        let mut handle = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: the handle is live until `self` is dropped; the result goes to our variable.
            unsafe {
                ffi::detco_store_clone(self.handle.as_ptr(), &mut handle, message, message_len)
            }
        })?;
        Ok(Store { handle: made(handle), port: self.port })
    }

    /// Sets a key.
    ///
    /// # Errors
    /// When the store is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), ShimError> {
        call(|message, message_len| {
            // SAFETY: the handle is live; key and value live through the call, as long as said.
            unsafe {
                ffi::detco_store_set(
                    self.handle.as_ptr(),
                    key.as_ptr().cast(),
                    key.len() as i64,
                    value.as_ptr(),
                    value.len() as i64,
                    message,
                    message_len,
                )
            }
        })
    }

    /// A key's value, if it is there.
    ///
    /// # Errors
    /// When the store is gone.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, ShimError> {
        let mut found = 0;
        call(|message, message_len| {
            // SAFETY: the handle is live; the key lives through the call and is as long as said.
            unsafe {
                ffi::detco_store_check(
                    self.handle.as_ptr(),
                    key.as_ptr().cast(),
                    key.len() as i64,
                    &mut found,
                    message,
                    message_len,
                )
            }
        })?;
        if found == 0 {
            return Ok(None);
        }
        let mut value = vec![0; 256];
        loop {
            let mut length = 0_i64;
            call(|message, message_len| {
                // SAFETY: the handle is live; key and buffer live through the call and are as long
                // as said.
                unsafe {
                    ffi::detco_store_get(
                        self.handle.as_ptr(),
                        key.as_ptr().cast(),
                        key.len() as i64,
                        value.as_mut_ptr(),
                        value.len() as i64,
                        &mut length,
                        message,
                        message_len,
                    )
                }
            })?;
            let (length, room) = (length as usize, value.len());
            value.resize(length, 0);
            if length <= room {
                return Ok(Some(value));
            }
        }
    }

    /// Adds to a key's number, which starts at 0, and returns the sum.
    ///
    /// # Errors
    /// When the store is gone.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, ShimError> {
        let mut sum = 0;
        call(|message, message_len| {
            // SAFETY: the handle is live; the key lives through the call and is as long as said.
            unsafe {
                ffi::detco_store_add(
                    self.handle.as_ptr(),
                    key.as_ptr().cast(),
                    key.len() as i64,
                    amount,
                    &mut sum,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(sum)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle is live and nobody uses it afterwards.
        unsafe { ffi::detco_store_close(self.handle.as_ptr()) };
    }
}
