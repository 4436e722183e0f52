//! Opened shards: sample ids to slices of the map.
//!
//! A [`ShardSet`] numbers the samples of many shards from 0, in the order of the shards, and lends
//! each as slices of mapped memory. It copies no image, keeps about fifty bytes a sample, and never
//! writes.

mod local;

use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::format::index::{Entry, Span, Table};
use crate::format::map::Map;
use crate::format::verify::member_in_place;
use crate::format::{SampleFault, ShardError};

/// Shards, opened. Share it in an `Arc`; reading needs no lock.
#[derive(Debug)]
pub struct ShardSet {
    shards: Vec<Shard>,
    samples: u64,
    classes: Vec<String>,
    fingerprint: u64,
}

/// One shard of a set.
#[derive(Debug)]
pub struct Shard {
    map: Map,
    table: Table,
    first: u64,
    /// Whether the table came from an index, whose claims are checked when a sample is read.
    indexed: bool,
}

/// A sample, borrowed from its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample<'a> {
    /// Its number in the set.
    pub id: u64,
    /// Position of its shard in [`ShardSet::shards`].
    pub shard: usize,
    /// Its position in the shard.
    pub index: usize,
    /// Its key: the path without extension it was packed from.
    pub key: &'a str,
    /// Its class number, if it has a `.cls` member.
    pub class: Option<u32>,
    /// The image file: a slice of the map. JPEG, or PNG in foreign shards.
    pub jpeg: &'a [u8],
    /// Byte offset of `jpeg` in the shard.
    pub offset: u64,
}

impl ShardSet {
    /// Opens shards named by folders (all `.tar` in them), `.tar` files, globs (`train-*.tar`) and
    /// brace lists (`train-{000000..000012}.tar`). Folders and globs are sorted by name; the order
    /// of `spec` is kept.
    ///
    /// A shard with a `.idx` beside it is not walked. Shards with a `manifest.json` beside them are
    /// held against it.
    ///
    /// # Errors
    ///
    /// Nothing there, a broken shard, a stale index, a manifest that does not fit, a sample without
    /// an image: each names the file and the place.
    pub fn open(spec: &[String]) -> Result<ShardSet, ShardError> {
        let local::Opened { mut shards, classes, digests } = local::open(spec)?;
        let mut samples = 0;
        let mut digest = Sha256::new();
        for (shard, recorded) in shards.iter_mut().zip(digests) {
            shard.first = samples;
            samples += shard.table.len() as u64;
            let name = shard.path().file_name().unwrap_or_default().as_encoded_bytes();
            for number in [name.len() as u64, shard.bytes(), shard.table.len() as u64] {
                digest.update(number.to_le_bytes());
            }
            digest.update(name);
            digest.update(recorded.as_deref().unwrap_or(""));
        }
        if samples == 0 {
            let fault = crate::format::SpecFault::NoSamples;
            return Err(ShardError::Spec { spec: spec.join(" "), fault });
        }
        let mut fingerprint = [0; 8];
        fingerprint.copy_from_slice(&digest.finalize()[..8]);
        let fingerprint = u64::from_le_bytes(fingerprint);
        Ok(ShardSet { shards, samples, classes, fingerprint })
    }

    /// Number of samples, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a set is never empty")]
    pub fn len(&self) -> u64 {
        self.samples
    }

