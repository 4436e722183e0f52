//! The files of a tar as `tar -x` would unpack them, with links and repeated names resolved.
//!
//! As GNU tar unpacks: a later member of a name replaces the earlier one; a hard link is another name
//! of the file that its target was at that point of the archive; a symbolic link is followed, to files
//! and to folders, at the end; leading `/` and whatever precedes the last `..` of a name is left out.
//! Nothing outside the archive is ever looked at. Bytes are not read: a file is an offset and a size.

mod paths;

use std::collections::VecDeque;

use thiserror::Error;

pub(crate) use self::paths::clean;
use self::paths::{join, leaves, parts, readable, under};
use super::tar::{Kind, TarError, Walker};

/// Longest path that Linux takes (`PATH_MAX`), in bytes.
const PATH_MAX: usize = 4096;
/// Symbolic links followed for one path, as Linux does.
const LINKS_MAX: u32 = 40;
/// Files that may be met through symbolic links to folders, which multiply them: so many, or so many
/// times the members of the archive.
const THROUGH_LINKS_MAX: (u64, u64) = (1 << 16, 4);

/// Why a member does not become a file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MemberFault {
    /// Its target is nowhere in the archive.
    #[error("a link to `{target}`, which is not in the archive")]
    Missing {
        /// The target, as the archive says it.
        target: String,
    },
    /// A hard link in front of its target: the target does not exist when it is unpacked.
    #[error("a hard link to `{target}`, which only comes later in the archive")]
    Later {
        /// The target.
        target: String,
    },
    /// Its target is an absolute path, or above the archive's top folder.
    #[error("a link to `{target}`, which lies outside of the archive")]
    Outside {
        /// The target.
        target: String,
    },
    /// Links that lead to each other.
    #[error("a link to `{target}`, which leads in a circle")]
    Circle {
        /// The target.
        target: String,
    },
    /// A link to a folder that contains it.
    #[error("a link to a folder above")]
    Above,
    /// Links to folders that lead to many times the files of the archive.
    #[error("links to folders lead to many times the files of the archive: unpack it first")]
    TooMany,
    /// A file with holes.
    #[error("a sparse file: its bytes in the archive are not those of the file; unpack it first")]
    Sparse,
    /// The rest of a file whose start lies in another volume.
    #[error("the rest of a file that begins in another volume of the archive")]
    Continued,
    /// A path through something that is no folder, or a file in the place of a folder.
    #[error("`{other}` is a file and a folder in the archive")]
    NoFolder {
        /// The path that is both.
        other: String,
    },
    /// A path that no file system takes.
    #[error("its name has {bytes} bytes, at most {PATH_MAX} can be unpacked")]
    TooLong {
        /// Its length.
        bytes: u64,
    },
}

/// An entry of an unpacked tar, or a member that does not become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A file, at an offset of the archive.
    File {
        /// Offset of its first byte.
        offset: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A folder with nothing in it.
    EmptyFolder,
    /// A member that a later one of the same name replaces.
    Replaced,
    /// A device, a pipe or the like.
    Special,
    /// A member that does not become a file.
    Fault(MemberFault),
}

/// A tar, unpacked.
#[derive(Debug)]
pub struct Unpacked {
    /// Sorted by path, then by their order in the archive.
    members: Vec<Member>,
    /// Why the archive could not be read to its end.
    broken: Option<TarError>,
}

#[derive(Debug, Clone)]
struct Member {
    path: Box<[u8]>,
    order: u32,
    node: Node,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    File {
        offset: u64,
        size: u64,
    },
    Folder,
    /// Until all are settled.
    HardLink(Box<[u8]>),
    Symlink(Box<[u8]>),
    Special,
    Fault(MemberFault),
}

impl Unpacked {
    /// Reads an archive as far as it is whole.
    pub fn new(bytes: &[u8]) -> Unpacked {
        let mut walker = Walker::new(bytes);
        let mut unpacked = Unpacked { members: Vec::new(), broken: None };
        loop {
            match walker.step() {
                Ok(Some(member)) => unpacked.push(&member),
                Ok(None) => break,
                Err(error) => {
                    unpacked.broken = Some(error);
                    break;
                }
            }
        }
        unpacked.members.sort_by(|a, b| a.path.cmp(&b.path)); // stable: the order stays
        unpacked.settle_hard_links();
        // A path moved through a link may meet another link; more rounds than links do nothing new.
        for _ in 0..LINKS_MAX {
            if !unpacked.settle_folders() {
                break;
            }
        }
        unpacked
    }

