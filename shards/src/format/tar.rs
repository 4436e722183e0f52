//! The tar reader: walks an archive without copying; names and payloads are slices of its bytes.
//!
//! Read: ustar and its prefix, pax `path`, `linkpath` and `size` (local and global headers, Solaris'
//! too), GNU long names, GNU volume labels, base-256 numbers, headers older than ustar. Refused, with
//! the offset: a wrong checksum, malformed pax records, sparse files (their bytes are not the
//! file's), anything on whose layout GNU tar and Python's `tarfile` disagree, a file that ends before
//! its two zero blocks, anything but zeros after them. No input makes it panic, and no input makes it
//! end quietly. What unpacking would make of links and repeated names, [`super::unpacked`] says.
//!
//! Formats: POSIX.1-2017 `pax`, "ustar Interchange Format" and "pax Extended Header"; GNU tar
//! manual, "Basic Tar Format".

mod header;
mod pax;

use std::borrow::Cow;

use thiserror::Error;

use self::header::{Header, other, until_nul};
pub(crate) use self::pax::decimal;
use self::pax::{Long, Pax};

/// Bytes of a block: headers are one, payloads are padded to a multiple of it.
pub const BLOCK: u64 = 512;
const BLOCK_LEN: usize = 512;

/// Largest payload that eleven octal digits express (8 GiB - 1 byte).
pub const SIZE_MAX: u64 = 0o77_777_777_777;

/// A fault of a tar and its offset.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("offset {offset}: {fault}")]
pub struct TarError {
    /// Byte offset of the header (or of the block) in question.
    pub offset: u64,
    /// What is wrong there.
    pub fault: TarFault,
}

/// A fault of a tar.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TarFault {
    /// Not a tar: a file that `zstd`, `gzip` or the like has written.
    #[error("{format}-compressed, a plain tar was expected: decompress it first")]
    Compressed {
        /// What compressed it.
        format: &'static str,
    },
    /// Not a tar but a file of another kind, by its first bytes.
    #[error("{what}")]
    Other {
        /// What it is, and what to do.
        what: &'static str,
    },
    /// The file ends inside a header, a payload or padding.
    #[error("truncated: {need} bytes are needed, {have} are there")]
    Truncated {
        /// Bytes needed from the offset on.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// The file ends between two members.
    #[error("truncated: the archive ends without its two zero blocks")]
    NoEnd,
    /// One zero block, then something else.
    #[error("a single zero block inside the archive")]
    LoneZeroBlock,
    /// Something follows the end.
    #[error("bytes other than zero after the end of the archive")]
    AfterEnd,
    /// The header's checksum is wrong.
    #[error("no tar header: its checksum is {stored}, its bytes give {computed}")]
    Checksum {
        /// Number in the checksum field.
        stored: u64,
        /// Sum of the bytes.
        computed: u64,
    },
    /// A number that is none, is negative or exceeds 64 bits.
    #[error("the field `{field}` holds no number")]
    Number {
        /// Name of the field.
        field: &'static str,
    },
    /// A payload that would end beyond 64 bits.
    #[error("the size {size} is impossible")]
    Size {
        /// The size.
        size: u64,
    },
    /// A pax record that breaks the rule `LENGTH KEY=VALUE\n`.
    #[error("malformed pax record {record} bytes into the extended header")]
    Pax {
        /// Offset of the record in the extended header.
        record: u64,
    },
    /// A pax value that its key does not allow.
    #[error("pax `{key}` has an impossible value")]
    PaxValue {
        /// The key.
        key: &'static str,
    },
    /// An extended header with nothing to extend.
    #[error("an extended header is followed by the end of the archive")]
    Dangling,
    /// Two extended headers that say the same thing for one member.
    #[error("two headers of type `{kind}` for one member")]
    Repeated {
        /// The type flag.
        kind: char,
    },
    /// A pax path and a GNU long name for one member.
    #[error("a pax path and a GNU long name for one member")]
    TwoNames,
    /// A member without a name.
    #[error("a member without a name")]
    NoName,
    /// A folder, link or device with a payload: readers disagree on where the next header is.
    #[error("type `{kind}` cannot have a payload, this one has {size} bytes")]
    Payload {
        /// The type flag.
        kind: char,
        /// The size in its header.
        size: u64,
    },
    /// A sparse file.
    #[error("a sparse file: its bytes are not those of the file")]
    Sparse,
}

/// The kind of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Directory,
    /// A file with holes, whose payload is not its bytes. Iterating over a [`Walker`] gives
    /// [`TarFault::Sparse`] instead.
    Sparse,
    /// Anything else, by its type flag: links, devices, vendor types.
    Other(u8),
}

impl Kind {
    /// A hard link, by its type flag.
    pub const HARD_LINK: Kind = Kind::Other(b'1');
    /// A symbolic link, by its type flag.
    pub const SYMLINK: Kind = Kind::Other(b'2');
}

