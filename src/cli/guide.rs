//! `detco guide`: the guides, in a terminal.

use std::io::Write as _;

use clap::builder::PossibleValuesParser;

use crate::guide::{GUIDES, Guide};

/// Show a guide, or list them
///
/// The text is Markdown. The same guides are part of the documentation (`cargo doc`, module `guide`).
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco guide
  detco guide training | less")]
pub struct Args {
    /// Which guide; without it they are listed
    #[arg(value_parser = topics())]
    topic: Option<String>,
}

fn topics() -> PossibleValuesParser {
    GUIDES.iter().map(|guide| guide.topic).collect::<Vec<_>>().into()
}

/// Runs the command.
///
/// # Errors
///
/// Standard output cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let text = match args.topic.as_deref().and_then(Guide::of) {
        Some(guide) => guide.text(),
        None => list(),
    };
    Ok(crate::console::stdout().write_all(text.as_bytes())?)
}

/// A line for each guide.
fn list() -> String {
    GUIDES.iter().map(|guide| format!("{:<11} {}\n", guide.topic, guide.about)).collect()
}