    /// A sample by number. Nothing is copied; the member's header is compared with the index.
    ///
    /// The image's bytes are foreign, and they may vanish: after reading them, and before believing
    /// what came of them, ask [`ShardSet::check`].
    ///
    /// # Errors
    ///
    /// No such sample, a stale index, a class that is no number, or a shard that changed since it
    /// was opened.
    pub fn sample(&self, id: u64) -> Result<Sample<'_>, ShardError> {
        let (position, shard, index, entry) =
            self.find(id).ok_or(ShardError::NoSuchSample { id, samples: self.samples })?;
        let class = entry.class.map(|span| shard.class(&entry, span)).transpose();
        let jpeg = shard.slice(entry.image);
        // First of all errors: it is what the others came from.
        shard.map.check()?;
        let fault = |error| shard.map.check_file().err().unwrap_or(error);
        let (class, jpeg) = (class.map_err(fault)?, jpeg.map_err(fault)?);
        let offset = entry.image.offset;
        Ok(Sample { id, shard: position, index, key: entry.key, class, jpeg, offset })
    }

    /// Whether what was read of a sample were the bytes of its shard. One atomic load.
    ///
    /// # Errors
    ///
    /// [`ShardError::Changed`]: the shard was shortened, and zeros were read instead.
    pub fn check(&self, sample: &Sample<'_>) -> Result<(), ShardError> {
        self.shards[sample.shard].map.check()
    }

    /// As [`ShardSet::check`], for a sample whose bytes turned out to be no image: the file system
    /// is asked as well.
    ///
    /// # Errors
    ///
    /// [`ShardError::Changed`]: the shard was shortened or written to since it was opened.
    pub fn check_file(&self, sample: &Sample<'_>) -> Result<(), ShardError> {
        self.shards[sample.shard].map.check_file()
    }

    /// Asks the system to read a sample's bytes ahead. Never fails: an unknown id is ignored.
    pub fn will_need(&self, id: u64) {
        if let Some((_, shard, _, entry)) = self.find(id) {
            // From the header on: `sample` reads it.
            let start = entry.image.offset.saturating_sub(crate::format::tar::BLOCK);
            shard.map.will_need(start, entry.image.offset + entry.image.size - start);
        }
    }

    /// The class number of a sample, without touching its image. `None` for one without a class.
    ///
    /// # Errors
    ///
    /// As [`ShardSet::sample`].
    pub fn class(&self, id: u64) -> Result<Option<u32>, ShardError> {
        let missing = ShardError::NoSuchSample { id, samples: self.samples };
        let (_, shard, _, entry) = self.find(id).ok_or(missing)?;
        let class = entry.class.map(|span| shard.class(&entry, span)).transpose();
        if class.is_err() {
            shard.map.check_file()?
        } else {
            shard.map.check()?
        }
        class
    }

    /// Position in [`ShardSet::shards`] of the shard that holds a sample, for messages about samples
    /// that cannot be read; the last shard's for an unknown id.
    pub fn shard_of(&self, id: u64) -> usize {
        // At least 1: the first shard starts at 0.
        self.shards.partition_point(|shard| shard.first <= id) - 1
    }

    /// The size of a sample's image in bytes, without touching the shard. `None` for an unknown id.
    pub fn image_size(&self, id: u64) -> Option<u64> {
        self.find(id).map(|(_, _, _, entry)| entry.image.size)
    }

    /// Where a sample lies, without touching the shard: shard, key, byte offset of the image. `None`
    /// for an unknown id.
    pub fn place(&self, id: u64) -> Option<(&Path, &str, u64)> {
        self.find(id).map(|(_, shard, _, entry)| (shard.path(), entry.key, entry.image.offset))
    }

    /// Class names from the manifest; empty without one, or when the images have no classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// A number that changes with the shards' names, sizes, sample counts and recorded digests, and
    /// not with the folder they lie in: a resumed run compares it.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The shards, in order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    fn find(&self, id: u64) -> Option<(usize, &Shard, usize, Entry<'_>)> {
        let position = self.shard_of(id);
        let shard = &self.shards[position];
        let index = usize::try_from(id - shard.first).ok()?;
        Some((position, shard, index, shard.table.get(index)?))
    }
}

impl Shard {
    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.map.bytes().len() as u64
    }

    /// Number of samples in it.
    pub fn samples(&self) -> u64 {
        self.table.len() as u64
    }

    /// Number of its first sample in the set.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The address range of the map, for tests that nothing was copied.
    pub fn map_range(&self) -> std::ops::Range<*const u8> {
        self.map.bytes().as_ptr_range()
    }

    fn slice(&self, span: Span) -> Result<&[u8], ShardError> {
        if self.indexed {
            member_in_place(&self.map, span)?;
        }
        let bytes = self.map.bytes();
        let range = usize::try_from(span.offset)
            .ok()
            .zip(span.offset.checked_add(span.size).and_then(|end| usize::try_from(end).ok()));
        let slice = range.and_then(|(start, end)| bytes.get(start..end));
        slice.ok_or_else(|| {
            let have = (bytes.len() as u64).saturating_sub(span.offset);
            let fault = crate::format::TarFault::Truncated { need: span.size, have };
            ShardError::tar(self.path(), crate::format::TarError { offset: span.offset, fault })
        })
    }

    fn class(&self, entry: &Entry<'_>, span: Span) -> Result<u32, ShardError> {
        let text = self.slice(span)?;
        let number = crate::format::tar::decimal(text.trim_ascii());
        number.and_then(|number| u32::try_from(number).ok()).ok_or_else(|| ShardError::Sample {
            shard: self.path().to_path_buf(),
            key: entry.key.to_owned(),
            offset: span.offset,
            fault: SampleFault::Class {
                text: String::from_utf8_lossy(&text[..text.len().min(40)]).into_owned(),
            },
        })
    }
}