/// A member of a tar.
#[derive(Debug, Clone)]
pub struct Member<'a> {
    /// Offset of its first header, extended headers included.
    pub start: u64,
    /// Offset of its payload.
    pub data: u64,
    /// Name, of any bytes; never empty.
    pub name: Cow<'a, [u8]>,
    /// What it is.
    pub kind: Kind,
    /// Where a hard or symbolic link points, as the archive says it; empty for anything else.
    pub link: Cow<'a, [u8]>,
    /// Its bytes: a slice of the archive.
    pub payload: &'a [u8],
}

impl Member<'_> {
    /// Offset of what follows it: the payload's end, padded to a block.
    pub fn end(&self) -> u64 {
        // Cannot wrap: the walker has seen the padding.
        (self.data + self.payload.len() as u64).next_multiple_of(BLOCK)
    }
}

/// Walks the members of a tar, in order. After an error it ends, unless the error is a sparse file:
/// where that ends is known.
#[derive(Debug, Clone)]
pub struct Walker<'a> {
    bytes: &'a [u8],
    offset: u64,
    global: Pax<'a>,
    ended: bool,
}

impl<'a> Walker<'a> {
    /// From the first byte on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Walker::at(bytes, 0)
    }

    /// From a header on, with offsets counted from the first byte. Global pax headers in front of
    /// it are not known.
    pub fn at(bytes: &'a [u8], offset: u64) -> Self {
        Walker { bytes, offset, global: Pax::default(), ended: false }
    }

    /// Where the next header is read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next member, a sparse file too; `None` at the end of the archive. Not to be called again
    /// after an error.
    pub(crate) fn step(&mut self) -> Result<Option<Member<'a>>, TarError> {
        let start = self.offset;
        let mut local: Option<Pax<'a>> = None;
        let mut long = Long::default();
        loop {
            let at = self.offset;
            let fail = |fault| TarError { offset: at, fault };
            let block = self.block(at).map_err(|error| self.unless_other(error))?;
            if block.iter().all(|byte| *byte == 0) {
                if at != start {
                    return Err(fail(TarFault::Dangling));
                }
                self.end(at)?;
                return Ok(None);
            }
            let header = Header::parse(block).map_err(|fault| self.unless_other(fail(fault)))?;
            // Cannot wrap: `block` lies in memory.
            let data = at + BLOCK;
            match header.flag {
                b'x' | b'X' => {
                    if local.is_some() {
                        return Err(fail(TarFault::Repeated { kind: 'x' }));
                    }
                    let mut pax = Pax::default();
                    pax.read(self.payload(at, data, header.size)?).map_err(fail)?;
                    local = Some(pax);
                }
                b'g' => {
                    let payload = self.payload(at, data, header.size)?;
                    self.global.read(payload).map_err(fail)?;
                }
                b'L' => {
                    if long.name.is_some() {
                        return Err(fail(TarFault::Repeated { kind: 'L' }));
                    }
                    let name = until_nul(self.payload(at, data, header.size)?);
                    if name.is_empty() {
                        return Err(fail(TarFault::NoName));
                    }
                    long.name = Some(name);
                }
                b'K' => {
                    if long.link.is_some() {
                        return Err(fail(TarFault::Repeated { kind: 'K' }));
                    }
                    long.link = Some(until_nul(self.payload(at, data, header.size)?));
                }
                _ => {
                    let local = local.unwrap_or_default();
                    return self.member(start, at, &header, &local, long).map(Some);
                }
            }
        }
    }

    fn member(
        &mut self,
        start: u64,
        at: u64,
        header: &Header<'a>,
        local: &Pax<'a>,
        long: Long<'a>,
    ) -> Result<Member<'a>, TarError> {
        let fail = |fault| TarError { offset: at, fault };
        // An empty value takes a global one back (POSIX: "deleted").
        let chosen = |local: Option<Option<_>>, global: Option<Option<_>>| local.or(global)?;
        let pax_path = chosen(local.path, self.global.path);
        let pax_size = match local.size {
            Some(size) => size,
            None => self.global.size.flatten(),
        };
        let sparse = header.flag == b'S' || local.sparse || self.global.sparse;
        let name = match (local.sparse_name.or(pax_path), long.name) {
            (Some(_), Some(_)) => return Err(fail(TarFault::TwoNames)),
            (Some(name), None) | (None, Some(name)) => Cow::Borrowed(name),
            (None, None) => header.name(),
        };
        if name.is_empty() {
            return Err(fail(TarFault::NoName));
        }
        let size = pax_size.unwrap_or(header.size);
        let (kind, size) = match header.flag {
            // Before ustar a folder was a file whose name ends in a slash.
            0 if name.ends_with(b"/") => (Kind::Directory, size),
            0 | b'0' | b'7' | b'S' if sparse => (Kind::Sparse, size),
            0 | b'0' | b'7' => (Kind::File, size),
            // GNU tar and Python agree that a hard link has no payload, whatever its size says.
            b'1' => (Kind::HARD_LINK, 0),
            b'5' => (Kind::Directory, size),
            flag => (Kind::Other(flag), size),
        };
        if size > 0 && (kind == Kind::Directory || matches!(kind, Kind::Other(b'2'..=b'6'))) {
            return Err(fail(TarFault::Payload { kind: char::from(header.flag), size }));
        }
        let link = match kind {
            Kind::HARD_LINK | Kind::SYMLINK => {
                let pax = chosen(local.link, self.global.link);
                pax.or(long.link).unwrap_or_else(|| until_nul(&header.block[157..257]))
            }
            _ => &[],
        };
        let data = if header.flag == b'S' { self.after_map(at)? } else { at + BLOCK };
        let payload = self.payload(at, data, size)?;
        Ok(Member { start, data, name, kind, link: Cow::Borrowed(link), payload })
    }

    /// Where the payload of an old GNU sparse file at `at` starts: behind the blocks that go on with
    /// its list of holes (GNU tar manual, "Basic Tar Format": `isextended`).
    fn after_map(&self, at: u64) -> Result<u64, TarError> {
        let mut data = at + BLOCK;
        let mut more = self.block(at)?[482] != 0;
        while more {
            more = self.block(data)?[504] != 0;
            data += BLOCK;
        }
        Ok(data)
    }

    /// What is wrong with the first header, if it is not that the file is of another kind: only now,
    /// since a sound header may begin with the same letters.
    fn unless_other(&self, error: TarError) -> TarError {
        match other(self.bytes).filter(|_| error.offset == 0) {
            Some(fault) => TarError { offset: 0, fault },
            None => error,
        }
    }

    /// The header block at `at`.
    fn block(&self, at: u64) -> Result<&'a [u8], TarError> {
        let rest = usize::try_from(at).ok().and_then(|at| self.bytes.get(at..)).unwrap_or(&[]);
        match rest.get(..BLOCK_LEN) {
            Some(block) => Ok(block),
            None if rest.is_empty() => Err(TarError { offset: at, fault: TarFault::NoEnd }),
            None => {
                let fault = TarFault::Truncated { need: BLOCK, have: rest.len() as u64 };
                Err(TarError { offset: at, fault })
            }
        }
    }

    /// The payload of the header at `at`; moves on behind its padding.
    fn payload(&mut self, at: u64, data: u64, size: u64) -> Result<&'a [u8], TarError> {
        let impossible = TarError { offset: at, fault: TarFault::Size { size } };
        let Some(end) = data.checked_add(size).and_then(|end| end.checked_next_multiple_of(BLOCK))
        else {
            return Err(impossible);
        };
        let have = self.bytes.len() as u64;
        if end > have {
            let fault = TarFault::Truncated { need: end - at, have: have - at };
            return Err(TarError { offset: at, fault });
        }
        // Both fit: they are at most `have`, which came from a `usize`.
        let payload = &self.bytes[data as usize..(data + size) as usize];
        self.offset = end;
        Ok(payload)
    }

    /// The end of the archive: two zero blocks, then nothing but whole blocks of zeros.
    fn end(&mut self, at: u64) -> Result<(), TarError> {
        let second = at + BLOCK;
        let block = self.block(second).map_err(|error| TarError { offset: at, ..error })?;
        if block.iter().any(|byte| *byte != 0) {
            return Err(TarError { offset: at, fault: TarFault::LoneZeroBlock });
        }
        let after = second + BLOCK;
        let rest = &self.bytes[after as usize..];
        if let Some(position) = rest.iter().position(|byte| *byte != 0) {
            let offset = after + position as u64;
            return Err(TarError { offset, fault: TarFault::AfterEnd });
        }
        let odd = rest.len() as u64 % BLOCK;
        if odd != 0 {
            let offset = self.bytes.len() as u64 - odd;
            return Err(TarError { offset, fault: TarFault::Truncated { need: BLOCK, have: odd } });
        }
        Ok(())
    }
}

impl<'a> Iterator for Walker<'a> {
    type Item = Result<Member<'a>, TarError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let start = self.offset;
        let item = self.step().transpose();
        self.ended = !matches!(item, Some(Ok(_)));
        match item {
            Some(Ok(Member { kind: Kind::Sparse, .. })) => {
                Some(Err(TarError { offset: start, fault: TarFault::Sparse }))
            }
            item => item,
        }
    }
}

/// Reads the header block in front of a payload at `data`: its type flag and size field.
///
/// For a check of one member without walking the archive. With a pax `size` the field may differ
/// from the member's size.
pub(crate) fn header_before(bytes: &[u8], data: u64) -> Result<(u8, u64), TarFault> {
    let block = data
        .checked_sub(BLOCK)
        .and_then(|start| Some(usize::try_from(start).ok()?..usize::try_from(data).ok()?))
        .and_then(|range| bytes.get(range))
        .ok_or(TarFault::Truncated { need: data, have: bytes.len() as u64 })?;
    let header = Header::parse(block)?;
    Ok((header.flag, header.size))
}
