//! What `tch` says by panicking: its operations have no other way to tell that memory ended.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};

use super::ShimError;

thread_local! {
    /// Whether this thread's panics of libtorch are caught, and said later.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body`, and gives back as an error what libtorch threw inside one of `tch`'s operations. Other panics go
/// on as they are: they are faults of this program.
///
/// # Errors
/// What libtorch said.
pub fn caught<T>(body: impl FnOnce() -> T) -> Result<T, ShimError> {
    silence_those_that_are_caught();
    let within = CAUGHT.replace(true); // another call, which still catches behind this one
    let result = panic::catch_unwind(AssertUnwindSafe(body));
    CAUGHT.set(within);
    result.map_err(|payload| match message(&*payload).and_then(said) {
        Some(said) => ShimError(said),
        None => panic::resume_unwind(payload),
    })
}

/// Once a process: a panic that [`caught`] turns into an error prints nothing by itself.
fn silence_those_that_are_caught() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let of_libtorch = message(info.payload()).and_then(said).is_some();
            if !(of_libtorch && CAUGHT.get()) {
                usual(info);
            }
        }));
    });
}

fn message(payload: &(dyn Any + Send)) -> Option<&str> {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
}

/// The first line of what libtorch said, from a panic's message with the error as `Debug` writes it.
fn said(message: &str) -> Option<String> {
    const WRAPPERS: [&str; 2] = ["Torch(\"", "ShimError(\""];
    let begin = WRAPPERS.iter().find_map(|wrapper| Some(message.find(wrapper)? + wrapper.len()))?;
    let quoted = &message[begin..];
    let line = quoted.split("\\n").next().unwrap_or(quoted);
    Some(line.trim_end_matches("\")").replace("\\\"", "\"").replace("\\'", "'"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn what_libtorch_throws_is_an_error_and_its_first_line() {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let error = caught(|| zeros(&[2, 3]).matmul(&zeros(&[4, 5]))).unwrap_err().to_string();
        assert_eq!(error, "libtorch: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)");
        let memory = caught(|| zeros(&[1 << 30, 1 << 30])).unwrap_err();
        assert!(memory.is_out_of_memory(), "{memory}");
        let said = ShimError("no \"memory\"\nat all".into());
        let shim: Result<(), ShimError> = caught(|| panic!("it fits: {said:?}"));
        assert_eq!(shim.unwrap_err().to_string(), "libtorch: no \"memory\"");
        assert_eq!(caught(|| 5).unwrap(), 5);
        let within = caught(|| (caught(|| 5).unwrap(), CAUGHT.get())).unwrap();
        assert_eq!((within, CAUGHT.get()), ((5, true), false));
    }

    #[test]
    fn other_panics_go_on() {
        let other = panic::catch_unwind(|| drop(caught(|| assert_eq!(1, 2, "a fault"))));
        assert!(message(&*other.unwrap_err()).unwrap().contains("a fault"));
    }
}
