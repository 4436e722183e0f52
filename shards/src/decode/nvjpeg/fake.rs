//! nvJPEG without a GPU: functions that count what lives and fail when they are told to.
//!
//! What they show: every object is destroyed once and before its library handle, also where a call
//! half-way fails; a failed call is an error with its name. What they cannot show: pixels.

use std::ffi::{c_int, c_uchar, c_uint};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvjpeg_sys::*;

use super::sys::Api;
use super::{Asker, Batch, Handle, Lane, Nvjpeg, NvjpegError, Status, Target, live_handles};
use crate::decode::{Components, Format, Probe};

/// Calls so far, the one that fails (none at 0), objects made from library handles that live, and
/// what the back ends say to an image.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static FAIL_AT: AtomicUsize = AtomicUsize::new(0);
static PARTS: AtomicUsize = AtomicUsize::new(0);
static REFUSED: AtomicUsize = AtomicUsize::new(0);

const SIZE: [c_uint; 2] = [64, 48];

/// The statics and the counters of handles belong to one test at a time.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for counter in [&CALLS, &FAIL_AT, &PARTS, &REFUSED] {
        counter.store(0, Ordering::SeqCst);
    }
    guard
}

fn step() -> nvjpegStatus_t {
    let call = CALLS.fetch_add(1, Ordering::SeqCst) + 1;
    if call == FAIL_AT.load(Ordering::SeqCst) { 5 } else { 0 }
}

fn make<T>(place: *mut *mut T, parts: usize) -> nvjpegStatus_t {
    let status = step();
    if status == 0 {
        PARTS.fetch_add(parts, Ordering::SeqCst);
        let object = Box::into_raw(Box::new(7_u64)).cast();
        // SAFETY: callers give a place for one address.
        unsafe { place.write(object) };
    }
    status
}

fn unmake<T>(object: *mut T, parts: usize) -> nvjpegStatus_t {
    PARTS.fetch_sub(parts, Ordering::SeqCst);
    // SAFETY: made by `make`, and by nothing else; a second time would be a double free.
    drop(unsafe { Box::from_raw(object.cast::<u64>()) });
    0
}

fn answer<T>(place: *mut T, value: T) -> nvjpegStatus_t {
    let status = step();
    // SAFETY: callers give a place for one value.
    unsafe { place.write(value) };
    status
}

extern "C" fn property(which: libraryPropertyType, value: *mut c_int) -> nvjpegStatus_t {
    answer(value, [13, 3, 2][which as usize])
}

extern "C" fn create(
    backend: nvjpegBackend_t,
    _: *mut nvjpegDevAllocator_t,
    _: *mut nvjpegPinnedAllocator_t,
    flags: c_uint,
    place: *mut nvjpegHandle_t,
) -> nvjpegStatus_t {
    let strict = if backend == nvjpegBackend_t_NVJPEG_BACKEND_HYBRID { 4 } else { 0 };
    assert_eq!(flags, 32 | strict, "interpolated chroma, strict reading of codes on the CPU");
    make(place, 0)
}

extern "C" fn destroy(handle: nvjpegHandle_t) -> nvjpegStatus_t {
    unmake(handle, 0)
}

extern "C" fn engines(
    _: nvjpegHandle_t,
    engines: *mut c_uint,
    cores: *mut c_uint,
) -> nvjpegStatus_t {
    answer(engines, 1);
    answer(cores, 8)
}

/// A function that makes a part of a handle, and the one that destroys it.
macro_rules! part {
    ($make:ident, $unmake:ident, $kind:ty $(, $argument:ty)*) => {
        extern "C" fn $make(_: nvjpegHandle_t, $(_: $argument,)* place: *mut $kind) -> nvjpegStatus_t {
            make(place, 1)
        }
        extern "C" fn $unmake(object: $kind) -> nvjpegStatus_t {
            unmake(object, 1)
        }
    };
}

part!(make_state, unmake_state, nvjpegJpegState_t);
part!(make_stream, unmake_stream, nvjpegJpegStream_t);
part!(make_params, unmake_params, nvjpegDecodeParams_t);
part!(make_decoder, unmake_decoder, nvjpegJpegDecoder_t, nvjpegBackend_t);
part!(make_pinned, unmake_pinned, nvjpegBufferPinned_t, *mut nvjpegPinnedAllocator_t);
part!(make_device, unmake_device, nvjpegBufferDevice_t, *mut nvjpegDevAllocator_t);

extern "C" fn make_decoder_state(
    _: nvjpegHandle_t,
    _: nvjpegJpegDecoder_t,
    place: *mut nvjpegJpegState_t,
) -> nvjpegStatus_t {
    make(place, 1)
}

extern "C" fn supported(
    _: nvjpegJpegDecoder_t,
    _: nvjpegJpegStream_t,
    _: nvjpegDecodeParams_t,
    refused: *mut c_int,
) -> nvjpegStatus_t {
    answer(refused, REFUSED.load(Ordering::SeqCst) as c_int)
}

