//! Extended headers: pax records, and GNU's long names.

use super::TarFault;

/// GNU's long names in front of a member.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Long<'a> {
    pub(super) name: Option<&'a [u8]>,
    pub(super) link: Option<&'a [u8]>,
}

/// What pax headers say: `None` not mentioned, `Some(None)` taken back by an empty value.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pax<'a> {
    pub(super) path: Option<Option<&'a [u8]>>,
    pub(super) link: Option<Option<&'a [u8]>>,
    pub(super) size: Option<Option<u64>>,
    /// Whether the member is a sparse file.
    pub(super) sparse: bool,
    /// Its name: `path` then holds one that GNU tar made up.
    pub(super) sparse_name: Option<&'a [u8]>,
}

impl<'a> Pax<'a> {
    /// Reads records; a later one of the same key wins.
    pub(super) fn read(&mut self, records: &'a [u8]) -> Result<(), TarFault> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
