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

use std::borrow::Cow;

use thiserror::Error;

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

/// What a file is that is no tar, by its first bytes; none of those that people take for one.
fn other(bytes: &[u8]) -> Option<TarFault> {
    const PACKED: [(&[u8], &str); 4] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (b"BZh", "bzip2"),
    ];
    const IMAGE: &str = "an image, a tar was expected: name the folder that it lies in";
    const PAGE: &str = "a web page, a tar was expected: fetch the file itself";
    const OTHERS: [(&[u8], &str); 11] = [
        (&[0xff, 0xd8, 0xff], IMAGE),
        (b"\x89PNG", IMAGE),
        (b"GIF8", IMAGE),
        (b"RIFF", IMAGE),
        (b"<!doctype", PAGE),
        (b"<html", PAGE),
        (b"<?xml", PAGE),
        (
            b"version https://git-lfs",
            "a pointer of Git LFS, a tar was expected: `git lfs pull` brings the file",
        ),
        (b"PK\x03\x04", "a zip archive, a tar was expected: unpack it first"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive, a tar was expected: unpack it first"),
        (b"Rar!", "a rar archive, a tar was expected: unpack it first"),
    ];
    let begins = |magic: &[u8]| {
        let head = bytes.trim_ascii_start().get(..magic.len());
        bytes.starts_with(magic) || head.is_some_and(|head| head.eq_ignore_ascii_case(magic))
    };
    if let Some((_, format)) = PACKED.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Some(TarFault::Compressed { format });
    }
    OTHERS.iter().find(|(magic, _)| begins(magic)).map(|(_, what)| TarFault::Other { what })
}

struct Header<'a> {
    block: &'a [u8],
    flag: u8,
    size: u64,
}

impl<'a> Header<'a> {
    fn parse(block: &'a [u8]) -> Result<Header<'a>, TarFault> {
        let stored = number(&block[148..156], "checksum")?;
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        let field: u64 = block[148..156].iter().map(|byte| u64::from(*byte)).sum();
        let computed = sum - field + 8 * u64::from(b' ');
        if stored != computed {
            // Some old writers summed signed bytes; both readers we compare with take that too.
            let high = block[..148].iter().chain(&block[156..]).filter(|byte| **byte > 127).count();
            if computed.checked_sub(256 * high as u64) != Some(stored) {
                return Err(TarFault::Checksum { stored, computed });
            }
        }
        let flag = block[156];
        // GNU tar leaves the size of a volume label blank.
        let blank = flag == b'V' && until_nul(&block[124..136]).trim_ascii().is_empty();
        let size = if blank { 0 } else { number(&block[124..136], "size")? };
        Ok(Header { block, flag, size })
    }

    fn name(&self) -> Cow<'a, [u8]> {
        let name = until_nul(&self.block[..100]);
        // Only POSIX has a prefix: GNU's own headers keep times where it would be.
        let posix = &self.block[257..263] == b"ustar\0";
        let prefix = until_nul(&self.block[345..500]);
        if !posix || prefix.is_empty() {
            return Cow::Borrowed(name);
        }
        Cow::Owned([prefix, b"/", name].concat())
    }
}

/// GNU's long names in front of a member.
#[derive(Debug, Clone, Copy, Default)]
struct Long<'a> {
    name: Option<&'a [u8]>,
    link: Option<&'a [u8]>,
}

/// What pax headers say: `None` not mentioned, `Some(None)` taken back by an empty value.
#[derive(Debug, Clone, Copy, Default)]
struct Pax<'a> {
    path: Option<Option<&'a [u8]>>,
    link: Option<Option<&'a [u8]>>,
    size: Option<Option<u64>>,
    /// Whether the member is a sparse file.
    sparse: bool,
    /// Its name: `path` then holds one that GNU tar made up.
    sparse_name: Option<&'a [u8]>,
}

