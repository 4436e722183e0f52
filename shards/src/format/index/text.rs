//! The text of an index, read and written.

use std::fmt::Write as _;
use std::path::Path;

use super::super::tar::{self, BLOCK, Kind, Walker};
use super::super::{ShardError, StaleFault};
use super::builder::Builder;
use super::{Ends, IndexFault, Span, Table, VERSION, split_name};

impl Table {
    /// Reads the text of an index whose shard of `bytes` bytes is not at hand yet: what
    /// [`Table::read`] checks, but for what only the shard tells, which is left to [`Ends::check`].
    ///
    /// # Errors
    ///
    /// As [`Table::read`].
    pub fn parse(
        text: &[u8],
        index: &Path,
        shard: &Path,
        bytes: u64,
    ) -> Result<(Table, Ends), ShardError> {
        let wrong = |line: u64, fault: IndexFault| ShardError::Index {
            index: index.to_path_buf(),
            line,
            fault,
        };
        let disagree = |fault: StaleFault| ShardError::Disagree {
            index: index.to_path_buf(),
            shard: shard.to_path_buf(),
            fault,
        };
        let text = std::str::from_utf8(text).map_err(|error| {
            let before = &text[..error.valid_up_to()];
            let line = before.iter().filter(|byte| **byte == b'\n').count();
            wrong(line as u64 + 1, IndexFault::Text)
        })?;
        let mut lines = text.split_terminator('\n');
        let first = lines.next().unwrap_or("");
        let version = || IndexFault::Version { found: first.chars().take(40).collect() };
        let promised = first
            .strip_prefix(VERSION)
            .and_then(|rest| rest.strip_prefix(' '))
            .and_then(|count| tar::decimal(count.as_bytes()))
            .ok_or_else(|| wrong(1, version()))?;

        let mut builder = Builder::default();
        // A line has at least 20 bytes, so a lie in the first line reserves no more than the text.
        let lines_max = (text.len() / 20).min(usize::try_from(promised).unwrap_or(usize::MAX));
        builder.table.rows.reserve_exact(lines_max);
        let mut found = 0;
        for (number, line) in (2..).zip(lines) {
            found += 1;
            let mut rest = Some(line);
            let mut member = 0;
            while let Some(text) = rest {
                member += 1;
                let Some((Span { offset, size }, name, after)) = first_member(text) else {
                    return Err(wrong(number, IndexFault::Member { member }));
                };
                rest = after;
                if offset % BLOCK != 0 || offset == 0 {
                    return Err(wrong(number, IndexFault::Offset { offset }));
                }
                let end = offset.saturating_add(size);
                if end > bytes {
                    let fault = StaleFault::Outside { line: number, offset, end, bytes };
                    return Err(disagree(fault));
                }
                if member > 1 && builder.starts_another(name) {
                    let key = builder.open_key().to_owned();
                    let name = name.to_owned();
                    return Err(wrong(number, IndexFault::Stranger { name, key }));
                }
                builder.push(name.as_bytes(), Span { offset, size }, None).map_err(|at| {
                    wrong(number, IndexFault::Sample { key: at.key, fault: at.fault })
                })?;
            }
            builder
                .close()
                .map_err(|at| wrong(number, IndexFault::Sample { key: at.key, fault: at.fault }))?;
        }
        if found != promised {
            return Err(wrong(1, IndexFault::Count { promised, found }));
        }
        let ends = Ends { first: builder.first, end: builder.end };
        let mut table = builder.table;
        table.keys.shrink_to_fit();
        table.others.shrink_to_fit();
        Ok((table, ends))
    }
}

/// The first member of a line of an index: its bytes, its name, and the rest of the line. The name ends
/// where its extension does, so that it may hold blanks.
fn first_member(line: &str) -> Option<(Span, &str, Option<&str>)> {
    let (extension, rest) = line.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (size, rest) = rest.split_once(' ')?;
    let span =
        Span { offset: tar::decimal(offset.as_bytes())?, size: tar::decimal(size.as_bytes())? };
    let ends = rest.match_indices(' ').map(|(at, _)| at).chain([rest.len()]);
    for end in ends {
        let name = &rest[..end];
        if name.strip_suffix(extension).is_some_and(|front| front.ends_with('.')) {
            return Some((span, name, rest.get(end + 1..)));
        }
    }
    None
}

/// Where the members of a shard end, padding included, by the text of its index, up to what is none.
pub(crate) fn ends(text: &[u8]) -> Vec<u64> {
    let end = |words: &[&str]| {
        let number = |at: usize| words.get(at).and_then(|word| tar::decimal(word.as_bytes()));
        number(1)?.checked_add(number(2)?)?.checked_next_multiple_of(BLOCK)
    };
    let mut ends = Vec::new();
    for line in std::str::from_utf8(text).unwrap_or_default().lines().skip(1) {
        let words: Vec<&str> = line.split(' ').collect();
        ends.extend(words.chunks(4).map_while(end));
    }
    ends
}

/// Writes the text of an index, member by member.
#[derive(Debug, Clone, Default)]
pub struct IndexText {
    samples: u64,
    lines: String,
    key: String,
}

impl IndexText {
    /// Adds a member; members of a sample are neighbours. Names that belong to no sample are left
    /// out.
    pub fn push(&mut self, name: &str, span: Span) {
        let Some((key, extension)) = split_name(name) else { return };
        if self.samples == 0 || key != self.key {
            if self.samples > 0 {
                self.lines.push('\n');
            }
            self.samples += 1;
            key.clone_into(&mut self.key);
        } else {
            self.lines.push(' ');
        }
        // Writing into a String cannot fail.
        let _ = write!(self.lines, "{extension} {} {} {name}", span.offset, span.size);
    }

    /// Samples so far.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The whole text.
    pub fn finish(self) -> String {
        let end = if self.samples > 0 { "\n" } else { "" };
        format!("{VERSION} {}\n{}{end}", self.samples, self.lines)
    }

    /// The text for a shard, found by walking it.
    ///
    /// # Errors
    ///
    /// The bytes are no tar.
    pub fn of(bytes: &[u8]) -> Result<IndexText, tar::TarError> {
        let mut text = IndexText::default();
        for member in Walker::new(bytes) {
            let member = member?;
            if member.kind == Kind::File
                && let Ok(name) = std::str::from_utf8(&member.name)
            {
                text.push(name, Span { offset: member.data, size: member.payload.len() as u64 });
            }
        }
        Ok(text)
    }
}
