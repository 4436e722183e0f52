//! Operations on lists of tensors, in a few launches each: SGD, moving averages, copies, norms, gradients.

use tch::Tensor;
use torch_sys::C_tensor;

use super::made;
use crate::shim::{ShimError, call};

mod ffi {
    use std::ffi::c_char;

    use torch_sys::C_tensor;

    type List = *const *const C_tensor;

    unsafe extern "C" {
        pub(super) fn detco_step_sgd(
            parameters: List,
            gradients: List,
            buffers: List,
            count: i64,
            decay: f64,
            momentum: f64,
            rate: f64,
            nesterov: i32,
            skip: *const C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_lerp(
            into: List,
            towards: List,
            count: i64,
            weight: f64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_copy(
            into: List,
            from: List,
            count: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_add(
            into: List,
            count: i64,
            summand: *const C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_length(
            tensors: List,
            count: i64,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_forget_gradients(
            tensors: List,
            count: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_step_channels_last(
            tensor: *const C_tensor,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// Numbers of an SGD update.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Weight decay.
    pub decay: f64,
    /// Momentum.
    pub momentum: f64,
    /// Learning rate.
    pub learning: f64,
    /// Whether the momentum is Nesterov's.
    pub nesterov: bool,
}

/// One update by `torch.optim.SGD`'s arithmetic (no dampening; buffers that start at
/// zero, and stay so without momentum) of all parameters in a few launches. Where `skip`, one float on the device, is 1, nothing
/// changes.
///
/// # Errors
/// When the tensors of a place differ in shape, type or device.
///
/// # Panics
/// When the lists differ in length.
pub fn sgd(
    parameters: &[Tensor],
    gradients: &[Tensor],
    buffers: &[Tensor],
    rates: Rates,
    skip: Option<&Tensor>,
) -> Result<(), ShimError> {
    assert_eq!((parameters.len(), parameters.len()), (gradients.len(), buffers.len()));
    if parameters.is_empty() {
        return Ok(());
    }
    let lists = [parameters, gradients, buffers].map(pointers);
    let skip = skip.map_or(std::ptr::null(), Tensor::as_ptr);
    call(|message, message_len| {
        // SAFETY: three lists of as many live tensors as said, `skip` null or live, all borrowed
        // for the call; the message's buffer is as long as said.
        unsafe {
            ffi::detco_step_sgd(
                lists[0].as_ptr(),
                lists[1].as_ptr(),
                lists[2].as_ptr(),
                parameters.len() as i64,
                rates.decay,
                rates.momentum,
                rates.learning,
                i32::from(rates.nesterov),
                skip,
                message,
                message_len,
            )
        }
    })
}

/// `into[i] += weight * (towards[i] - into[i])`, in a few launches.
///
/// # Errors
/// When shapes or types differ.
///
/// # Panics
/// When the lists differ in length.
pub fn lerp(into: &[Tensor], towards: &[Tensor], weight: f64) -> Result<(), ShimError> {
    assert_eq!(into.len(), towards.len());
    if into.is_empty() {
        return Ok(());
    }
    let (into, towards) = (pointers(into), pointers(towards));
    let count = into.len() as i64;
    call(|message, message_len| {
        // SAFETY: two lists of `count` live tensors, borrowed for the call; the buffer is as said.
        unsafe {
            ffi::detco_step_lerp(
                into.as_ptr(),
                towards.as_ptr(),
                count,
                weight,
                message,
                message_len,
            )
        }
    })
}

/// Copies the values of each tensor into its partner, in a few launches.
///
/// # Errors
/// When shapes differ.
///
/// # Panics
/// When the lists differ in length.
pub fn copy(into: &[Tensor], from: &[Tensor]) -> Result<(), ShimError> {
    assert_eq!(into.len(), from.len());
    if into.is_empty() {
        return Ok(());
    }
    let (into, from) = (pointers(into), pointers(from));
    let count = into.len() as i64;
    call(|message, message_len| {
        // SAFETY: two lists of `count` live tensors, borrowed for the call; the buffer is as said.
        unsafe { ffi::detco_step_copy(into.as_ptr(), from.as_ptr(), count, message, message_len) }
    })
}

/// Adds a scalar tensor to each.
///
/// # Errors
/// When `summand` is no scalar, or lies on another device.
pub fn add(into: &[Tensor], summand: &Tensor) -> Result<(), ShimError> {
    if into.is_empty() {
        return Ok(());
    }
    let (into, count) = (pointers(into), into.len() as i64);
    call(|message, message_len| {
        // SAFETY: `count` live tensors and one more, borrowed for the call; the buffer is as said.
        unsafe { ffi::detco_step_add(into.as_ptr(), count, summand.as_ptr(), message, message_len) }
    })
}

/// Euclidean length of all tensors together, a scalar.
///
/// # Errors
/// When there is none, or they differ in type or device.
pub fn length(tensors: &[Tensor]) -> Result<Tensor, ShimError> {
    let (list, count) = (pointers(tensors), tensors.len() as i64);
    made(|out, message, message_len| {
        // SAFETY: `count` live tensors, borrowed for the call; `out` and the buffer are ours.
        unsafe { ffi::detco_step_length(list.as_ptr(), count, out, message, message_len) }
    })
}

/// Takes the gradients of these tensors away.
///
/// # Errors
/// Never in practice.
pub fn forget_gradients(tensors: &[Tensor]) -> Result<(), ShimError> {
    let (list, count) = (pointers(tensors), tensors.len() as i64);
    call(|message, message_len| {
        // SAFETY: `count` live tensors, borrowed for the call; the buffer is as long as said.
        unsafe { ffi::detco_step_forget_gradients(list.as_ptr(), count, message, message_len) }
    })
}

/// `[n, c, h, w]` with channels innermost in memory; the same memory if they are already.
///
/// # Errors
/// When the tensor has not four dimensions.
pub fn channels_last(tensor: &Tensor) -> Result<Tensor, ShimError> {
    made(|out, message, message_len| {
        // SAFETY: a live tensor, borrowed for the call; `out` and the buffer are ours.
        unsafe { ffi::detco_step_channels_last(tensor.as_ptr(), out, message, message_len) }
    })
}

/// The tensors behind a list, borrowed for a call.
fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
    }

    #[test]
    fn sgd_skips_where_the_device_says_so() {
        let rates = Rates { decay: 0.1, momentum: 0.5, learning: 2.0, nesterov: false };
        let tensors = |value: f64| [Tensor::full([2, 3], value, CPU)];
        let (parameter, gradient, buffer) = (tensors(1.0), tensors(0.4), tensors(3.0));
        let flag = |value: f64| Tensor::full([1], value, CPU);
        sgd(&parameter, &gradient, &buffer, rates, Some(&flag(1.0))).unwrap();
        assert_eq!(numbers(&parameter[0]), [1.0; 6]);
        assert_eq!(numbers(&buffer[0]), [3.0; 6]);
        sgd(&parameter, &gradient, &buffer, rates, Some(&flag(0.0))).unwrap();
        // d = 0.4 + 0.1; buffer = 1.5 + d; parameter -= 2 * buffer
        assert!((numbers(&buffer[0])[5] - 2.0).abs() < 1e-6);
        assert!((numbers(&parameter[0])[5] + 3.0).abs() < 1e-6);
        assert_eq!(numbers(&gradient[0]), numbers(&tensors(0.4)[0]));
    }

    #[test]
    fn sgd_reads_gradients_that_lie_otherwise_in_memory() {
        let rates = Rates { decay: 0.0, momentum: 0.0, learning: 1.0, nesterov: false };
        let gradient = Tensor::arange(2 * 3 * 4 * 4, CPU).view([2, 3, 4, 4]);
        let parameter = channels_last(&gradient.zeros_like()).unwrap();
        let buffer = parameter.zeros_like();
        assert_ne!(parameter.stride(), gradient.stride());
        let parameters = [parameter];
        sgd(&parameters, &[gradient.shallow_clone()], &[buffer], rates, None).unwrap();
        assert!(parameters[0].equal(&(gradient * -1.0)));
    }

    #[test]
    fn lists_are_followed_copied_added_and_measured() {
        let list = |values: [f64; 2]| values.map(|value| Tensor::full([3], value, CPU));
        let into = list([0.0, 10.0]);
        lerp(&into, &list([4.0, 20.0]), 0.25).unwrap();
        assert_eq!((numbers(&into[0]), numbers(&into[1])), (vec![1.0; 3], vec![12.5; 3]));
        assert!((numbers(&length(&list([3.0, 4.0])).unwrap())[0] - 75_f64.sqrt()).abs() < 1e-5);
        copy(&into, &list([7.0, 8.0])).unwrap();
        add(&into, &Tensor::from(0.5_f32)).unwrap();
        assert_eq!((numbers(&into[0]), numbers(&into[1])), (vec![7.5; 3], vec![8.5; 3]));
        let error = lerp(&into, &[into[0].view([3, 1]), Tensor::zeros([5], CPU)], 0.5);
        assert!(error.unwrap_err().to_string().starts_with("libtorch: "));
    }

    #[test]
    fn gradients_are_forgotten() {
        let x = Tensor::full([2], 3.0, CPU).set_requires_grad(true);
        (&x * &x).sum(None).backward();
        assert_eq!(numbers(&x.grad()), [6.0, 6.0]);
        forget_gradients(&[x.shallow_clone()]).unwrap();
        assert!(!x.grad().defined());
    }
}