extern "C" fn batch_supported(
    _: nvjpegHandle_t,
    _: nvjpegJpegStream_t,
    refused: *mut c_int,
) -> nvjpegStatus_t {
    answer(refused, REFUSED.load(Ordering::SeqCst) as c_int)
}

extern "C" fn dimensions(
    _: nvjpegJpegStream_t,
    width: *mut c_uint,
    height: *mut c_uint,
) -> nvjpegStatus_t {
    answer(width, SIZE[0]);
    answer(height, SIZE[1])
}

extern "C" fn decode_batched(
    _: nvjpegHandle_t,
    _: nvjpegJpegState_t,
    _: *const *const c_uchar,
    lengths: *const usize,
    images: *mut nvjpegImage_t,
    _: cudaStream_t,
) -> nvjpegStatus_t {
    // SAFETY: the tests decode two images.
    let lengths = unsafe { lengths.cast::<[usize; 2]>().read() };
    // SAFETY: as above.
    let [_, image] = unsafe { images.cast::<[nvjpegImage_t; 2]>().read() };
    assert_eq!((lengths, image.pitch[0], image.channel[0] as u64), ([3, 4], 192, 4096));
    step()
}

extern "C" fn decode_image(
    _: nvjpegHandle_t,
    _: nvjpegJpegDecoder_t,
    _: nvjpegJpegState_t,
    image: *mut nvjpegImage_t,
    _: cudaStream_t,
) -> nvjpegStatus_t {
    // SAFETY: callers give one image.
    let image = unsafe { image.read() };
    assert_eq!((image.channel[0] as u64, image.pitch[0]), (4096, 192));
    step()
}

/// Declares functions that do nothing but count.
macro_rules! nothing {
    ($($name:ident($($argument:ty),*);)*) => {
        $(extern "C" fn $name($(_: $argument),*) -> nvjpegStatus_t { step() })*
    };
}

nothing! {
    initialize(nvjpegHandle_t, nvjpegJpegState_t, c_int, c_int, nvjpegOutputFormat_t);
    parse(nvjpegHandle_t, *const c_uchar, usize, c_int, c_int, nvjpegJpegStream_t);
    pad(usize, nvjpegHandle_t);
    reserve(
        nvjpegHandle_t, nvjpegJpegState_t, c_int, c_int, c_int, nvjpegChromaSubsampling_t,
        nvjpegOutputFormat_t
    );
    set_format(nvjpegDecodeParams_t, nvjpegOutputFormat_t);
    set_roi(nvjpegDecodeParams_t, c_int, c_int, c_int, c_int);
    set_inks(nvjpegDecodeParams_t, c_int);
    set_orientation(nvjpegDecodeParams_t, nvjpegExifOrientation_t);
    attach_pinned(nvjpegJpegState_t, nvjpegBufferPinned_t);
    attach_device(nvjpegJpegState_t, nvjpegBufferDevice_t);
    host(
        nvjpegHandle_t, nvjpegJpegDecoder_t, nvjpegJpegState_t, nvjpegDecodeParams_t,
        nvjpegJpegStream_t
    );
    transfer(
        nvjpegHandle_t, nvjpegJpegDecoder_t, nvjpegJpegState_t, nvjpegJpegStream_t, cudaStream_t
    );
}

fn nvjpeg() -> Result<Arc<Nvjpeg>, NvjpegError> {
    let api = Api {
        nvjpegGetProperty: property,
        nvjpegCreateEx: create,
        nvjpegDestroy: destroy,
        nvjpegSetDeviceMemoryPadding: pad,
        nvjpegSetPinnedMemoryPadding: pad,
        nvjpegDecodeBatchedPreAllocate: reserve,
        nvjpegGetHardwareDecoderInfo: engines,
        nvjpegJpegStateCreate: make_state,
        nvjpegJpegStateDestroy: unmake_state,
        nvjpegDecodeBatchedInitialize: initialize,
        nvjpegDecodeBatched: decode_batched,
        nvjpegDecodeBatchedSupported: batch_supported,
        nvjpegJpegStreamCreate: make_stream,
        nvjpegJpegStreamDestroy: unmake_stream,
        nvjpegJpegStreamParse: parse,
        nvjpegJpegStreamGetFrameDimensions: dimensions,
        nvjpegDecodeParamsCreate: make_params,
        nvjpegDecodeParamsDestroy: unmake_params,
        nvjpegDecodeParamsSetOutputFormat: set_format,
        nvjpegDecodeParamsSetROI: set_roi,
        nvjpegDecodeParamsSetAllowCMYK: set_inks,
        nvjpegDecodeParamsSetExifOrientation: set_orientation,
        nvjpegDecoderCreate: make_decoder,
        nvjpegDecoderDestroy: unmake_decoder,
        nvjpegDecoderJpegSupported: supported,
        nvjpegDecoderStateCreate: make_decoder_state,
        nvjpegBufferPinnedCreate: make_pinned,
        nvjpegBufferPinnedDestroy: unmake_pinned,
        nvjpegBufferDeviceCreate: make_device,
        nvjpegBufferDeviceDestroy: unmake_device,
        nvjpegStateAttachPinnedBuffer: attach_pinned,
        nvjpegStateAttachDeviceBuffer: attach_device,
        nvjpegDecodeJpegHost: host,
        nvjpegDecodeJpegTransferToDevice: transfer,
        nvjpegDecodeJpegDevice: decode_image,
        _library: None,
    };
    Nvjpeg::checked(api, &PathBuf::from("fake"))
}

