//! Paths of members, as unpacking takes them.

/// A member's name as the path that it is unpacked to: without empty parts and `.`, and without
/// whatever precedes the last `..`, as GNU tar leaves it out.
pub(crate) fn clean(name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(name.len());
    for part in parts(name) {
        if part == b".." {
            path.clear();
        } else {
            join(&mut path, part);
        }
    }
    path
}

/// The parts of a path between its slashes, without empty ones and `.`.
pub(super) fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// Adds a part to a path.
pub(super) fn join(path: &mut Vec<u8>, part: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(part);
}

/// Whether a link names a place above the archive's top folder, or none that is relative to it.
pub(super) fn leaves(target: &[u8]) -> bool {
    target.starts_with(b"/") || parts(target).any(|part| part == b"..")
}

/// Whether a path lies below a folder.
pub(super) fn under(path: &[u8], folder: &[u8]) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with(b"/"))
}

/// For messages: what is no UTF-8 is replaced.
pub(super) fn readable(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
