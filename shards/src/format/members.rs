//! The list of a walked shard's files that the cache keeps, so that the shard need not be walked or fetched
//! to be opened again.
//!
//! Not an index: names may hold any byte here, and whatever is a sample is decided when the list is
//! read, as it is when the shard is. Lines of `OFFSET SIZE NAME`, of links with ` TARGET` behind it,
//! under a first line with the shard's size, and a last one with the CRC-32C of all before it. In names,
//! spaces, `%` and whatever is no printable ASCII stand as `%20`.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::path::Path;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};

use super::ShardError;
use super::index::{Ends, Listed, Span, Table, listed};
use super::tar;

/// First word of a list, and its version.
const HEAD: &str = "detco-members 2";

/// Bytes that are escaped.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');

/// The list for a shard.
///
/// # Errors
///
/// The bytes are no tar.
pub(crate) fn list(shard: &[u8]) -> Result<String, tar::TarError> {
    let mut text = format!("{HEAD} {}\n", shard.len());
    for member in listed(shard) {
        let Listed { name, span, link } = member?;
        let name = percent_encode(&name, ESCAPED);
        let link = link.map(|link| format!(" {}", percent_encode(&link, ESCAPED)));
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{} {} {name}{}", span.offset, span.size, link.unwrap_or_default());
    }
    let sum = crc32c::crc32c(text.as_bytes());
    let _ = writeln!(text, "{sum:08x}");
    Ok(text)
}

/// Reads a list of a shard of so many bytes; `None` for what is not one, whole and as it was written.
pub(crate) fn read(
    text: &[u8],
    shard: &Path,
    bytes: u64,
) -> Option<Result<(Table, Ends), ShardError>> {
    let text = std::str::from_utf8(text).ok()?;
    let (body, sum) = text.strip_suffix('\n')?.rsplit_once('\n')?;
    let whole = &text[..body.len() + 1];
    if sum != format!("{:08x}", crc32c::crc32c(whole.as_bytes())) {
        return None;
    }
    let mut lines = body.split('\n');
    if lines.next()? != format!("{HEAD} {bytes}") {
        return None;
    }
    let members: Option<Vec<Listed<'static>>> = lines.map(|line| member(line, bytes)).collect();
    Some(Table::of_members(shard, members?.into_iter().map(Ok)))
}

fn member(line: &str, bytes: u64) -> Option<Listed<'static>> {
    let mut fields = line.split(' ');
    let (offset, size, name) = (fields.next()?, fields.next()?, fields.next()?);
    let link = fields.next();
    if fields.next().is_some() {
        return None;
    }
    let offset = tar::decimal(offset.as_bytes())?;
    let size = tar::decimal(size.as_bytes())?;
    let inside = offset.checked_add(size).is_some_and(|end| end <= bytes);
    let place = inside && offset > 0 && offset % tar::BLOCK == 0;
    let text = |text: &str| Cow::Owned(percent_decode_str(text).collect());
    place.then(|| Listed { name: text(name), span: Span { offset, size }, link: link.map(text) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar of empty files with these names.
    fn shard(names: &[&[u8]]) -> Vec<u8> {
        let mut tar = tar_of(names);
        tar.resize(tar.len() + 1024, 0);
        tar
    }

    fn tar_of(names: &[&[u8]]) -> Vec<u8> {
        let header = |name: &[u8]| {
            let mut block = vec![0; 512];
            block[..name.len()].copy_from_slice(name);
            block[124..136].copy_from_slice(b"00000000000\0");
            block[148..156].copy_from_slice(b"        ");
            block[156] = b'0';
            let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            block
        };
        names.iter().flat_map(|name| header(name)).collect()
    }

    #[test]
    fn a_list_gives_back_what_the_shard_gives() {
        let names: [&[u8]; 5] =
            [b"my cat 1.jpg", b"my cat 1.cls", b"50% of\n\xc3\xa4.jpg", b"README", b"%20.png"];
        let bytes = shard(&names);
        let (text, path) = (list(&bytes).unwrap(), Path::new("a.tar"));
        let (table, ends) = read(text.as_bytes(), path, bytes.len() as u64).unwrap().unwrap();
        let keys: Vec<&str> = (0..table.len()).map(|at| table.get(at).unwrap().key).collect();
        assert_eq!(keys, ["my cat 1", "50% of\nä", "%20"]);
        assert!(table.get(0).unwrap().class.is_some());
        ends.check(&bytes, path, path).unwrap();
        // A name that is no text is told when the list is read, as when the shard is walked.
        let bytes = shard(&[b"a.jpg", b"\xff\xfe.jpg"]);
        let text = list(&bytes).unwrap();
        let (table, _) = read(text.as_bytes(), path, bytes.len() as u64).unwrap().unwrap();
        let error = table.fault(1).unwrap().1.to_string();
        assert!(error.contains("not UTF-8"), "{error}");
    }

    /// What is no sample, or none that can be used, is the same in the list as in the shard.
    #[test]
    fn links_are_in_the_list() {
        let mut bytes = tar_of(&[b"a.jpg", b"b.jpg", b"c.jpg", b"c.cls"]);
        for (at, kind, target) in [(0, b'1', &b"x.jpg"[..]), (512, b'2', b"no where.jpg")] {
            bytes[at + 156] = kind;
            bytes[at + 157..][..target.len()].copy_from_slice(target);
            bytes[at + 148..at + 156].copy_from_slice(b"        ");
            let sum: u64 = bytes[at..at + 512].iter().map(|byte| u64::from(*byte)).sum();
            bytes[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        bytes.resize(bytes.len() + 1024, 0);
        let file = tempfile::NamedTempFile::with_suffix(".tar").unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let map = crate::format::map::Map::open(file.path()).unwrap();
        let walked = Table::walk(&map).unwrap();
        let text = list(&bytes).unwrap();
        let (read, _) = read(text.as_bytes(), file.path(), bytes.len() as u64).unwrap().unwrap();
        assert_eq!((walked.len(), read.len()), (3, 3));
        for at in 0..3 {
            assert_eq!(walked.get(at), read.get(at));
            assert_eq!(walked.fault(at), read.fault(at), "{at}");
        }
        let said = read.fault(1).unwrap().1.to_string();
        assert!(said.contains("no where.jpg"), "{said}");
        assert!(read.fault(0).is_some() && read.fault(2).is_none());
    }

    #[test]
    fn what_is_damaged_or_of_another_shard_is_no_list() {
        let bytes = shard(&[b"a.jpg", b"b.jpg"]);
        let (text, path) = (list(&bytes).unwrap(), Path::new("a.tar"));
        let length = bytes.len() as u64;
        for at in 0..text.len() {
            let mut bent = text.clone().into_bytes();
            bent[at] ^= 1;
            assert!(read(&bent, path, length).is_none(), "byte {at}");
            assert!(read(&text.as_bytes()[..at], path, length).is_none(), "first {at}");
        }
        assert!(read(text.as_bytes(), path, length + 512).is_none());
        assert!(read(b"", path, length).is_none());
        // Damage that the sum agrees with.
        for lie in
            ["512 9999 a.jpg", "0 0 a.jpg", "513 0 a.jpg", "512 0", "-1 0 a.jpg", "512 0 a b c"]
        {
            let text = format!("{HEAD} {length}\n{lie}\n");
            let text = format!("{text}{:08x}\n", crc32c::crc32c(text.as_bytes()));
            assert!(read(text.as_bytes(), path, length).is_none(), "{lie}");
        }
    }
}
