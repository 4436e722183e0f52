//! Makes a mapped file that shrinks an error instead of a crash.
//!
//! Touching a page of a map beyond the end of its file, or one that the disk cannot deliver, raises
//! SIGBUS, whose default is the end of the process. The handler here puts a page of zeros in the
//! place of such a page and marks the map. The reader of the bytes asks for the mark afterwards
//! ([`Watch::hit`]) and discards the result. It never touches memory outside the maps
//! that are watched: any other SIGBUS goes to the handler that was there before, or has its
//! default.
//!
//! The handler takes no lock and allocates nothing: it walks a list that only grows, reads atomics
//! and makes one system call.

#![expect(unsafe_code, reason = "a signal handler that mends maps")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::limits::page_size;

/// An address range that the handler may mend. Never freed, used again by a later map.
#[derive(Debug, Default)]
struct Entry {
    /// Odd while `start` and `end` are being changed, else a new number for each change: a reader
    /// that sees two different numbers, or an odd one, has not seen a range.
    version: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    hit: AtomicBool,
    /// Set once, before the entry is published.
    next: AtomicPtr<Entry>,
}

impl Entry {
    /// Its range, unless it is being changed.
    fn range(&self) -> Option<Range<usize>> {
        let before = self.version.load(Ordering::Acquire);
        let range = self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2)).then_some(range)
    }

    /// Called under the lock of [`FREE`].
    fn set(&self, range: Range<usize>) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }
}

/// The newest entry. Entries are added in front and never taken out.
static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());

/// Entries that no map uses. Held by who adds or changes an entry, never by the handler.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

/// All entries, newest first.
fn entries() -> impl Iterator<Item = &'static Entry> {
    let mut at = ENTRIES.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: null, or a pointer that `Watch::new` made of a leaked box before it published it
        // with release ordering: it stays valid for ever and is only shared.
        let entry = unsafe { at.as_ref() }?;
        at = entry.next.load(Ordering::Relaxed);
        Some(entry)
    })
}

/// What the handler needs, known before it is installed.
struct Installed {
    page: usize,
    before: libc::sigaction,
}

static INSTALLED: OnceLock<Option<Installed>> = OnceLock::new();

/// Watches a map until it is dropped, which must be before the map is.
#[derive(Debug)]
pub(super) struct Watch(&'static Entry);

impl Watch {
    /// Watches a map's bytes. On a system that refuses a handler the map is as any other.
    pub(super) fn new(bytes: &[u8]) -> Watch {
        INSTALLED.get_or_init(install);
        let range = bytes.as_ptr_range();
        let range = range.start.addr()..range.end.addr();
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = free.pop() {
            entry.hit.store(false, Ordering::Relaxed);
            entry.set(range);
            return Watch(entry);
        }
        let entry: &'static Entry = Box::leak(Box::default());
        entry.set(range);
        entry.next.store(ENTRIES.load(Ordering::Relaxed), Ordering::Relaxed);
        ENTRIES.store(ptr::from_ref(entry).cast_mut(), Ordering::Release);
        Watch(entry)
    }

    /// Whether a page of the map was missing when it was touched, so that zeros were read.
    pub(super) fn hit(&self) -> bool {
        // The reading of the bytes comes before the reading of the mark. Another thread may have
        // met the page first: its handler set the mark before it put the zeros there.
        fence(Ordering::Acquire);
        self.0.hit.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.set(0..0);
        free.push(self.0);
    }
}

fn install() -> Option<Installed> {
    let page = page_size();
    let mut before = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null action asks for the present one, which is written to `before`.
    let asked = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr()) };
    if asked != 0 {
        return None;
    }
    // SAFETY: sigaction said that it wrote it.
    let before = unsafe { before.assume_init() };
    let mut action = before;
    action.sa_sigaction =
        handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    // On the alternative stack, as Rust's own handler of stack overflows needs it.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `sa_mask` is a valid set to be emptied.
    unsafe { libc::sigemptyset(&raw mut action.sa_mask) };
    // SAFETY: `handle` has the signature that SA_SIGINFO asks for and does only what a handler may:
    // atomics, `mmap`, `sigaction`, `raise`. A SIGBUS between here and the end of `get_or_init`
    // finds no watched map, since `Watch::new` adds its own after it.
    let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    (set == 0).then_some(Installed { page, before })
}

extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler set with SA_SIGINFO.
    let what = unsafe { &*info };
    if what.si_code == libc::BUS_ADRERR {
        // SAFETY: with this code of SIGBUS the address is the field that is set.
        let address = unsafe { what.si_addr() };
        if mend(address.addr()) {
            return;
        }
    }
    pass_on(signal, what.si_code, info, context);
}

/// Puts zeros under a watched address; false where there is nothing to mend.
fn mend(address: usize) -> bool {
    // `get` of a OnceLock is one atomic load.
    let Some(Some(Installed { page, .. })) = INSTALLED.get() else { return false };
    let found = |entry: &&Entry| entry.range().is_some_and(|range| range.contains(&address));
    let Some(entry) = entries().find(found) else { return false };
    // Marked before the zeros are there: whoever reads them finds the mark.
    entry.hit.store(true, Ordering::Release);
    let start = ptr::without_provenance_mut::<c_void>(address & !(page - 1));
    let (protection, flags) =
        (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    // SAFETY: the page lies in a live map: it was found in an entry, and the thread that faulted
    // borrows that map, so it is neither unmapped nor is its entry handed on before the thread goes
    // on. Maps start at a page, so the page is the map's alone. Read-only memory takes the place of
    // read-only memory, and the new bytes differ from the old ones only in that the old ones could
    // not be read at all.
    let mapped = unsafe { libc::mmap(start, *page, protection, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// Does what would have happened without this module.
fn pass_on(signal: c_int, code: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let Some(Some(Installed { before, .. })) = INSTALLED.get() else { return };
    let handler = before.sa_sigaction;
    // Sent by a program to a process that ignores it. (An access that fails cannot be ignored: the system ends
    // the process for it, whatever it was told.)
    if handler == libc::SIG_IGN && code <= 0 {
        return;
    }
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // Going back repeats the access, which now ends the process as it would have.
        // SAFETY: `before` is an action that sigaction gave.
        unsafe { libc::sigaction(signal, ptr::from_ref(before), ptr::null_mut()) };
        if code <= 0 {
            // Sent by a program: there is no access to repeat.
            // SAFETY: raise has no preconditions.
            unsafe { libc::raise(signal) };
        }
    } else if before.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: with SA_SIGINFO the field holds a function of this signature.
        let handler = unsafe {
            std::mem::transmute::<usize, extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)>(
                handler,
            )
        };
        handler(signal, info, context);
    } else {
        // SAFETY: without SA_SIGINFO, and being no constant, it holds a function of this signature.
        let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
        handler(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_used_again_and_torn_ones_are_no_range() {
        let bytes = [0u8; 8];
        let range = bytes.as_ptr_range();
        let first = Watch::new(&bytes);
        let entry = first.0;
        assert_eq!(entry.range(), Some(range.start.addr()..range.end.addr()));
        // That of an empty map is not free.
        let empty = Watch::new(&bytes[..0]);
        let other = Watch::new(&bytes);
        assert!(!ptr::eq(empty.0, other.0) && !ptr::eq(empty.0, entry));

        entry.version.fetch_add(1, Ordering::Relaxed);
        assert_eq!(entry.range(), None);
        entry.version.fetch_add(1, Ordering::Relaxed);
        drop(first);
        for _ in 0..1000 {
            drop(Watch::new(&bytes));
        }
        // Other tests of this program watch maps of their own at the same time.
        let count = entries().count();
        assert!(count < 100, "{count} entries for 1003 maps, most of them one after the other");
    }
}