impl<'a> Pax<'a> {
    /// Reads records; a later one of the same key wins.
    fn read(&mut self, records: &'a [u8]) -> Result<(), TarFault> {
        let mut at = 0;
        while at < records.len() {
            let malformed = TarFault::Pax { record: at as u64 };
            let rest = &records[at..];
            let (length, key, value) = pax_record(rest).ok_or(malformed)?;
            match key {
                b"path" if value.contains(&0) => return Err(TarFault::PaxValue { key: "path" }),
                b"path" => self.path = Some((!value.is_empty()).then_some(value)),
                b"linkpath" => self.link = Some((!value.is_empty()).then_some(value)),
                b"size" if value.is_empty() => self.size = Some(None),
                b"size" => {
                    let size = decimal(value).ok_or(TarFault::PaxValue { key: "size" })?;
                    self.size = Some(Some(size));
                }
                _ if key.starts_with(b"GNU.sparse.") => {
                    self.sparse = true;
                    if key == b"GNU.sparse.name" && !value.is_empty() && !value.contains(&0) {
                        self.sparse_name = Some(value);
                    }
                }
                _ => {}
            }
            at += length;
        }
        Ok(())
    }
}

/// `LENGTH KEY=VALUE\n` at the start of `bytes`: its length, key and value.
fn pax_record(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let space = bytes.iter().take(21).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let body = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (length, &body[..equals], &body[equals + 1..]))
}

/// Decimal digits and nothing else.
pub(crate) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// A numeric field: octal with blanks around it, or base 256 with the top bit set.
fn number(field: &[u8], name: &'static str) -> Result<u64, TarFault> {
    let wrong = TarFault::Number { field: name };
    if field[0] & 0x80 != 0 {
        // 0x80 leads a positive number; the other bits of the byte would exceed 64 bits (0xff: negative).
        let (head, tail) = field.split_at(field.len() - 8);
        let mut low = [0; 8];
        low.copy_from_slice(tail);
        let blank = match head {
            [first, rest @ ..] => *first == 0x80 && rest.iter().all(|byte| *byte == 0),
            // An eight-byte field: the flag is its own top bit.
            [] => {
                low[0] &= 0x7f;
                low[0] == 0
            }
        };
        return if blank { Ok(u64::from_be_bytes(low)) } else { Err(wrong) };
    }
    let digits = until_nul(field).trim_ascii();
    if digits.is_empty() {
        return Err(wrong);
    }
    digits
        .iter()
        .try_fold(0u64, |value, digit| {
            let digit = (b'0'..=b'7').contains(digit).then(|| u64::from(digit - b'0'))?;
            value.checked_mul(8)?.checked_add(digit)
        })
        .ok_or(wrong)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"00000000017\0", "size"), Ok(15));
        assert_eq!(number(b"        17 \0", "size"), Ok(15));
        assert_eq!(number(b"77777777777\0", "size"), Ok(SIZE_MAX));
        let big = [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0];
        assert_eq!(number(&big, "size"), Ok(1 << 33));
        let full = [0x80, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255];
        assert_eq!(number(&full, "size"), Ok(u64::MAX));
        for wrong in [
            b"\0\0\0\0\0\0\0\0\0\0\0\0",
            b"            ",
            b"0000000001x\0",
            b"00000000-17\0",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x80\x01\0\0\0\0\0\0\0\0\0\0",
        ] {
            assert_eq!(number(wrong, "size"), Err(TarFault::Number { field: "size" }));
        }
    }

    #[test]
    fn pax_records_are_read_strictly() {
        assert_eq!(pax_record(b"12 path=abc\nrest"), Some((12, &b"path"[..], &b"abc"[..])));
        assert_eq!(pax_record(b"11 path=ab\n"), Some((11, &b"path"[..], &b"ab"[..])));
        for wrong in [
            &b""[..],
            b"12 path=abc",
            b"13 path=abc\n",
            b"11 path=abc\n",
            b"x2 path=abc\n",
            b"7 =abc\n",
            b"8 pathx\n",
            b" path=abc\n",
            b"2 ",
            b"3 \n",
            b"0 path=abc\n",
            b"99999999999999999999999 path=abc\n",
            b"18446744073709551615 path=abc\n",
        ] {
            assert_eq!(pax_record(wrong), None, "{wrong:?}");
        }
    }
}
