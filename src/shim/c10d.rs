//! Stores, process groups and the reducer of c10d, libtorch's distributed engine.
//!
//! Owning types over the handles of `c10d.cpp`; each closes its handle when it is dropped. A
//! collective that runs is a [`Work`], which borrows its tensors until it is waited for.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::time::Duration;

use tch::Tensor;

use super::{ShimError, call};

/// The library compiled from `nccl.cpp`; empty if the build had no headers of CUDA.
static NCCL: &[u8] = include_bytes!(env!("DETCO_NCCL"));

mod ffi {
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
        pub(super) fn detco_work_wait(
            work: *mut Opaque,
            message: *mut c_char,
            message_len: i64,
        ) -> i32;
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
}

/// Handles that exist: stores, groups, works, reducers. All are closed when all are zero.
pub fn live_handles() -> [i64; 4] {
    let mut four = [0; 4];
    // SAFETY: the function writes four numbers, and `four` has room for four.
    unsafe { ffi::detco_c10d_live(four.as_mut_ptr()) };
    four
}

/// Ends the process at once with `code`: no destructors, so that threads of a process group that
/// wait for a lost rank are not waited for.
pub fn exit(code: i32) -> ! {
    // SAFETY: the function takes any number and touches no memory of ours.
    unsafe { ffi::detco_exit(code) }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A handle that C++ has just made.
fn made(handle: *mut ffi::Opaque) -> NonNull<ffi::Opaque> {
    NonNull::new(handle).expect("a call that succeeded has made a handle")
}

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
    handle: NonNull<ffi::Opaque>,
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
    handle: NonNull<ffi::Opaque>,
    member: Member,
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

#[cfg(test)]
mod tests {
    use super::*;

    const FLOAT: (tch::Kind, tch::Device) = (tch::Kind::Float, tch::Device::Cpu);
    const SOON: Duration = Duration::from_secs(20);

    fn serve() -> Store {
        Store::open("127.0.0.1", 0, Role::Serve, "test", SOON).unwrap()
    }

    fn join(port: u16) -> Store {
        Store::open("127.0.0.1", port, Role::Join, "test", SOON).unwrap()
    }

    /// Runs `body` as each of `size` ranks, in threads with groups of their own.
    fn ranks(size: usize, body: impl Fn(&Group) + Sync) {
        let server = serve();
        let port = server.port();
        std::thread::scope(|scope| {
            for rank in 0..size {
                let body = &body;
                scope.spawn(move || {
                    let store = join(port);
                    let member = Member { rank, size };
                    body(&Group::gloo(&store, "127.0.0.1", member, SOON).unwrap());
                });
            }
        });
    }

    fn numbers(values: &[f32]) -> Tensor {
        Tensor::from_slice(values)
    }

    // One test, so that no other of this program holds handles meanwhile.
    #[test]
    fn collectives_do_what_they_say_and_every_handle_is_closed() {
        store_keeps_what_it_is_given();
        collectives();
        gradients_are_averaged();
        every_backward_pass_sums_in_the_same_order();
        a_barrier_names_who_is_missing();
        errors_are_words();
        assert_eq!(live_handles(), [0; 4], "stores, groups, works, reducers");
    }

    fn store_keeps_what_it_is_given() {
        let server = serve();
        let client = join(server.port());
        assert_eq!(client.get("a").unwrap(), None);
        let long: Vec<u8> = (0..100_000).map(|i| i as u8).collect();
        for value in [&b""[..], b"x", &long] {
            server.set("a", value).unwrap();
            assert_eq!(client.another().unwrap().get("a").unwrap().unwrap(), value);
        }
        assert_eq!(client.add("n", 2).unwrap(), 2);
        assert_eq!(server.add("n", 3).unwrap(), 5);
    }

    fn collectives() {
        ranks(3, |group| {
            let rank = group.member.rank as f32;
            let mut sum = numbers(&[rank, 1.0]);
            group.sum(&mut sum).unwrap().wait().unwrap();
            assert_eq!(sum, numbers(&[3.0, 3.0]));

            let (mine, mut all) = (numbers(&[rank, -rank]), numbers(&[9.0; 6]));
            group.gather(&mine, &mut all).unwrap().wait().unwrap();
            assert_eq!(all, numbers(&[0.0, 0.0, 1.0, -1.0, 2.0, -2.0]));

            // Rank r sends row r of its three to rank 0, then its others to rank 2.
            let mine = numbers(&[rank, 10.0 + rank, 20.0 + rank]);
            let receive = [[1; 3], [0; 3], [2; 3]][group.member.rank];
            let mut into = numbers(&vec![9.0; 3 * receive[0] as usize]);
            group.exchange(&mine, &[1, 0, 2], &mut into, &receive).unwrap().wait().unwrap();
            let expected: &[f32] = match group.member.rank {
                0 => &[0.0, 1.0, 2.0],
                1 => &[],
                _ => &[10.0, 20.0, 11.0, 21.0, 12.0, 22.0],
            };
            assert_eq!(into, numbers(expected));

            let mut from_2 = numbers(&[rank]);
            group.broadcast(&mut from_2, 2).unwrap().wait().unwrap();
            assert_eq!(from_2, numbers(&[2.0]));
            // Dropped, not waited for: the drop waits.
            drop(group.sum(&mut from_2).unwrap());
            assert_eq!(from_2, numbers(&[6.0]));
            group.barrier(SOON).unwrap();
        });
    }

    fn gradients_are_averaged() {
        for (wire, tolerance) in [(Wire::Whole, 1e-6), (Wire::Bf16, 4e-3)] {
            ranks(2, |group| {
                let one = || numbers(&[0.5; 600]).set_requires_grad(true);
                let parameters = [one(), one()];
                let reducer = Reducer::new(group, &parameters, 2400, wire).unwrap();
                for round in 1..4 {
                    let x = (3.0 * group.member.rank as f64 + 1.0) * f64::from(round); // 1, 4
                    let loss = (&parameters[0] * x + &parameters[1] * 0.1).sum(None);
                    // Of two micro-batches only the last is averaged, with what the first left.
                    (&loss * 0.5).backward();
                    let loss = (&parameters[0] * x + &parameters[1] * 0.1).sum(None);
                    reducer.backward(&(loss * 0.5)).unwrap();
                    for (parameter, mean) in parameters.iter().zip([2.5 * f64::from(round), 0.1]) {
                        let off = (parameter.grad() / mean - 1.0).abs().max();
                        assert!(off.double_value(&[]) <= tolerance, "{wire:?}: {off:?}");
                    }
                    parameters.iter().for_each(|p| p.shallow_clone().zero_grad());
                }
            });
        }
    }

    /// Of a new reducer the first pass has the bits of an old one's third. The gradients come in another order
    /// than the parameters stand in, and fill several buckets.
    fn every_backward_pass_sums_in_the_same_order() {
        for wire in [Wire::Whole, Wire::Bf16] {
            ranks(3, |group| {
                let leaf = |i: i64| (Tensor::arange(300, FLOAT) / (i + 7)).set_requires_grad(true);
                let parameters: Vec<Tensor> = (0..6).map(leaf).collect();
                let unused = leaf(9);
                let loss = || {
                    let x = (group.member.rank as f64 + 1.0) / 7.0;
                    let each = [3, 0, 5, 1, 4, 2].map(|i| (&parameters[i] * x).sin().sum(None));
                    each.iter().fold(Tensor::from(0.0_f32), |sum, one| (sum + one) * 1.1)
                };
                let all: Vec<Tensor> =
                    parameters.iter().chain([&unused]).map(Tensor::shallow_clone).collect();
                let found = taking_part(&loss(), &all).unwrap();
                assert_eq!(found, parameters, "in their order, without the one that is not used");
                let passes = |count: usize| -> Vec<Tensor> {
                    let reducer = Reducer::new(group, &found, 2400, wire).unwrap();
                    for _ in 0..count {
                        parameters.iter().for_each(|p| p.shallow_clone().zero_grad());
                        reducer.backward(&loss()).unwrap();
                    }
                    parameters.iter().map(|p| p.grad().copy()).collect()
                };
                let third = passes(3);
                assert_eq!(passes(1), third, "{wire:?}");
            });
        }
    }

    fn a_barrier_names_who_is_missing() {
        let together = std::sync::Barrier::new(2);
        ranks(2, |group| {
            if group.member.rank == 0 {
                let error = group.barrier(Duration::from_millis(200)).unwrap_err().to_string();
                assert!(error.contains("Ranks 1 failed to pass"), "{error}");
            }
            together.wait(); // only then may rank 1 leave
        });
    }

    fn errors_are_words() {
        let short = Duration::from_millis(300);
        let store = serve();
        let missing = Member { rank: 0, size: 2 };
        let error = Group::gloo(&store, "127.0.0.1", missing, short).unwrap_err().to_string();
        assert!(error.contains("timeout") && !error.contains("Exception"), "{error}");
        let port = store.port();
        drop(store);
        let error = Store::open("127.0.0.1", port, Role::Join, "", short).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()), "{error}");
        let found = crate::device::find(crate::config::Device::Auto).unwrap();
        if found.missing.is_some() {
            let store = serve();
            let error = Group::nccl(&store, 0, missing, short).unwrap_err().to_string();
            assert!(error.contains("no GPUs found") || error.contains("without NCCL"), "{error}");
        }
    }
}
