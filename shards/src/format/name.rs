//! File names: the extension, and whether it is that of an image.

/// Extensions that name a picture, whether `detco pack` takes its format or not.
const PICTURES: [&str; 18] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm", "avif",
    "heic", "heif", "jxl", "jp2", "j2k",
];

/// Extensions of archives that may hold pictures and are not looked into.
const ARCHIVES: [&str; 10] = ["zip", "tgz", "gz", "bz2", "xz", "zst", "7z", "rar", "tbz2", "txz"];

/// The name without its extension: up to the last dot of its last component, unless nothing stands in
/// front of that dot.
pub(crate) fn stem(name: &[u8]) -> &[u8] {
    let base = name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    match name[base..].iter().rposition(|byte| *byte == b'.') {
        Some(dot) if dot > 0 => &name[..base + dot],
        _ => name,
    }
}

/// The extension of a name's last component, without the dot; empty for none.
pub(crate) fn extension(name: &[u8]) -> &[u8] {
    name.get(stem(name).len() + 1..).unwrap_or(&[])
}

/// Whether a file is a picture by its name.
pub(crate) fn is_picture(name: &[u8]) -> bool {
    is_picture_extension(extension(name))
}

/// Whether a file is a picture by its extension.
pub(crate) fn is_picture_extension(extension: &[u8]) -> bool {
    known(extension, &PICTURES)
}

/// Whether a file is a compressed archive by its name.
pub(crate) fn is_archive(name: &[u8]) -> bool {
    known(extension(name), &ARCHIVES)
}

/// Whether a file is a tar by its name.
pub(crate) fn is_tar(name: &[u8]) -> bool {
    known(extension(name), &["tar"])
}

/// Whether a component of a path is hidden: starts with a dot.
pub(crate) fn is_hidden(name: &[u8]) -> bool {
    name.split(|byte| *byte == b'/')
        .any(|part| part.starts_with(b".") && part != b".." && part != b".")
}

fn known(extension: &[u8], known: &[&str]) -> bool {
    known.iter().any(|known| extension.eq_ignore_ascii_case(known.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_at_the_last_dot_of_the_last_component() {
        assert_eq!(extension(b"a.b/c"), b"");
        assert_eq!(extension(b"a/c.tar.gz"), b"gz");
        assert_eq!((stem(b"a.b/c.d.jpg"), stem(b"a/.jpg")), (&b"a.b/c.d"[..], &b"a/.jpg"[..]));
        assert!(is_picture(b"x.JPG") && is_picture(b"x.heif") && !is_picture(b"jpg"));
        assert!(is_archive(b"a.tar.gz") && !is_archive(b"a.tar") && is_tar(b"A.TAR"));
        assert!(is_hidden(b"a/.b/c") && is_hidden(b"._x.jpg") && !is_hidden(b"../x.jpg"));
    }
}
