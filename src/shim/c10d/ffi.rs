//! The functions of `c10d.cpp`, as C sees them.

use std::ffi::{c_char, c_void};

use tch::Tensor;

/// What a handle points to, known to C++ alone.
pub(super) type Opaque = c_void;
/// `at::Tensor*`, as `tch` holds it.
pub(super) type TensorPtr = *const c_void;

pub(super) fn tensor(tensor: &Tensor) -> TensorPtr {
    tensor.as_ptr() as TensorPtr
}

unsafe extern "C" {
    pub(super) fn detco_c10d_live(four: *mut i64);
    pub(super) fn detco_store_open(
        host: *const c_char,
        host_len: i64,
        port: u16,
        serve: i32,
        timeout_ms: i64,
        prefix: *const c_char,
        prefix_len: i64,
        handle: *mut *mut Opaque,
        found_port: *mut u16,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_store_clone(
        store: *mut Opaque,
        handle: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_store_close(store: *mut Opaque);
    pub(super) fn detco_store_set(
        store: *mut Opaque,
        key: *const c_char,
        key_len: i64,
        value: *const u8,
        value_len: i64,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_store_check(
        store: *mut Opaque,
        key: *const c_char,
        key_len: i64,
        found: *mut i32,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_store_get(
        store: *mut Opaque,
        key: *const c_char,
        key_len: i64,
        buffer: *mut u8,
        buffer_len: i64,
        found_len: *mut i64,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_store_add(
        store: *mut Opaque,
        key: *const c_char,
        key_len: i64,
        amount: i64,
        sum: *mut i64,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_gloo(
        store: *mut Opaque,
        host: *const c_char,
        host_len: i64,
        rank: i32,
        size: i32,
        timeout_ms: i64,
        handle: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_nccl(
        store: *mut Opaque,
        image: *const u8,
        image_len: i64,
        device: i32,
        rank: i32,
        size: i32,
        timeout_ms: i64,
        handle: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_shut_down(
        group: *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_close(group: *mut Opaque);
    pub(super) fn detco_group_sum(
        group: *mut Opaque,
        tensor: TensorPtr,
        work: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_gather(
        group: *mut Opaque,
        mine: TensorPtr,
        all: TensorPtr,
        work: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_exchange(
        group: *mut Opaque,
        mine: TensorPtr,
        send: *const i64,
        into: TensorPtr,
        receive: *const i64,
        work: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_broadcast(
        group: *mut Opaque,
        tensor: TensorPtr,
        root: i32,
        work: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_group_barrier(
        group: *mut Opaque,
        timeout_ms: i64,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_work_wait(work: *mut Opaque, message: *mut c_char, message_len: i64)
    -> i32;
    pub(super) fn detco_work_close(work: *mut Opaque);
    pub(super) fn detco_graph_reaches(
        loss: TensorPtr,
        parameters: *const TensorPtr,
        count: i64,
        reached: *mut u8,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_reducer_open(
        group: *mut Opaque,
        parameters: *const TensorPtr,
        count: i64,
        bucket_bytes: i64,
        bf16: i32,
        handle: *mut *mut Opaque,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_reducer_backward(
        reducer: *mut Opaque,
        loss: TensorPtr,
        message: *mut c_char,
        message_len: i64,
    ) -> i32;
    pub(super) fn detco_reducer_close(reducer: *mut Opaque);
    pub(super) fn detco_exit(code: i32) -> !;
}
