//! The layout of a batch: its sections of views, and the views' notes.

use std::ops::Range;
use std::sync::Arc;

use crate::decode::Rect;

/// The section of a batch for one group of views.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The group's name.
    pub name: String,
    /// Views of a sample.
    pub views: usize,
    /// One view of one sample, in bytes: `[h, w, 3]` or `[patches, p, p, 3]`.
    pub shape: Vec<usize>,
}

impl Section {
    /// A group of so many views of this shape.
    pub fn new(name: &str, views: usize, shape: Vec<usize>) -> Section {
        Section { name: name.to_owned(), views, shape }
    }

    /// Bytes of one view of one sample.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The layout of a batch. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    n: usize,
    sections: Arc<[Section]>,
    /// For each view of all sections, in order: its first byte, and its bytes per sample.
    views: Arc<[(usize, usize)]>,
    /// Bytes of all views.
    pixels: usize,
}

impl Layout {
    /// The layout of batches of up to `n` samples with these sections.
    pub fn new(n: usize, sections: Vec<Section>) -> Layout {
        let (mut views, mut pixels) = (Vec::new(), 0);
        for section in &sections {
            for _ in 0..section.views {
                views.push((pixels, section.bytes()));
                // Where that is too much, there is no memory for a slab either.
                pixels = n.saturating_mul(section.bytes()).saturating_add(pixels);
            }
        }
        Layout { n, sections: sections.into(), views: views.into(), pixels }
    }

    /// The capacity in samples.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The groups of views.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Views of a sample, of all sections.
    pub fn views(&self) -> usize {
        self.views.len()
    }

    /// Bytes of each view of one sample, in order.
    pub fn view_bytes(&self) -> impl Iterator<Item = usize> {
        self.views.iter().map(|(_, bytes)| *bytes)
    }

    /// The number, among all views, of a section's view `view`; none where there is no such.
    pub fn number(&self, name: &str, view: usize) -> Option<usize> {
        let mut first = 0;
        for section in &*self.sections {
            if section.name == name {
                return (view < section.views).then_some(first + view);
            }
            first += section.views;
        }
        None
    }

    /// [`Layout::number`] of a view that exists.
    ///
    /// # Panics
    /// Where it is not.
    pub(crate) fn expect(&self, name: &str, view: usize) -> usize {
        let number = self.number(name, view);
        number.unwrap_or_else(|| panic!("no view {view} of {name:?} in {:?}", self.sections))
    }

    /// Bytes of all views of all samples.
    pub fn pixels(&self) -> usize {
        self.pixels
    }

    /// Bytes of the whole slab: views, and notes.
    pub fn bytes(&self) -> usize {
        self.n.saturating_mul(self.views() * Note::BYTES).saturating_add(self.pixels)
    }

    /// [`Layout::bytes`] in 128 bits, which any layout fits.
    pub(crate) fn bytes_wide(&self) -> u128 {
        let sample = |one: &Section| {
            let bytes = one.shape.iter().map(|length| *length as u128);
            one.views as u128 * (bytes.product::<u128>() + Note::BYTES as u128)
        };
        let sample = self.sections.iter().map(sample).sum::<u128>();
        (self.n as u128).saturating_mul(sample)
    }

    /// The section of a view, and the bytes of a sample's.
    pub(crate) fn view(&self, number: usize) -> (Range<usize>, usize) {
        let (start, bytes) = self.views[number];
        (start..start + self.n * bytes, bytes)
    }

    /// The section of the notes of a view, and the bytes of a sample's.
    pub(crate) fn note(&self, number: usize) -> (Range<usize>, usize) {
        assert!(number < self.views(), "the note of view {number} of {}", self.views());
        let start = self.pixels + number * self.n * Note::BYTES;
        (start..start + self.n * Note::BYTES, Note::BYTES)
    }
}

/// The note of a view: the small part of its plan that stands beside the pixels in every batch, for methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// Width and height of the picture that the box lies in: the image, or what it was resized to.
    pub picture: [u32; 2],
    /// The box that the view shows.
    pub crop: Rect,
    /// Whether it is mirrored.
    pub flip: bool,
    /// Counter-clockwise quarter turns that the reader applies.
    pub rotation: u8,
    /// Index of the patches' permutation in its set, where it was drawn from one.
    pub permutation: Option<u32>,
}

impl Note {
    /// Bytes of a note in a slab.
    pub(crate) const BYTES: usize = 4 * WORDS;

    pub(crate) fn write(&self, to: &mut [u8]) {
        let Rect { left, top, width, height } = self.crop;
        let permutation = self.permutation.unwrap_or(u32::MAX);
        let [w, h] = self.picture;
        let flip = u32::from(self.flip);
        let rotation = self.rotation.into();
        let words: [u32; WORDS] = [w, h, left, top, width, height, flip, rotation, permutation];
        for (to, word) in to.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_ne_bytes();
        }
    }

    pub(crate) fn read(from: &[u8]) -> Note {
        let mut words = [0; WORDS];
        for (word, from) in words.iter_mut().zip(from.as_chunks::<4>().0) {
            *word = u32::from_ne_bytes(*from);
        }
        let [w, h, left, top, width, height, flip, rotation, permutation] = words;
        Note {
            picture: [w, h],
            crop: Rect { left, top, width, height },
            flip: flip != 0,
            rotation: rotation as u8,
            permutation: Some(permutation).filter(|index| *index != u32::MAX),
        }
    }
}

/// 32-bit words of a note in a slab.
const WORDS: usize = 9;
