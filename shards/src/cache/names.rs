//! Names of the cache's files.

/// `NAME`, or `.NAME.BYTES.part` with its bytes.
pub(super) fn parse(file: &str) -> Option<(&str, Option<u64>)> {
    if is_ours(file) {
        return Some((file, None));
    }
    let (name, bytes) = file.strip_prefix('.')?.strip_suffix(".part")?.rsplit_once('.')?;
    let bytes = bytes.parse().ok()?;
    is_ours(name).then_some((name, Some(bytes)))
}

/// 64 hex digits, a dot, letters, digits and dots.
pub(super) fn is_ours(name: &str) -> bool {
    let digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    name.len() <= 128
        && name.as_bytes().split_at_checked(64).is_some_and(|(digest, rest)| {
            let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'.';
            digest.iter().all(digit) && rest.starts_with(b".") && rest.iter().all(plain)
        })
        && (name.ends_with(".tar") || name.ends_with(".idx"))
}

pub(super) fn is_index(name: &str) -> bool {
    name.ends_with(".idx")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u8) -> String {
        format!("{}.tar", format!("{number:02x}").repeat(32))
    }

    #[test]
    fn only_our_own_names_are_ours() {
        assert_eq!(parse(&name(1)), Some((name(1).as_str(), None)));
        let part = format!(".{}.77.part", name(1));
        assert_eq!(parse(&part), Some((name(1).as_str(), Some(77))));
        for other in ["locks", "a.tar", &name(1)[1..], &format!("{}x", name(1)), "..tar.5.part"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
