//! Header blocks, and files that have none.

use std::borrow::Cow;

use super::TarFault;

/// What a file is that is no tar, by its first bytes; none of those that people take for one.
pub(super) fn other(bytes: &[u8]) -> Option<TarFault> {
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

/// A header block.
pub(super) struct Header<'a> {
    pub(super) block: &'a [u8],
    pub(super) flag: u8,
    pub(super) size: u64,
}

impl<'a> Header<'a> {
    pub(super) fn parse(block: &'a [u8]) -> Result<Header<'a>, TarFault> {
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

    pub(super) fn name(&self) -> Cow<'a, [u8]> {
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

/// The bytes before the first NUL.
pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

#[cfg(test)]
mod tests {
    use super::super::SIZE_MAX;
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
}
