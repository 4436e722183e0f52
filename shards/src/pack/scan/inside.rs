//! The contents of a tar, as `tar -x` would unpack it.

use std::collections::HashMap;

use super::super::SkipReason;
use crate::format::name::{extension, is_hidden, is_picture, is_tar, stem};
use crate::format::unpacked::{Item, MemberFault, Unpacked};
use crate::format::{TarError, index};

/// The contents of a tar.
#[derive(Default)]
pub(super) struct Inside {
    /// Path, offset, size.
    pub(super) pictures: Vec<(Vec<u8>, u64, u64)>,
    pub(super) tars: Vec<(Vec<u8>, u64, u64)>,
    /// What `.cls` members say, by their path without extension.
    labels: HashMap<Vec<u8>, Box<str>>,
    /// Labels and texts: what makes several members a sample.
    companions: u64,
    pub(super) empty_folders: Vec<Vec<u8>>,
    /// Other files.
    pub(super) others: Vec<Vec<u8>>,
    pub(super) skips: Vec<(Vec<u8>, SkipReason)>,
    pub(super) broken: Option<TarError>,
}

impl Inside {
    pub(super) fn of(bytes: &[u8]) -> Inside {
        let unpacked = Unpacked::new(bytes);
        let mut inside = Inside { broken: unpacked.broken().cloned(), ..Inside::default() };
        unpacked.visit(&mut |path, item| inside.take(bytes, path, item));
        inside
    }

    fn take(&mut self, bytes: &[u8], path: &[u8], item: Item) {
        let name = path.to_vec();
        match item {
            Item::EmptyFolder => self.empty_folders.push(name),
            Item::Fault(MemberFault::Above) => self.skips.push((name, SkipReason::Loop)),
            // By another extension it is a file that nobody would have packed.
            Item::Fault(_) if !extension(path).is_empty() && !wanted(path) => {
                self.others.push(name);
            }
            Item::Fault(fault) => self.skips.push((name, SkipReason::Member { fault })),
            _ if is_hidden(path) => self.skips.push((name, SkipReason::Hidden)),
            Item::Replaced if is_picture(path) => self.skips.push((name, SkipReason::Replaced)),
            Item::Replaced => {}
            Item::Special => self.others.push(name),
            Item::File { offset, size } if is_tar(path) => self.tars.push((name, offset, size)),
            Item::File { offset, size } if is_picture(path) => {
                self.pictures.push((name, offset, size));
            }
            Item::File { offset, size } => {
                let kind = extension(path).to_ascii_lowercase();
                if matches!(kind.as_slice(), b"cls" | b"json" | b"txt") {
                    self.companions += 1;
                }
                if kind == b"cls" {
                    // Inside the archive, as the walk has seen.
                    let text = &bytes[offset as usize..(offset + size) as usize];
                    let text = &text[..text.len().min(LABEL_MAX)];
                    let label = String::from_utf8_lossy(text.trim_ascii()).into_owned();
                    self.labels.insert(stem(path).to_vec(), label.into());
                } else {
                    self.others.push(name);
                }
            }
        }
    }

    /// The label of a picture: of the file that differs in its extension only, else of its sample by
    /// WebDataset's rule, whose key ends at the first dot.
    pub(super) fn label(&self, path: &[u8]) -> Option<Box<str>> {
        let by_key = || self.labels.get(webdataset_key(path));
        self.labels.get(stem(path)).or_else(by_key).cloned()
    }

    /// Whether its members make samples of several: pictures with labels or texts.
    pub(super) fn sampled(&self) -> bool {
        !self.pictures.is_empty() && self.companions * 2 >= self.pictures.len() as u64
    }

    /// Whether no picture lies in a folder.
    pub(super) fn flat(&self) -> bool {
        self.pictures.iter().all(|(path, ..)| !path.contains(&b'/'))
    }
}

/// Labels are read up to here, in bytes: longer ones name no class.
const LABEL_MAX: usize = 4096;

/// Whether a name is that of something to pack.
fn wanted(path: &[u8]) -> bool {
    is_picture(path) || is_tar(path) || extension(path).eq_ignore_ascii_case(b"cls")
}

/// The name up to the first dot of its last component.
fn webdataset_key(name: &[u8]) -> &[u8] {
    match std::str::from_utf8(name).ok().and_then(index::split_name) {
        Some((key, _)) => key.as_bytes(),
        None => name,
    }
}
