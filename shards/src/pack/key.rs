//! A path to a sample's key: reversible, so that two paths never become one key.
//!
//! `%XX` replaces what a reader of shards would trip over: `.` in the last component (WebDataset
//! splits there), `%` itself, `\` (GNU tar quotes it), white space (DALI's index splits there),
//! control characters, bytes that are not UTF-8, whole components `.` and `..`, and the first `_` of
//! a leading `__` (Python's `webdataset` skips `__meta__`). Case is kept.
//!
//! The extension is no part of the key, unless another file has the key without it: then it is
//! appended, `%2E` for its dot, as often as it takes.

use crate::format::name::{extension, stem};

/// Appends a path's extension to its key, so many times.
pub(crate) fn append(path: &[u8], extensions: u8, key: &mut String) {
    for _ in 0..extensions {
        key.push_str("%2E");
        escape(extension(path), true, "", key);
    }
}

/// The key that a member of a shard of `detco pack` has already.
pub(crate) fn kept(path: &[u8]) -> String {
    readable(stem(path))
}

/// The key of a relative path; its extension, if any, is not part of it.
pub(crate) fn of(path: &[u8]) -> String {
    let mut key = String::with_capacity(path.len());
    let stem = stem(path);
    let mut parts = stem.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        let dots = last || part.iter().all(|byte| *byte == b'.');
        let meta = key.is_empty() && part.starts_with(b"__");
        escape(&part[usize::from(meta)..], dots, if meta { "%5F" } else { "" }, &mut key);
        if !last {
            key.push('/');
        }
    }
    key
}

/// Text as it is, with `%XX` for bytes that are not UTF-8.
pub(crate) fn readable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| percent(*byte, &mut text));
    }
    text
}

fn escape(part: &[u8], dots: bool, lead: &str, key: &mut String) {
    key.push_str(lead);
    for chunk in part.utf8_chunks() {
        for character in chunk.valid().chars() {
            let reserved = matches!(character, '%' | '\\') || (dots && character == '.');
            if reserved || character.is_whitespace() || character.is_control() {
                character.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| percent(byte, key));
            } else {
                key.push(character);
            }
        }
        chunk.invalid().iter().for_each(|byte| percent(*byte, key));
    }
}

fn percent(byte: u8, text: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    text.push('%');
    text.push(char::from(DIGITS[usize::from(byte >> 4)]));
    text.push(char::from(DIGITS[usize::from(byte & 15)]));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_by_example() {
        for (path, key) in [
            ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
            ("a.b/c.d.jpg", "a.b/c%2Ed"),
            ("Model T.jpg", "Model%20T"),
            ("100%.jpg", "100%25"),
            ("no_extension", "no_extension"),
            ("__meta__/x.jpg", "%5F_meta__/x"),
            ("../up.jpg", "%2E%2E/up"),
            ("./a//b.jpg", "%2E/a/b"),
            ("grün/ß.png", "grün/ß"),
            ("tab\there.jpg", "tab%09here"),
        ] {
            assert_eq!(of(path.as_bytes()), key, "{path}");
        }
        assert_eq!(of(b"\xff\xfe.jpg"), "%FF%FE");
        let mut key = of(b"cat/000.png");
        append(b"cat/000.png", 2, &mut key);
        assert_eq!(key, "cat/000%2Epng%2Epng");
        assert_eq!(kept(b"a%20b/c%2Ed.jpg"), "a%20b/c%2Ed");
    }

    proptest! {
        #[test]
        fn keys_can_be_turned_back(path in "[ -~é\t]{1,8}(/[ -~é]{1,8}){0,2}") {
            let plain = path.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
            prop_assume!(!plain.is_empty());
            let stem = stem(plain.as_bytes());
            let key = of(plain.as_bytes());
            let mut back = Vec::new();
            let mut bytes = key.bytes();
            while let Some(byte) = bytes.next() {
                let digits = |b: &mut dyn Iterator<Item = u8>| {
                    let pair = [b.next().expect("two digits"), b.next().expect("two digits")];
                    u8::from_str_radix(std::str::from_utf8(&pair).expect("ASCII"), 16).expect("hex")
                };
                back.push(if byte == b'%' { digits(&mut bytes) } else { byte });
            }
            prop_assert_eq!(back, stem);
            let name = format!("{key}.jpg");
            prop_assert_eq!(crate::format::index::split_name(&name), Some((key.as_str(), "jpg")));
        }
    }
}