    /// Why the archive could not be read to its end: what precedes that place is unpacked.
    pub fn broken(&self) -> Option<&TarError> {
        self.broken.as_ref()
    }

    /// Visits what unpacking leaves, by path, in the order of the paths' bytes within each folder. A
    /// folder that a symbolic link leads to is visited there too.
    pub fn visit(&self, visitor: &mut dyn FnMut(&[u8], Item)) {
        let mut listing = Listing { unpacked: self, visitor, above: vec![Vec::new()], left: None };
        listing.folder(&[], &mut Vec::new());
    }

    fn push(&mut self, member: &super::tar::Member<'_>) {
        let file = || Node::File { offset: member.data, size: member.payload.len() as u64 };
        let node = match member.kind {
            Kind::File => file(),
            Kind::Directory => Node::Folder,
            Kind::Sparse => Node::Fault(MemberFault::Sparse),
            Kind::HARD_LINK => Node::HardLink(member.link.as_ref().into()),
            Kind::SYMLINK if member.link.len() > PATH_MAX => {
                Node::Fault(MemberFault::TooLong { bytes: member.link.len() as u64 })
            }
            Kind::SYMLINK => Node::Symlink(member.link.as_ref().into()),
            Kind::Other(b'3' | b'4' | b'6') => Node::Special,
            // GNU's dump of a folder's names, volume label, old long names; Solaris' access list.
            Kind::Other(b'D') => Node::Folder,
            Kind::Other(b'V' | b'N' | b'A' | b'I') => return,
            Kind::Other(b'M') => Node::Fault(MemberFault::Continued),
            // POSIX: what is not known is a regular file.
            Kind::Other(_) => file(),
        };
        let mut path = clean(&member.name);
        let mut node = node;
        if path.len() > PATH_MAX {
            node = Node::Fault(MemberFault::TooLong { bytes: path.len() as u64 });
            path = path.split(|byte| *byte == b'/').next_back().unwrap_or_default().to_vec();
            path.truncate(PATH_MAX);
        }
        if !path.is_empty() {
            // Each member has a block of the archive: 2^32 of them are 2 TiB of headers.
            let order = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
            self.members.push(Member { path: path.into(), order, node });
        }
    }

    /// The members of a path.
    fn group(&self, path: &[u8]) -> &[Member] {
        let start = self.members.partition_point(|member| *member.path < *path);
        let rest = &self.members[start..];
        &rest[..rest.partition_point(|member| *member.path == *path)]
    }

    /// What a path is in front of a member of the archive.
    fn before(&self, path: &[u8], order: u32) -> Option<&Node> {
        let earlier = self.group(path).iter().filter(|member| member.order < order);
        let nodes = earlier.map(|member| &member.node);
        // A link that cannot be made leaves what was there.
        nodes.rev().find(|node| {
            use MemberFault::{Later, Missing, NoFolder, Outside};
            !matches!(
                node,
                Node::Fault(Later { .. } | Missing { .. } | NoFolder { .. } | Outside { .. })
            )
        })
    }

    /// The members below a folder.
    fn below(&self, folder: &[u8]) -> std::ops::Range<usize> {
        if folder.is_empty() {
            return 0..self.members.len();
        }
        let inside = |path: &[u8]| match path.strip_prefix(folder) {
            Some([first, ..]) => *first < b'/',
            Some([]) => true,
            None => path < folder,
        };
        let start = self.members.partition_point(|member| inside(&member.path));
        let end =
            self.members[start..].partition_point(|member| under(&member.path, folder)) + start;
        start..end
    }

    /// What a path is when all is unpacked; `None` for nothing.
    fn node(&self, path: &[u8]) -> Option<&Node> {
        let group = self.group(path);
        let node = group.iter().rev().map(|one| &one.node).find(|n| !matches!(n, Node::Fault(_)));
        match node.or_else(|| group.last().map(|one| &one.node)) {
            None if path.is_empty() || !self.below(path).is_empty() => Some(&Node::Folder),
            found => found,
        }
    }

