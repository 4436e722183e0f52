//! The builder of a table: takes members in order and groups them into samples.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use super::super::tar::BLOCK;
use super::super::{SampleFault, ShardError, name};
use super::table::{Bad, Other, Row, Table};
use super::{Span, split_name};

/// A fault of a sample while a table is built.
pub(super) struct Fault {
    pub(super) key: String,
    pub(super) offset: u64,
    pub(super) fault: SampleFault,
}

impl Fault {
    pub(super) fn of(self, shard: &Path) -> ShardError {
        let Fault { key, offset, fault } = self;
        ShardError::Sample { shard: shard.to_path_buf(), key, offset, fault }
    }
}

/// Builds a [`Table`] from members in order.
#[derive(Default)]
pub(super) struct Builder {
    pub(super) table: Table,
    /// Where the open sample's key starts in `table.keys`; the open sample is not a row yet.
    key_start: usize,
    open: Option<Open>,
    /// The open sample's extensions, lower case, each followed by a newline.
    extensions: String,
    /// The table's extensions and their positions.
    interned: HashMap<String, u32>,
    /// End of the last member, padding included.
    pub(super) end: u64,
    /// The first member of all.
    pub(super) first: Span,
}

/// Members of the sample being built.
struct Open {
    offset: u64,
    members: u64,
    /// Its place among [`IMAGES`], bytes.
    image: Option<(usize, Span)>,
    class: Option<Span>,
    /// The first fault that makes it unusable.
    fault: Option<SampleFault>,
    /// Pictures under longer extensions, such as `left.jpg`: how many, and the first.
    long: u64,
    first_long: Option<(String, Span)>,
    /// The extension of a picture in a format that is not read.
    other: Option<String>,
}

/// Members of a sample: each is compared with those before it.
const MEMBERS_MAX: u64 = 4096;

/// Extensions that hold the image, the preferred first.
const IMAGES: [&str; 3] = ["jpg", "jpeg", "png"];

impl Open {
    /// Takes note of a member by its extension, in lower case.
    fn take(&mut self, extension: &str, span: Span) {
        let last = extension.rsplit('.').next().unwrap_or(extension);
        if let Some(rank) = IMAGES.iter().position(|image| *image == extension) {
            if self.image.is_none_or(|(other, _)| rank < other) {
                self.image = Some((rank, span));
            }
        } else if extension == "cls" {
            self.class = Some(span);
        } else if IMAGES.contains(&last) {
            self.long += 1;
            self.first_long.get_or_insert_with(|| (extension.to_owned(), span));
        } else if name::is_picture_extension(last.as_bytes()) {
            self.other.get_or_insert_with(|| extension.to_owned());
        }
    }

    /// The picture: extension and bytes.
    fn picture(&self, key: &str) -> Result<(&str, Span), SampleFault> {
        match (&self.fault, &self.image, &self.first_long) {
            (Some(fault), ..) => Err(fault.clone()),
            (None, Some((rank, span)), _) => Ok((IMAGES[*rank], *span)),
            (None, None, Some((extension, span))) if self.long == 1 => Ok((extension, *span)),
            (None, None, Some((extension, _))) => Err(SampleFault::Dots {
                key: key.to_owned(),
                extension: extension.clone(),
                pictures: self.long,
            }),
            (None, None, None) => Err(self.other.as_ref().map_or(SampleFault::NoImage, |other| {
                SampleFault::OtherFormat { extension: other.clone() }
            })),
        }
    }

    /// A picture beside the one that is read.
    fn beside<'a>(&'a self, taken: &str, extensions: &'a str) -> Option<&'a str> {
        extensions.split_terminator('\n').find(|other| {
            let last = other.rsplit('.').next().unwrap_or(other);
            *other != taken && IMAGES.contains(&last)
        })
    }
}

impl Builder {
    pub(super) fn open_key(&self) -> &str {
        &self.table.keys[self.key_start..]
    }

    pub(super) fn starts_another(&self, name: &str) -> bool {
        self.open.is_some() && split_name(name).is_some_and(|(key, _)| key != self.open_key())
    }

