//! Batch normalisation of groups, with the residual, ReLU and max pool that follow: see `norm.cpp`.

mod load;

use std::ffi::c_void;
#[cfg(feature = "nvjpeg")]
use std::path::PathBuf;
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

#[cfg(feature = "nvjpeg")]
pub use load::program;
pub use load::{KernelsMissing, ready};

#[cfg(feature = "nvjpeg")]
use super::text;
use super::{ShimError, call};

mod ffi {
    use std::ffi::{c_char, c_void};

    use torch_sys::C_tensor;

    unsafe extern "C" {
        #[cfg(feature = "nvjpeg")]
        pub(super) fn detco_norm_libtorch(
            text: *mut c_char,
            text_len: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_norm_register(
            cuda_index: i64,
            launch: *mut c_void,
            functions: *const *mut c_void,
            count: i64,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) safe fn detco_norm_copies() -> i64;
        pub(super) fn detco_norm_average(
            map: *const C_tensor,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
        pub(super) fn detco_norm_forward(
            map: *const C_tensor,
            weight: *const C_tensor,
            bias: *const C_tensor,
            residual: *const C_tensor,
            other_weight: *const C_tensor,
            other_bias: *const C_tensor,
            groups: i64,
            relu: i32,
            pool: i32,
            eps: f64,
            out: *mut *mut C_tensor,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
    }
}

/// The GPU's kernels by name, in the order in which the shim wants them.
pub const KERNELS: [&str; 21] = [
    "add_moments_float",
    "finish_moments_float",
    "normalise_float",
    "normalise_pooled_float",
    "add_gradients_float",
    "spread_gradients_float",
    "add_gradients_of_two_float",
    "spread_gradients_of_two_float",
    "add_pooled_gradients_float",
    "spread_pooled_gradients_float",
    "add_moments_bf16",
    "finish_moments_bf16",
    "normalise_bf16",
    "normalise_pooled_bf16",
    "add_gradients_bf16",
    "spread_gradients_bf16",
    "add_gradients_of_two_bf16",
    "spread_gradients_of_two_bf16",
    "add_pooled_gradients_bf16",
    "spread_pooled_gradients_bf16",
    "finish_gradients_all",
];

/// Whether a block of the map's channels fits the kernels' vectors of eight.
pub fn takes(channels: i64) -> bool {
    channels % 8 == 0
}

/// Hands over the kernels, loaded on a GPU, in the order of [`KERNELS`].
///
/// # Safety
/// `launch` is the driver's `cuLaunchKernel`, the functions are those kernels, and their module stays
/// loaded as long as the process lives. No other thread normalises maps of that GPU meanwhile.
///
/// # Errors
/// When the shim keeps no place for such a GPU, or is one of another version.
#[cfg(feature = "nvjpeg")]
unsafe fn register(
    index: usize,
    launch: *mut c_void,
    functions: &[*mut c_void; KERNELS.len()],
) -> Result<(), ShimError> {
    call(|message, message_len| {
        // SAFETY: the list is as long as said; the rest is the caller's promise.
        unsafe {
            ffi::detco_norm_register(
                index as i64,
                launch,
                functions.as_ptr(),
                functions.len() as i64,
                message,
                message_len,
            )
        }
    })
}

/// The folder of the libtorch that this process runs with.
#[cfg(feature = "nvjpeg")]
fn libtorch() -> Result<PathBuf, ShimError> {
    let mut path = [0_u8; 4096];
    call(|message, message_len| {
        // SAFETY: both buffers live through the call and are as long as said.
        unsafe {
            ffi::detco_norm_libtorch(
                path.as_mut_ptr().cast(),
                path.len() as i64,
                message,
                message_len,
            )
        }
    })?;
    // Its library lies in `lib`.
    Ok(PathBuf::from(text(&path)).parent().map(PathBuf::from).unwrap_or_default())
}

/// How many maps and gradients [`normalise`] had to copy on this thread so far, since they did not lie
/// channels last.
pub fn copies() -> i64 {
    ffi::detco_norm_copies()
}

/// The mean of each map's pixels, `[n, c, h, w]` to `[n, c]`. Its gradient takes no memory, and has no
/// layout that the map's other gradients would have to follow.
///
/// # Errors
/// When `map` has other dimensions.
pub fn average(map: &Tensor) -> Result<Tensor, ShimError> {
    let mut out = ptr::null_mut();
    call(|message, message_len| {
        // SAFETY: the tensor lives through the call; `out` has a place for one.
        unsafe { ffi::detco_norm_average(map.as_ptr(), &mut out, message, message_len) }
    })?;
    // SAFETY: the call succeeded, so this is a tensor of its own that nobody else frees.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// What [`normalise`] gives.
#[derive(Debug)]
pub struct Normalised {
    /// `[n, c, h, w]`, channels innermost.
    pub map: Tensor,
    /// Where something was added, the same memory twice more, for other readers. What flows back from all
    /// of them is added up on the way, without a pass of its own; the second is for a reader whose gradient
    /// is the same for all pixels of a sample, as that of [`average`]. None is to be changed in place.
    pub again: Option<[Tensor; 2]>,
    /// Of what was normalised.
    pub moments: Moments,
    /// Of the other layer, where there is one.
    pub other: Option<Moments>,
}

/// Statistics of a map's groups.
#[derive(Debug)]
pub struct Moments {
    /// Each group's mean, `[groups, c]`.
    pub mean: Tensor,
    /// Each group's unbiased variance, `[groups, c]`.
    pub variance: Tensor,
}

/// A map to be normalised, and by what.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// `[n, c, h, w]`, float32 or bfloat16.
    pub x: &'a Tensor,
    /// `[c]`, float32.
    pub weight: &'a Tensor,
    /// `[c]`, float32.
    pub bias: &'a Tensor,
}

/// What follows a normalisation.
#[derive(Debug, Clone, Copy)]
pub enum Then<'a> {
    /// Nothing.
    Nothing,
    /// A ReLU.
    Relu,
    /// A ReLU, then the stem's max pool: 3×3 pixels, a stride of 2, padding of 1.
    ReluThenPool,
    /// This is added, then a ReLU.
    AddThenRelu(&'a Tensor),
}

/// Normalises each of `groups` blocks of samples of a layer's map by its own mean and variance. Gradients
/// flow to the map, weight and bias, and to what is added.
///
/// # Errors
/// When n is no multiple of groups or c none of eight, types do not fit, or, on a GPU, the kernels are not
/// [`ready`].
pub fn normalise(
    layer: Layer<'_>,
    groups: i64,
    eps: f64,
    then: Then<'_>,
) -> Result<Normalised, ShimError> {
    let (residual, relu, pool) = match then {
        Then::Nothing => (None, 0, 0),
        Then::Relu => (None, 1, 0),
        Then::ReluThenPool => (None, 1, 1),
        Then::AddThenRelu(other) => (Some(other), 1, 0),
    };
    forward(layer, [residual, None, None], groups, eps, relu, pool)
}

/// The ReLU of the sum of two layers, each normalised as [`normalise`] does it: where a stage begins, and the
/// way around has a layer of its own.
///
/// # Errors
/// As [`normalise`].
pub fn normalise_both(
    layer: Layer<'_>,
    other: Layer<'_>,
    groups: i64,
    eps: f64,
) -> Result<Normalised, ShimError> {
    let added = [other.x, other.weight, other.bias].map(Some);
    forward(layer, added, groups, eps, 1, 0)
}

fn forward(
    layer: Layer<'_>,
    added: [Option<&Tensor>; 3],
    groups: i64,
    eps: f64,
    relu: i32,
    pool: i32,
) -> Result<Normalised, ShimError> {
    let [residual, other_weight, other_bias] =
        added.map(|tensor| tensor.map_or(ptr::null(), Tensor::as_ptr));
    let mut out = [ptr::null_mut::<C_tensor>(); 7];
    call(|message, message_len| {
        // SAFETY: the tensors live through the call; `out` has places for seven.
        unsafe {
            ffi::detco_norm_forward(
                layer.x.as_ptr(),
                layer.weight.as_ptr(),
                layer.bias.as_ptr(),
                residual,
                other_weight,
                other_bias,
                groups,
                relu,
                pool,
                eps,
                out.as_mut_ptr(),
                message,
                message_len,
            )
        }
    })?;
    let owned = |tensor: *mut C_tensor| {
        // SAFETY: the call succeeded, so each is null or a tensor of its own that nobody else frees.
        (!tensor.is_null()).then(|| unsafe { Tensor::from_ptr(tensor) })
    };
    let [mean, variance, map, again, whole, other_mean, other_variance] = out.map(owned);
    let (Some(map), Some(mean), Some(variance)) = (map, mean, variance) else {
        return Err(ShimError("detco_norm_forward gave no map".into()));
    };
    Ok(Normalised {
        map,
        again: again.zip(whole).map(|(again, whole)| [again, whole]),
        moments: Moments { mean, variance },
        other: (other_mean.zip(other_variance)).map(|(mean, variance)| Moments { mean, variance }),
    })
}
