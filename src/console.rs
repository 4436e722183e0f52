//! Lines for whoever watches, and standard output for results.
//!
//! A terminal that was closed, a `tee` that ended or a log file on a full disk ends no run: what cannot be
//! written to standard error is not. A result that cannot be written to standard output is an error, but for
//! one: `detco inspect … | head` closes the pipe because it has read enough.

use std::fmt;
use std::io::{self, ErrorKind, StdoutLock, Write};

use thiserror::Error;

/// Writes a line to standard error.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// [`note`] with `format!`'s arguments.
macro_rules! note {
    ($($arguments:tt)*) => { $crate::console::note(format_args!($($arguments)*)) };
}

/// Standard output, for results. Where its reader has closed the pipe, the error is one that
/// [`is_closed_output`] knows: a pipe or a socket elsewhere that breaks is another matter.
#[expect(clippy::disallowed_methods, reason = "this is the place that writes to standard output")]
pub(crate) fn stdout() -> Output<StdoutLock<'static>> {
    Output(io::stdout().lock())
}

/// See [`stdout`].
#[derive(Debug)]
pub(crate) struct Output<W>(W);

#[derive(Debug, Error)]
#[error("standard output was closed by its reader")]
struct ClosedOutput;

/// Whether this is the error of [`stdout`]'s closed pipe.
pub(crate) fn is_closed_output(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<ClosedOutput>())
}

fn marked(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::BrokenPipe => io::Error::new(ErrorKind::BrokenPipe, ClosedOutput),
        _ => error,
    }
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(marked)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(marked)
    }
}

/// `1 sample`, `1,200 samples`.
pub(crate) fn plural(number: u64, noun: &str) -> String {
    let count = indicatif::HumanCount(number);
    if number == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_output_is_told_from_other_broken_pipes() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut output = Output(&writer);
        let error = output.write_all(b"a result\n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        assert!(is_closed_output(&error), "{error}");
        let elsewhere = (&writer).write_all(b"a metric\n").unwrap_err();
        assert_eq!(elsewhere.kind(), ErrorKind::BrokenPipe);
        assert!(!is_closed_output(&elsewhere), "{elsewhere}");
    }
}