    /// Adds a member, which is a link to elsewhere where `link` says so.
    pub(super) fn push(
        &mut self,
        name: &[u8],
        span: Span,
        link: Option<&[u8]>,
    ) -> Result<(), Fault> {
        let text = String::from_utf8_lossy(name);
        let Some((key, extension)) = split_name(&text) else { return Ok(()) };
        if self.open.is_none() || key != self.open_key() {
            self.close()?;
            self.key_start = self.table.keys.len();
            self.table.keys.push_str(key);
            self.extensions.clear();
            self.open = Some(Open {
                offset: span.offset,
                members: 0,
                image: None,
                class: None,
                fault: None,
                long: 0,
                first_long: None,
                other: None,
            });
        }
        // The header in front of the payload needs a block too.
        if span.offset < self.end + BLOCK {
            let fault = SampleFault::Overlap { end: self.end };
            return Err(Fault { key: key.to_owned(), offset: span.offset, fault });
        }
        if self.first.offset == 0 {
            self.first = span;
        }
        // Cannot wrap: the caller has seen the span inside the shard.
        self.end = (span.offset + span.size).next_multiple_of(BLOCK);
        let Some(open) = &mut self.open else { return Ok(()) };
        open.members += 1;
        if open.members > MEMBERS_MAX {
            let (what, value) = ("the number of its members", open.members);
            let limit = MEMBERS_MAX;
            open.fault.get_or_insert(SampleFault::TooLarge { what, value, limit });
            return Ok(());
        }
        if matches!(text, Cow::Owned(_)) {
            open.fault.get_or_insert(SampleFault::Name);
        }
        let seen = self.extensions.len();
        self.extensions.push_str(extension);
        self.extensions[seen..].make_ascii_lowercase();
        let (before, extension) = self.extensions.split_at(seen);
        if before.split_terminator('\n').any(|other| other == extension) {
            let extension = extension.to_owned();
            open.fault.get_or_insert(SampleFault::DuplicateMember { extension });
        }
        match link {
            None => {
                let before = open.image;
                open.take(extension, span);
                let other = match IMAGES.iter().position(|image| *image == extension) {
                    Some(rank) if open.image == Some((rank, span)) => {
                        before.map(|(rank, span)| (IMAGES[rank], span))
                    }
                    None if extension == "cls" => None,
                    _ => Some((extension, span)),
                };
                if let Some((extension, span)) = other {
                    let sample = self.table.rows.len() as u32; // `close` sees to it that it fits
                    let known = self.interned.get(extension).copied();
                    let extension = known.unwrap_or_else(|| {
                        let number = self.table.extensions.len() as u32;
                        self.table.extensions.push(extension.to_owned());
                        self.interned.insert(extension.to_owned(), number);
                        number
                    });
                    self.table.others.push(Other { sample, extension, span });
                }
            }
            Some(target) => {
                let last = extension.rsplit('.').next().unwrap_or(extension);
                if last == "cls" || IMAGES.contains(&last) {
                    let target = String::from_utf8_lossy(target).into_owned();
                    let name = text.to_string();
                    open.fault.get_or_insert(SampleFault::Link { name, target });
                }
            }
        }
        self.extensions.push('\n');
        Ok(())
    }

    pub(super) fn close(&mut self) -> Result<(), Fault> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let key = &self.table.keys[self.key_start..];
        let limit = u64::from(u32::MAX);
        let too_large = |what, value: u64| SampleFault::TooLarge { what, value, limit };
        let small = |what, value: u64| u32::try_from(value).map_err(|_| too_large(what, value));
        let row = |image: Span, class: Span, key_end| {
            Ok::<Row, SampleFault>(Row {
                image_block: small("the image's block", image.offset / BLOCK)?,
                image_size: small("the image's size", image.size)?,
                class_block: small("the class's block", class.offset / BLOCK)?,
                class_size: small("the class's size", class.size)?,
                key_end,
            })
        };
        let key_end = small("the length of all keys", self.table.keys.len() as u64)
            .map_err(|fault| Fault { key: key.to_owned(), offset: open.offset, fault })?;
        let class = open.class.unwrap_or_default();
        let picture = open.picture(key);
        let made =
            picture.and_then(|(extension, image)| Ok((extension, row(image, class, key_end)?)));
        let made = match made {
            Ok((extension, row)) => {
                if let Some(other) = open.beside(extension, &self.extensions) {
                    let first = || (key.to_owned(), extension.to_owned(), other.to_owned());
                    self.table.first_several.get_or_insert_with(first);
                    self.table.several += 1;
                }
                row
            }
            Err(fault) => {
                let (position, offset) = (self.table.rows.len(), open.offset);
                self.table.bad.push(Bad { position, offset, fault });
                Row { image_block: 0, image_size: 0, class_block: 0, class_size: 0, key_end }
            }
        };
        self.table.rows.push(made);
        Ok(())
    }
}
