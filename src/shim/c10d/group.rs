//! Process groups, and the collectives that run in them.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::time::Duration;

use tch::Tensor;

use super::store::Store;
use super::{ffi, made, millis};
use crate::shim::{ShimError, call};

/// The library compiled from `nccl.cpp`; empty if the build had no headers of CUDA.
static NCCL: &[u8] = include_bytes!(env!("DETCO_NCCL"));

/// Who a process is in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// From 0.
    pub rank: usize,
    /// Processes in the group.
    pub size: usize,
}

/// A collective that runs. It must be waited for: until then it reads and writes its tensors.
#[derive(Debug)]
#[must_use = "the tensors are not ready before `wait`"]
pub struct Work<'t> {
    handle: NonNull<ffi::Opaque>,
    waited: bool,
    tensors: PhantomData<&'t Tensor>,
}

impl Work<'_> {
    fn started(handle: *mut ffi::Opaque) -> Self {
        Work { handle: made(handle), waited: false, tensors: PhantomData }
    }

    /// Waits until the tensors may be used: on a GPU, by what is launched afterwards.
    ///
    /// # Errors
    /// When a rank is lost or the group's timeout is over.
    pub fn wait(mut self) -> Result<(), ShimError> {
        self.waited = true;
        self.finish()
    }

    fn finish(&self) -> Result<(), ShimError> {
        call(|message, message_len| {
            // SAFETY: the handle is live until `self` is dropped.
            unsafe { ffi::detco_work_wait(self.handle.as_ptr(), message, message_len) }
        })
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        if !self.waited {
            // Nobody is left who could be told; the tensors must not be let go before.
            let _ = self.finish();
        }
        // SAFETY: the handle is live and nobody uses it afterwards.
        unsafe { ffi::detco_work_close(self.handle.as_ptr()) };
    }
}

/// Processes that make the same calls in the same order.
#[derive(Debug)]
pub struct Group {
    pub(super) handle: NonNull<ffi::Opaque>,
    pub(super) member: Member,
}

impl Group {
    /// A group of CPUs that talk over TCP (Gloo), this one from the address `host`. Waits for all
    /// members.
    ///
    /// # Errors
    /// When the address is not this machine's, or a member does not come within `timeout`.
    pub fn gloo(
        store: &Store,
        host: &str,
        member: Member,
        timeout: Duration,
    ) -> Result<Group, ShimError> {
        let mut handle = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: the store's handle is live; `host` lives through the call and is as long as
            // said.
            unsafe {
                ffi::detco_group_gloo(
                    store.handle.as_ptr(),
                    host.as_ptr().cast(),
                    host.len() as i64,
                    member.rank as i32,
                    member.size as i32,
                    millis(timeout),
                    &mut handle,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Group { handle: made(handle), member })
    }

    /// A group of GPUs (NCCL), of which `gpu` is this process's. Loads libtorch's CUDA half if it is not loaded yet.
    ///
    /// # Errors
    /// When this build or this machine has no CUDA, or a member does not come within `timeout`.
    pub fn nccl(
        store: &Store,
        gpu: usize,
        member: Member,
        timeout: Duration,
    ) -> Result<Group, ShimError> {
        if NCCL.is_empty() {
            let missing = "this program was built without NCCL: CUDA's headers were missing";
            return Err(ShimError(missing.into()));
        }
        let mut handle = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: the store's handle is live; the library's bytes are static and as many as
            // said.
            unsafe {
                ffi::detco_group_nccl(
                    store.handle.as_ptr(),
                    NCCL.as_ptr(),
                    NCCL.len() as i64,
                    gpu as i32,
                    member.rank as i32,
                    member.size as i32,
                    millis(timeout),
                    &mut handle,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Group { handle: made(handle), member })
    }

    /// Ends a group of GPUs in the way NCCL wants: all members call it, after their last collective.
    /// What is only dropped is aborted. For a group of CPUs there is nothing to do.
    ///
    /// # Errors
    /// When a member is lost.
    pub fn shut_down(&self) -> Result<(), ShimError> {
        call(|message, message_len| {
            // SAFETY: the group is live.
            unsafe { ffi::detco_group_shut_down(self.handle.as_ptr(), message, message_len) }
        })
    }

    /// Sums a contiguous tensor over the members, in place.
    ///
    /// # Errors
    /// When the group is broken; what happens later is [`Work::wait`]'s to say.
    pub fn sum<'t>(&self, tensor: &'t mut Tensor) -> Result<Work<'t>, ShimError> {
        let mut work = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: group and tensor are live; the work keeps the tensor's memory until it ends.
            unsafe {
                ffi::detco_group_sum(
                    self.handle.as_ptr(),
                    ffi::tensor(tensor),
                    &mut work,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Work::started(work))
    }

    /// Every member's `mine`, `[n, …]` and contiguous, one after the other into `all`
    /// `[size * n, …]`.
    ///
    /// # Errors
    /// When the shapes do not fit each other, or the group is broken.
    pub fn gather<'t>(&self, mine: &'t Tensor, all: &'t mut Tensor) -> Result<Work<'t>, ShimError> {
        let mut work = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: group and tensors are live; the work keeps their memory until it ends.
            unsafe {
                ffi::detco_group_gather(
                    self.handle.as_ptr(),
                    ffi::tensor(mine),
                    ffi::tensor(all),
                    &mut work,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Work::started(work))
    }

    /// Sends the first `send[0]` rows of `mine` to member 0, the next `send[1]` to member 1, and so
    /// on; takes `receive[r]` rows of each member r into `into`, in the order of the members.
    ///
    /// # Errors
    /// When the counts do not fit the tensors, or the group is broken.
    ///
    /// # Panics
    /// When there is not one count a member.
    pub fn exchange<'t>(
        &self,
        mine: &'t Tensor,
        send: &[i64],
        into: &'t mut Tensor,
        receive: &[i64],
    ) -> Result<Work<'t>, ShimError> {
        assert_eq!((send.len(), receive.len()), (self.member.size, self.member.size));
        let mut work = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: group and tensors are live, the work keeps their memory until it ends; there
            // are as many counts as members.
            unsafe {
                ffi::detco_group_exchange(
                    self.handle.as_ptr(),
                    ffi::tensor(mine),
                    send.as_ptr(),
                    ffi::tensor(into),
                    receive.as_ptr(),
                    &mut work,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Work::started(work))
    }

    /// Overwrites a contiguous tensor on all members by the one of member `root`.
    ///
    /// # Errors
    /// When the group is broken.
    pub fn broadcast<'t>(
        &self,
        tensor: &'t mut Tensor,
        root: usize,
    ) -> Result<Work<'t>, ShimError> {
        let mut work = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: group and tensor are live; the work keeps the tensor's memory until it ends.
            unsafe {
                ffi::detco_group_broadcast(
                    self.handle.as_ptr(),
                    ffi::tensor(tensor),
                    root as i32,
                    &mut work,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Work::started(work))
    }

    /// Waits until all members are here.
    ///
    /// # Errors
    /// When one is not within `timeout`; with Gloo, member 0's error names those that are missing.
    pub fn barrier(&self, timeout: Duration) -> Result<(), ShimError> {
        call(|message, message_len| {
            // SAFETY: the handle is live until `self` is dropped.
            unsafe {
                ffi::detco_group_barrier(
                    self.handle.as_ptr(),
                    millis(timeout),
                    message,
                    message_len,
                )
            }
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the handle is live and nobody uses it afterwards; works and reducers hold
        // references of their own to what is behind it.
        unsafe { ffi::detco_group_close(self.handle.as_ptr()) };
    }
}
