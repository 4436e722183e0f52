//! A pool of named worker threads that ends by disconnection: its channels close, its threads
//! return, the pool joins them. The only place that starts long-lived threads.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Threads of one kind, joined when dropped. Whoever owns a pool drops the channels that feed it
/// first; a pool never stops a thread by force.
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

impl Drop for Pool {
    fn drop(&mut self) {
        self.join();
    }
}