    /// Gives each hard link what its target was when it was made, in the archive's order, so that a
    /// target is settled before those that link to it.
    fn settle_hard_links(&mut self) {
        let is_link = |member: &Member| matches!(member.node, Node::HardLink(_));
        let mut links: Vec<usize> =
            (0..self.members.len()).filter(|at| is_link(&self.members[*at])).collect();
        links.sort_by_key(|at| self.members[*at].order);
        for at in links {
            let Member { order, node: Node::HardLink(target), .. } = &self.members[at] else {
                continue;
            };
            let cleaned = clean(target);
            let found = self.before(&cleaned, *order).cloned();
            let through = || {
                // A member of that name that comes later is not there yet, whatever it leads to.
                if !self.group(&cleaned).is_empty() {
                    return None;
                }
                let real = self.follow(&[], &cleaned).ok()?;
                self.before(&real, *order).cloned()
            };
            let later = || self.group(&cleaned).iter().any(|one| one.order > *order);
            let target = readable(target);
            let node = match found.or_else(through) {
                Some(node) if node != Node::Folder => node,
                _ if later() => Node::Fault(MemberFault::Later { target }),
                _ if leaves(target.as_bytes()) => Node::Fault(MemberFault::Outside { target }),
                _ => Node::Fault(MemberFault::Missing { target }),
            };
            self.members[at].node = node;
        }
    }

    /// Settles paths that are a file or a link and a folder at once. Whether any path was moved.
    fn settle_folders(&mut self) -> bool {
        let mut moved = false;
        for folder in self.folders() {
            let group = self.group(&folder);
            let other = group.iter().rev().find(|one| !matches!(one.node, Node::Fault(_)));
            let Some(other) = other.filter(|other| other.node != Node::Folder) else { continue };
            let (order, linked) = (other.order, matches!(other.node, Node::Symlink(_)));
            let below = self.below(&folder);
            let first = self.members[below.clone()].iter().map(|one| one.order).min();
            let fault = || Node::Fault(MemberFault::NoFolder { other: readable(&folder) });
            if first.is_some_and(|first| first < order) {
                // A folder that is not empty is in the way.
                let start = self.members.partition_point(|one| *one.path < *folder);
                let count = self.group(&folder).len();
                for one in &mut self.members[start..start + count] {
                    if one.node != Node::Folder {
                        one.node = fault();
                    }
                }
                continue;
            }
            // What is unpacked through a link lies where the link leads.
            let real = self.follow(&[], &folder).ok().filter(|_| linked);
            let real = real.filter(|real| self.node(real) == Some(&Node::Folder));
            for one in &mut self.members[below] {
                let rest = &one.path[folder.len() + 1..];
                let path = real.as_ref().map(|real| clean(&[real.as_slice(), b"/", rest].concat()));
                match path.filter(|path| path.len() <= PATH_MAX) {
                    Some(path) => {
                        one.path = path.into();
                        moved = true;
                    }
                    None => one.node = fault(),
                }
            }
            if moved {
                break;
            }
        }
        if moved {
            self.members.sort_by(|a, b| (&a.path, a.order).cmp(&(&b.path, b.order)));
        }
        moved
    }

    /// Folders that members lie in and that are members of their own, each once.
    fn folders(&self) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut last: &[u8] = &[];
        for member in &self.members {
            let path = &*member.path;
            let same = path.iter().zip(last).take_while(|(one, other)| one == other).count();
            for slash in same..path.len() {
                let folder = &path[..slash];
                if path[slash] == b'/' && !self.group(folder).is_empty() {
                    found.push(folder.to_vec());
                }
            }
            last = path;
        }
        found
    }

    /// The path that `target` leads to, seen from a folder, all links followed.
    fn follow(&self, folder: &[u8], target: &[u8]) -> Result<Vec<u8>, MemberFault> {
        let outside = || MemberFault::Outside { target: readable(target) };
        if target.starts_with(b"/") {
            return Err(outside());
        }
        let mut rest: VecDeque<Vec<u8>> = parts(target).map(<[u8]>::to_vec).collect();
        let mut real = folder.to_vec();
        let mut links = 0;
        while let Some(part) = rest.pop_front() {
            if part == b".." {
                if real.is_empty() {
                    return Err(outside());
                }
                real.truncate(real.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                continue;
            }
            let length = real.len();
            join(&mut real, &part);
            match self.node(&real) {
                Some(Node::Symlink(link)) => {
                    links += 1;
                    if links > LINKS_MAX || rest.len() > PATH_MAX {
                        return Err(MemberFault::Circle { target: readable(target) });
                    }
                    if link.starts_with(b"/") {
                        return Err(outside());
                    }
                    real.truncate(length);
                    parts(link).rev().for_each(|part| rest.push_front(part.to_vec()));
                }
                Some(Node::Folder) => {}
                Some(Node::Fault(fault)) if rest.is_empty() => return Err(fault.clone()),
                Some(_) if rest.is_empty() => {}
                _ => return Err(MemberFault::Missing { target: readable(target) }),
            }
        }
        Ok(real)
    }
}

