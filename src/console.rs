//! Lines for whoever watches. A terminal that was closed, a `tee` that ended or a log file on a full disk
//! ends no run: what cannot be written is not.

use std::fmt;
use std::io::Write;

/// Writes a line to standard error.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// [`note`] with `format!`'s arguments.
macro_rules! note {
    ($($arguments:tt)*) => { $crate::console::note(format_args!($($arguments)*)) };
}

/// `1 sample`, `1,200 samples`.
pub(crate) fn plural(number: u64, noun: &str) -> String {
    let count = indicatif::HumanCount(number);
    if number == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}