fn header([width, height]: [u32; 2]) -> Probe {
    Probe {
        format: Format::Jpeg,
        width,
        height,
        components: Components::Ycc,
        progressive: false,
        orientation: 1,
        adobe: false,
        sampling: 2,
        arithmetic: false,
        layout: crate::decode::probe::Layout { one_scan: true, ..Default::default() },
    }
}

const TARGET: Target = Target { address: 4096, pitch: 192 };

/// All that a worker and the submit thread do, once.
fn all(nvjpeg: &Arc<Nvjpeg>) -> Result<(), NvjpegError> {
    let (hybrid, hardware) = (Handle::hybrid(nvjpeg)?, Handle::hardware(nvjpeg)?);
    assert_eq!(hardware.engines()?, [1, 8]);
    let (mut lane, mut batch) = (Lane::new(&hybrid)?, Batch::new(&hardware)?);
    let mut asker = Asker::new(&hardware)?;
    batch.reserve(2)?;
    // The objects keep what they came from.
    drop((hybrid, hardware));
    let header = header(SIZE);
    // SAFETY: nothing is queued, and the target is never followed.
    unsafe { lane.decode(b"one", &header, TARGET, null_mut()) }?;
    assert!(asker.takes(b"two", &header)?);
    let images: [(&[u8], Target); 2] = [(b"one", TARGET), (b"four", TARGET)];
    // SAFETY: as above.
    unsafe { batch.decode(images.into_iter(), null_mut()) }
}

fn live() -> usize {
    live_handles().iter().map(|(_, count)| count).sum()
}

#[test]
fn every_object_is_destroyed_once_wherever_a_call_fails() {
    let _alone = alone();
    all(&nvjpeg().unwrap()).unwrap();
    let calls = CALLS.load(Ordering::SeqCst);
    assert_eq!((live(), PARTS.load(Ordering::SeqCst)), (0, 0));
    let mut failed = std::collections::BTreeSet::new();
    for fail_at in 1..=calls {
        let _ = CALLS.swap(0, Ordering::SeqCst);
        FAIL_AT.store(fail_at, Ordering::SeqCst);
        match nvjpeg().and_then(|nvjpeg| all(&nvjpeg)) {
            Ok(()) => {} // the first of two answers of one function
            Err(NvjpegError::Failed { call, status }) => {
                assert_eq!(status, Status(5));
                failed.insert(call);
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!((live(), PARTS.load(Ordering::SeqCst)), (0, 0), "call {fail_at} failed");
    }
    assert!(failed.len() >= 24, "{failed:?}");
}

#[test]
fn handles_balance_on_many_threads() {
    let _alone = alone();
    let nvjpeg = nvjpeg().unwrap();
    let hybrid = Handle::hybrid(&nvjpeg).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let mut lanes = [Lane::new(&hybrid).unwrap(), Lane::new(&hybrid).unwrap()];
                    for lane in &mut lanes {
                        // SAFETY: nothing is queued, and the target is never followed.
                        unsafe { lane.decode(b"x", &header(SIZE), TARGET, null_mut()) }.unwrap();
                    }
                    all(&nvjpeg).unwrap();
                }
            });
        }
    });
    assert_eq!((live(), live_handles()[0]), (1, ("library", 1)));
    drop(hybrid);
    assert_eq!((live(), PARTS.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn what_a_back_end_does_not_take_is_an_error_before_anything_is_queued() {
    let _alone = alone();
    let nvjpeg = nvjpeg().unwrap();
    let hybrid = Handle::hybrid(&nvjpeg).unwrap();
    let (mut lane, mut asker) = (Lane::new(&hybrid).unwrap(), Asker::new(&hybrid).unwrap());
    REFUSED.store(1, Ordering::SeqCst);
    // SAFETY: nothing is queued.
    let error = unsafe { lane.decode(b"x", &header(SIZE), TARGET, null_mut()) }.unwrap_err();
    assert!(matches!(error, NvjpegError::NotTaken), "{error}");
    assert!(!asker.takes(b"x", &header(SIZE)).unwrap());
    // SAFETY: as above.
    let error = unsafe { lane.decode(b"x", &header([64, 49]), TARGET, null_mut()) }.unwrap_err();
    assert!(matches!(error, NvjpegError::Size { found: SIZE, expected: [64, 49] }), "{error}");
    assert!(asker.takes(b"x", &header([65, 48])).is_err());
}