/// A walk over the folders of an archive.
struct Listing<'a> {
    unpacked: &'a Unpacked,
    visitor: &'a mut dyn FnMut(&[u8], Item),
    /// The real folders on the way here: a link back to one is a loop.
    above: Vec<Vec<u8>>,
    /// Files that may still be visited through links to folders; `None` outside of such.
    left: Option<u64>,
}

impl Listing<'_> {
    /// `real` is where the folder lies, `shown` the path it was reached by.
    fn folder(&mut self, real: &[u8], shown: &mut Vec<u8>) {
        let unpacked = self.unpacked;
        let range = unpacked.below(real);
        if range.is_empty() && !shown.is_empty() {
            return self.emit(shown, Item::EmptyFolder);
        }
        let start = if real.is_empty() { 0 } else { real.len() + 1 };
        let mut at = range.start;
        while at < range.end && self.left != Some(0) {
            let path = &*unpacked.members[at].path;
            let rest = &path[start..];
            let length = shown.len();
            match rest.iter().position(|byte| *byte == b'/') {
                Some(slash) => {
                    let folder = &path[..start + slash];
                    join(shown, &rest[..slash]);
                    self.above.push(folder.to_vec());
                    self.folder(folder, shown);
                    self.above.pop();
                    at += unpacked.members[at..range.end]
                        .partition_point(|one| under(&one.path, folder));
                }
                None => {
                    let members = &unpacked.members[at..range.end];
                    let group = &members[..members.partition_point(|one| *one.path == *path)];
                    join(shown, rest);
                    self.path(real, group, shown);
                    at += group.len();
                }
            }
            shown.truncate(length);
        }
    }

    /// The members of one path, in the archive's order.
    fn path(&mut self, folder: &[u8], group: &[Member], shown: &mut Vec<u8>) {
        let last = group.iter().rposition(|one| !matches!(one.node, Node::Fault(_)));
        for (at, Member { node, path, .. }) in group.iter().enumerate() {
            match node {
                Node::Fault(fault) => self.emit(shown, Item::Fault(fault.clone())),
                Node::Folder if Some(at) == last && self.unpacked.below(path).is_empty() => {
                    self.emit(shown, Item::EmptyFolder);
                }
                Node::Folder => {}
                _ if Some(at) != last => self.emit(shown, Item::Replaced),
                node => self.last(folder, node, shown),
            }
        }
    }

    /// What a path is in the end.
    fn last(&mut self, folder: &[u8], node: &Node, shown: &mut Vec<u8>) {
        let item = match node {
            Node::File { offset, size } => Item::File { offset: *offset, size: *size },
            Node::Symlink(target) => match self.unpacked.follow(folder, target) {
                Err(fault) => Item::Fault(fault),
                Ok(real) => match self.unpacked.node(&real) {
                    Some(Node::File { offset, size }) => {
                        Item::File { offset: *offset, size: *size }
                    }
                    Some(Node::Folder) => return self.linked_folder(real, shown),
                    _ => Item::Special,
                },
            },
            _ => Item::Special,
        };
        self.emit(shown, item);
    }

    /// Hands on what lies at a path, unless links have led to too much already.
    fn emit(&mut self, shown: &[u8], item: Item) {
        match &mut self.left {
            Some(0) => return,
            Some(left) => *left -= 1,
            None => {}
        }
        let full = self.left == Some(0);
        (self.visitor)(shown, if full { Item::Fault(MemberFault::TooMany) } else { item });
    }

    fn linked_folder(&mut self, real: Vec<u8>, shown: &mut Vec<u8>) {
        if self.above.contains(&real) {
            return self.emit(shown, Item::Fault(MemberFault::Above));
        }
        let outermost = self.left.is_none();
        // A link counts too: links to nothing but links multiply as well.
        let (least, times) = THROUGH_LINKS_MAX;
        let most = (self.unpacked.members.len() as u64 * times).max(least);
        self.left = Some(self.left.unwrap_or(most).saturating_sub(1));
        self.above.push(real.clone());
        self.folder(&real, shown);
        self.above.pop();
        if outermost {
            self.left = None;
        }
    }
}
