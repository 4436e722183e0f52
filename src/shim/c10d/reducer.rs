//! The reducer: gradients averaged over a group while backward runs.

use std::ptr::NonNull;

use tch::Tensor;

use super::group::Group;
use super::{ffi, made};
use crate::shim::{ShimError, call};

/// Those of `parameters` that get a gradient in a backward pass from the scalar `loss`, in their order.
///
/// # Errors
/// When libtorch fails.
pub fn taking_part(loss: &Tensor, parameters: &[Tensor]) -> Result<Vec<Tensor>, ShimError> {
    let pointers: Vec<ffi::TensorPtr> = parameters.iter().map(ffi::tensor).collect();
    let mut reached = vec![0_u8; pointers.len()];
    call(|message, message_len| {
        // SAFETY: all tensors live through the call; there are as many pointers as said, and room for as
        // many results.
        unsafe {
            ffi::detco_graph_reaches(
                ffi::tensor(loss),
                pointers.as_ptr(),
                pointers.len() as i64,
                reached.as_mut_ptr(),
                message,
                message_len,
            )
        }
    })?;
    let reached = parameters.iter().zip(reached).filter(|(_, reached)| *reached == 1);
    Ok(reached.map(|(parameter, _)| parameter.shallow_clone()).collect())
}

/// How gradients travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// As they are.
    Whole,
    /// Rounded to bfloat16: half the bytes of float32.
    Bf16,
}

/// Averages gradients over a group while backward runs, bucket by bucket: the core of PyTorch's
/// DistributedDataParallel. The buckets depend on the parameters alone, so that every backward pass sums in
/// the same order, the first after a restart too.
#[derive(Debug)]
pub struct Reducer {
    handle: NonNull<ffi::Opaque>,
}

impl Reducer {
    /// For these parameters, each of which must get a gradient in each [`Reducer::backward`].
    ///
    /// # Errors
    /// When the members' parameters differ in number, shape or type.
    pub fn new(
        group: &Group,
        parameters: &[Tensor],
        bucket_bytes: i64,
        wire: Wire,
    ) -> Result<Reducer, ShimError> {
        let pointers: Vec<ffi::TensorPtr> = parameters.iter().map(ffi::tensor).collect();
        let mut handle = std::ptr::null_mut();
        call(|message, message_len| {
            // SAFETY: the group's handle and all tensors are live; C++ copies the tensors'
            // references, there are as many as said.
            unsafe {
                ffi::detco_reducer_open(
                    group.handle.as_ptr(),
                    pointers.as_ptr(),
                    pointers.len() as i64,
                    bucket_bytes,
                    i32::from(wire == Wire::Bf16),
                    &mut handle,
                    message,
                    message_len,
                )
            }
        })?;
        Ok(Reducer { handle: made(handle) })
    }

    /// Backward from the scalar `loss`; when it returns, the gradients are means over the group.
    ///
    /// # Errors
    /// When a member is lost or slow, or a parameter got no gradient the last time.
    pub fn backward(&self, loss: &Tensor) -> Result<(), ShimError> {
        call(|message, message_len| {
            // SAFETY: the handle is live until `self` is dropped, `loss` through the call.
            unsafe {
                ffi::detco_reducer_backward(
                    self.handle.as_ptr(),
                    ffi::tensor(loss),
                    message,
                    message_len,
                )
            }
        })
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: the handle is live and nobody uses it afterwards.
        unsafe { ffi::detco_reducer_close(self.handle.as_ptr()) };
    }
}
