//! nvJPEG's functions, looked up in the library at run time.
//!
//! Types, constants and signatures are those of the crate `nvjpeg-sys`, which declares nvJPEG 11.9;
//! each signature below is checked against it when this is compiled. Nothing is linked: no function
//! of that crate is referred to in code that is generated.

use std::ffi::{c_int, c_uchar, c_uint};
use std::mem::ManuallyDrop;

use libloading::Library;
use nvjpeg_sys::{
    cudaStream_t, libraryPropertyType, nvjpegBackend_t, nvjpegBufferDevice_t, nvjpegBufferPinned_t,
    nvjpegChromaSubsampling_t, nvjpegDecodeParams_t, nvjpegDevAllocator_t, nvjpegExifOrientation_t,
    nvjpegHandle_t, nvjpegImage_t, nvjpegJpegDecoder_t, nvjpegJpegState_t, nvjpegJpegStream_t,
    nvjpegOutputFormat_t, nvjpegPinnedAllocator_t, nvjpegStatus_t,
};

/// Linear interpolation of chroma, as libjpeg has it, where nvJPEG otherwise repeats it. nvjpeg.h of
/// nvJPEG 12.1 and later: `NVJPEG_FLAGS_UPSAMPLING_WITH_INTERPOLATION 1<<5`.
pub(super) const UPSAMPLING_WITH_INTERPOLATION: c_uint = 1 << 5;

/// The first version that has [`UPSAMPLING_WITH_INTERPOLATION`].
pub(super) const VERSION_MIN: [c_int; 2] = [12, 1];

macro_rules! api {
    ($($name:ident($($argument:ty),* $(,)?);)*) => {
        /// The functions by their names in nvjpeg.h.
        #[expect(non_snake_case, reason = "nvJPEG's own names")]
        #[derive(Debug)]
        pub(super) struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> nvjpegStatus_t,)*
            /// Never unloaded: the CUDA runtime in it has thread-exit and process-exit handlers. `None` in tests,
            /// which have functions of their own.
            pub(super) _library: Option<ManuallyDrop<Library>>,
        }

        $(const _: unsafe extern "C" fn($($argument),*) -> nvjpegStatus_t = nvjpeg_sys::$name;)*

        impl Api {
            /// Looks all functions up; the error is the name of the first that is not there.
            pub(super) fn load(library: Library) -> Result<Api, &'static str> {
                Ok(Api {
                    $($name: {
                        let symbol = stringify!($name);
                        // SAFETY: nvjpeg.h of every version declares the function so; the constant
                        // above holds the signature against it. `library` is kept beside it.
                        let found = unsafe { library.get(symbol) };
                        *found.map_err(|_| symbol)?
                    },)*
                    _library: Some(ManuallyDrop::new(library)),
                })
            }
        }
    };
}

api! {
    nvjpegGetProperty(libraryPropertyType, *mut c_int);
    nvjpegCreateEx(
        nvjpegBackend_t,
        *mut nvjpegDevAllocator_t,
        *mut nvjpegPinnedAllocator_t,
        c_uint,
        *mut nvjpegHandle_t,
    );
    nvjpegDestroy(nvjpegHandle_t);
    nvjpegSetDeviceMemoryPadding(usize, nvjpegHandle_t);
    nvjpegSetPinnedMemoryPadding(usize, nvjpegHandle_t);
    nvjpegGetHardwareDecoderInfo(nvjpegHandle_t, *mut c_uint, *mut c_uint);
    nvjpegJpegStateCreate(nvjpegHandle_t, *mut nvjpegJpegState_t);
    nvjpegJpegStateDestroy(nvjpegJpegState_t);
    nvjpegDecodeBatchedInitialize(
        nvjpegHandle_t,
        nvjpegJpegState_t,
        c_int,
        c_int,
        nvjpegOutputFormat_t,
    );
    nvjpegDecodeBatched(
        nvjpegHandle_t,
        nvjpegJpegState_t,
        *const *const c_uchar,
        *const usize,
        *mut nvjpegImage_t,
        cudaStream_t,
    );
    nvjpegDecodeBatchedPreAllocate(
        nvjpegHandle_t,
        nvjpegJpegState_t,
        c_int,
        c_int,
        c_int,
        nvjpegChromaSubsampling_t,
        nvjpegOutputFormat_t,
    );
    nvjpegDecodeBatchedSupported(nvjpegHandle_t, nvjpegJpegStream_t, *mut c_int);
    nvjpegJpegStreamCreate(nvjpegHandle_t, *mut nvjpegJpegStream_t);
    nvjpegJpegStreamDestroy(nvjpegJpegStream_t);
    nvjpegJpegStreamParse(
        nvjpegHandle_t,
        *const c_uchar,
        usize,
        c_int,
        c_int,
        nvjpegJpegStream_t,
    );
    nvjpegJpegStreamGetFrameDimensions(nvjpegJpegStream_t, *mut c_uint, *mut c_uint);
    nvjpegDecodeParamsCreate(nvjpegHandle_t, *mut nvjpegDecodeParams_t);
    nvjpegDecodeParamsDestroy(nvjpegDecodeParams_t);
    nvjpegDecodeParamsSetOutputFormat(nvjpegDecodeParams_t, nvjpegOutputFormat_t);
    nvjpegDecodeParamsSetROI(nvjpegDecodeParams_t, c_int, c_int, c_int, c_int);
    nvjpegDecodeParamsSetAllowCMYK(nvjpegDecodeParams_t, c_int);
    nvjpegDecodeParamsSetExifOrientation(nvjpegDecodeParams_t, nvjpegExifOrientation_t);
    nvjpegDecoderCreate(nvjpegHandle_t, nvjpegBackend_t, *mut nvjpegJpegDecoder_t);
    nvjpegDecoderDestroy(nvjpegJpegDecoder_t);
    nvjpegDecoderJpegSupported(
        nvjpegJpegDecoder_t,
        nvjpegJpegStream_t,
        nvjpegDecodeParams_t,
        *mut c_int,
    );
    nvjpegDecoderStateCreate(nvjpegHandle_t, nvjpegJpegDecoder_t, *mut nvjpegJpegState_t);
    nvjpegBufferPinnedCreate(
        nvjpegHandle_t,
        *mut nvjpegPinnedAllocator_t,
        *mut nvjpegBufferPinned_t,
    );
    nvjpegBufferPinnedDestroy(nvjpegBufferPinned_t);
    nvjpegBufferDeviceCreate(
        nvjpegHandle_t,
        *mut nvjpegDevAllocator_t,
        *mut nvjpegBufferDevice_t,
    );
    nvjpegBufferDeviceDestroy(nvjpegBufferDevice_t);
    nvjpegStateAttachPinnedBuffer(nvjpegJpegState_t, nvjpegBufferPinned_t);
    nvjpegStateAttachDeviceBuffer(nvjpegJpegState_t, nvjpegBufferDevice_t);
    nvjpegDecodeJpegHost(
        nvjpegHandle_t,
        nvjpegJpegDecoder_t,
        nvjpegJpegState_t,
        nvjpegDecodeParams_t,
        nvjpegJpegStream_t,
    );
    nvjpegDecodeJpegTransferToDevice(
        nvjpegHandle_t,
        nvjpegJpegDecoder_t,
        nvjpegJpegState_t,
        nvjpegJpegStream_t,
        cudaStream_t,
    );
    nvjpegDecodeJpegDevice(
        nvjpegHandle_t,
        nvjpegJpegDecoder_t,
        nvjpegJpegState_t,
        *mut nvjpegImage_t,
        cudaStream_t,
    );
}
