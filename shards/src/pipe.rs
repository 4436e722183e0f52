//! A pool of named worker threads that ends by disconnection: its channels close, its threads
//! return, the pool joins them. The only place that starts long-lived threads.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use crossbeam::channel::bounded;

/// Runs `body` on so many threads at once, and returns when all have returned. Where the system refuses
/// one, `stop` is set, which `body` is to look at between two pieces of its work.
///
/// # Errors
///
/// The system's, out of threads or memory. Those that were started have returned by then.
pub fn side_by_side(
    threads: usize,
    stop: &AtomicBool,
    body: impl Fn() + Sync,
) -> Result<(), io::Error> {
    std::thread::scope(|scope| {
        for _ in 0..threads {
            if let Err(error) = Builder::new().spawn_scoped(scope, &body) {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    })
}

/// Runs `body` on this thread and on as many others as the system allows, at most `threads` in all, and
/// returns when all have returned. For work that merely takes longer with fewer threads.
pub fn with_help(threads: usize, body: &(impl Fn() + Sync)) {
    std::thread::scope(|scope| {
        for _ in 1..threads {
            if Builder::new().spawn_scoped(scope, body).is_err() {
                break;
            }
        }
        body();
    });
}

/// Threads of one kind, joined when dropped. The owner of a pool drops the channels that feed it first; a pool
/// never stops a thread by force.
#[derive(Debug, Default)]
pub struct Pool {
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// An empty pool.
    pub fn new() -> Pool {
        Pool::default()
    }

    /// Starts a thread; the error is the system's (out of threads or memory).
    pub fn start(
        &mut self,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), io::Error> {
        self.threads.push(Builder::new().name(name).spawn(body)?);
        Ok(())
    }

    /// Waits for all threads to return.
    pub fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic was already reported by the hook, and its effect by a closed channel.
            let _ = thread.join();
        }
    }
}

/// Checks that the system starts so many threads at once, which wait for each other and end.
///
/// # Errors
/// What the system said of the first that it did not start.
pub fn can_start(threads: usize) -> io::Result<()> {
    let (hold, held) = bounded::<()>(0);
    let mut pool = Pool::new();
    let started = (0..threads).try_for_each(|number| {
        let held = held.clone();
        pool.start(format!("detco-try-{number}"), move || {
            let _closed = held.recv();
        })
    });
    drop(hold); // before the pool, which waits for them
    started
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_are_tried_all_end() {
        let count = || std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        can_start(8).unwrap();
        // Other tests of this program start and end threads of their own.
        assert!(count() < 64, "{}", count());
        assert!(can_start(0).is_ok());
    }
}
