//! Files that lie, and files that ask for more than there is.

use super::window::{escaped, latin1};
use super::*;

#[test]
fn text_stands_for_bytes() {
    assert_eq!(latin1("a\u{ff}\0".as_bytes()), Some(vec![b'a', 255, 0]));
    assert_eq!(latin1("\u{100}".as_bytes()), None);
    assert_eq!(escaped(b"a\xff\\u0000\\u005cu\\x"), Some(b"a\xff\0\\u\\x".to_vec()));
    assert_eq!(escaped(b"\\u00"), None);
    assert_eq!(escaped(b"\\u0100"), None);
}

/// A pickle of two names for one array of 1 MB, again and again: the file is small, what it asks
/// for is not.
#[test]
fn no_more_is_read_than_there_is() {
    let mut bytes = b"\x80\x03}(".to_vec();
    let array = [
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR(K\x01J\0\0\x10\0\x85"
            .as_slice(),
        b"cnumpy\ndtype\n(X\x02\0\0\0u1\x89\x88tR(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
        b"\x89B\0\0\x10\0",
        &vec![7; 1 << 20],
        b"tb",
    ];
    bytes.extend(b"X\x01\0\0\0a");
    bytes.extend(array.concat());
    bytes.extend(b"q\0");
    for name in b'b'..b'f' {
        bytes.extend([b'X', 1, 0, 0, 0, name, b'h', 0]);
    }
    bytes.extend(b"u.");
    let len = bytes.len();
    let mut file = WeightsFile::from_bytes(Path::new("x.pkl"), bytes).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
    assert!(file.is_same("a", "e"));
    let one = file.read(&["c"]).unwrap();
    assert_eq!((one[0].dtype, one[0].size.as_slice()), (Dtype::U8, &[1 << 20][..]));
    assert!(one[0].bytes.iter().all(|byte| *byte == 7));
    let error = file.read(&["a", "b", "c", "d", "e"]).unwrap_err();
    assert!(matches!(error, WeightsError::Repeated { .. }), "{error}");
    assert!(error.to_string().contains(&format!("the {len} bytes")), "{error}");
}

fn refusal(bytes: &[u8]) -> String {
    WeightsFile::from_bytes(Path::new("x"), bytes.to_vec()).unwrap_err().to_string()
}

#[test]
fn headers_that_lie_are_refused() {
    let safetensors = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let entry = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{from},{to}]}}}}"#)
    };
    let good = safetensors(&entry("2,3", 0, 6), 6);
    assert!(WeightsFile::from_bytes(Path::new("x"), good).is_ok());
    let huge = usize::MAX as u64;
    for bytes in [
        safetensors(&entry("2,3", 0, 6), 5),
        safetensors(&entry("2,3", 0, 6), 7),
        safetensors(&entry("2,3", 1, 7), 7),
        safetensors(&entry("2,3", 6, 0), 6),
        safetensors(&entry("9223372036854775807,2,9", 0, 6), 6),
        safetensors(&entry("0,18446744073709551615", 0, 0), 1),
        safetensors(&entry("2305843009213693951", 0, (1 << 61) - 1), 6),
        safetensors(&entry("", 0, huge), 6),
        safetensors("{", 0),
        [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(),
        [(1_u64 << 40).to_le_bytes().as_slice(), b"{}"].concat(),
    ] {
        let said = refusal(&bytes);
        assert!(said.contains("is not a whole safetensors file"), "{said}");
    }
    // torch before 1.6: the list of keys without the storages' elements, and with a wrong count.
    let head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\r\0\0\0little_endian\x88s.";
    let object =
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0kX\x03\0\0\0cpuK\x02NtQ.";
    let keys = b"\x80\x02]X\x01\0\0\0ka.";
    let legacy = |elements: &[u8]| [head.as_slice(), object, keys, elements].concat();
    let two = [2_i64.to_le_bytes().as_slice(), &[0; 8]].concat();
    assert!(WeightsFile::from_bytes(Path::new("x"), legacy(&two)).is_ok());
    for elements in [&two[..15], &two[..4], &[], &(-1_i64).to_le_bytes(), &i64::MAX.to_le_bytes()] {
        let said = refusal(&legacy(elements));
        assert!(said.contains("the storage \"k\" does not lie inside the file"), "{said}");
    }
    let said = refusal(&[head.as_slice(), object, b"\x80\x02]X\x01\0\0\0za."].concat());
    assert!(said.contains("storages of known element types"), "{said}");
    assert!(refusal(head).contains("truncated"));
}
