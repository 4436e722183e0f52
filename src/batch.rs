//! Slab to tensors: the only place where bytes become tensors.

#[cfg(test)]
mod tests;

use detco_shards::pipeline::Filled;
use detco_shards::slab::Layout;
use detco_shards::views::Note;
use tch::{Device, Kind, Tensor};
use thiserror::Error;

use crate::config::{CROPS, Config, PATCHES};
use crate::device;
use crate::method::error::StepError;
use crate::shim::ShimError;
use crate::shim::step::{self as shim, Lane};

pub use detco_shards::views::{MEAN, STD};

/// Why bytes make no batch.
#[derive(Debug, Error)]
pub enum BatchError {
    /// More or fewer bytes than the shape says.
    #[error("a section of {found} bytes cannot hold {images} images of {edge} x {edge} x 3 bytes")]
    Length {
        /// Images expected.
        images: usize,
        /// Their edge in pixels.
        edge: usize,
        /// Bytes found.
        found: usize,
    },
    /// libtorch failed: out of memory, or a device that went away.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// The bytes that a batch of n samples is made of: the sections of a slab.
#[derive(Clone, Debug)]
pub struct Sections<'a> {
    /// Samples.
    pub n: usize,
    /// One for each group of views.
    pub groups: Vec<Section<'a>>,
}

/// The views of one group as bytes.
#[derive(Clone, Debug)]
pub struct Section<'a> {
    /// The group's name.
    pub name: &'a str,
    /// One view of one sample: `[h, w, 3]` or `[patches, p, p, 3]`.
    pub shape: &'a [usize],
    /// Each view of all samples: `[n, ...]` of that shape.
    pub views: Vec<&'a [u8]>,
}

impl<'a> Section<'a> {
    /// Patches of a view; none where it is a picture.
    fn patches(&self) -> Option<usize> {
        (self.shape.len() == 4).then(|| self.shape[0])
    }

    /// Side of an image in pixels.
    fn edge(&self) -> usize {
        self.shape[self.shape.len() - 2]
    }

    /// Each view, with the number and edge of its images for n samples.
    fn images(&self, n: usize) -> impl Iterator<Item = (&'a [u8], usize, usize)> {
        let (images, edge) = (n * self.patches().unwrap_or(1), self.edge());
        self.views.clone().into_iter().map(move |bytes| (bytes, images, edge))
    }
}

impl<'a> Sections<'a> {
    /// All that a batch of the loader's holds.
    pub fn of(filled: &'a Filled) -> Sections<'a> {
        let sections = filled.layout().map_or(&[][..], Layout::sections);
        let groups = sections.iter().map(|section| Section {
            name: &section.name,
            shape: &section.shape,
            views: (0..section.views).map(|view| filled.view(&section.name, view)).collect(),
        });
        Sections { n: filled.len(), groups: groups.collect() }
    }

    /// All views, with the number and edge of the images in each.
    fn all(&self) -> impl Iterator<Item = (&'a [u8], usize, usize)> {
        self.groups.iter().flat_map(|group| group.images(self.n))
    }
}

/// What images become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Where they go.
    pub device: Device,
    /// Whether channels come to lie innermost.
    pub channels_last: bool,
    /// Whether they are rounded to bfloat16, as the first convolution would do it.
    pub bf16: bool,
}

impl Form {
    /// As the encoders of a run want them on this device.
    pub fn of(config: &Config, device: Device) -> Form {
        let channels_last = device::channels_last(config, device);
        Form { device, channels_last, bf16: device::in_bf16(&config.train, device) }
    }

    /// Channels-first float32.
    pub fn plain(device: Device) -> Form {
        Form { device, channels_last: false, bf16: false }
    }
}

/// What the encoders see in one step: renditions of the same n samples, by groups of views.
#[derive(Debug)]
pub struct Batch {
    groups: Vec<(String, Vec<Tensor>)>,
    /// What was drawn with each view, by groups: a note for each sample.
    notes: Vec<(String, Vec<Vec<Note>>)>,
}

impl Batch {
    /// Of groups by name: the views of each, normalised, `[n, 3, h, w]` or `[n, patches, 3, p, p]`.
    ///
    /// # Panics
    /// Without a view.
    pub fn new(groups: Vec<(String, Vec<Tensor>)>) -> Batch {
        assert!(groups.iter().any(|(_, views)| !views.is_empty()), "a batch without views");
        Batch { groups, notes: Vec::new() }
    }

    /// The same, with what was drawn with each view, by groups: a note for each sample.
    #[must_use]
    pub fn with_notes(self, notes: Vec<(String, Vec<Vec<Note>>)>) -> Batch {
        Batch { notes, ..self }
    }

    /// What was drawn with a view of a group, for each sample.
    ///
    /// # Errors
    /// When the batch came without.
    pub fn notes(&self, group: &str, view: usize) -> Result<&[Note], StepError> {
        let of = self.notes.iter().find(|(name, _)| name == group);
        let notes = of.and_then(|(_, views)| views.get(view)).map(Vec::as_slice);
        notes
            .filter(|notes| notes.len() as i64 == self.len())
            .ok_or_else(|| StepError::Notes { group: group.to_owned() })
    }

    /// Of crops, and perhaps of patches: the query's and the key's.
    pub fn of_pairs(crops: [Tensor; 2], patches: Option<[Tensor; 2]>) -> Batch {
        let group = |name: &str, views: [Tensor; 2]| (name.to_owned(), Vec::from(views));
        let patches = patches.map(|views| group(PATCHES, views));
        Batch::new([group(CROPS, crops)].into_iter().chain(patches).collect())
    }

    /// The views of a group, if there is one of this name.
    pub fn views(&self, group: &str) -> Option<&[Tensor]> {
        self.groups.iter().find(|(name, _)| name == group).map(|(_, views)| views.as_slice())
    }

    /// The views of a group, which must be so many.
    ///
    /// # Errors
    /// When they are not.
    pub fn exactly(&self, group: &str, expected: usize) -> Result<&[Tensor], StepError> {
        let views = self.views(group).unwrap_or_default();
        match views.len() == expected {
            true => Ok(views),
            false => {
                let (group, found) = (group.to_owned(), views.len());
                Err(StepError::Views { group, found, expected })
            }
        }
    }

    /// All groups, in the recipe's order.
    pub fn groups(&self) -> &[(String, Vec<Tensor>)] {
        &self.groups
    }

    /// The same after `change` of each view.
    #[must_use]
    pub fn map(self, change: impl Fn(Tensor) -> Tensor) -> Batch {
        let group =
            |(name, views): (String, Vec<Tensor>)| (name, views.into_iter().map(&change).collect());
        Batch { groups: self.groups.into_iter().map(group).collect(), notes: self.notes }
    }

    /// Copies the sections of a slab and waits until they are copied.
    ///
    /// # Errors
    /// When a section has another length.
    pub fn from_slab(sections: &Sections<'_>, form: Form) -> Result<Batch, BatchError> {
        let bytes = |(bytes, images, edge)| -> Result<Tensor, BatchError> {
            check(bytes, images, edge)?;
            Ok(Tensor::from_slice(bytes).to_device(form.device))
        };
        let bytes = sections.all().map(bytes).collect::<Result<Vec<Tensor>, BatchError>>()?;
        Batch::from_bytes(bytes, sections, form)
    }

    /// The bytes of each view, on the form's device.
    fn from_bytes(
        bytes: Vec<Tensor>,
        sections: &Sections<'_>,
        form: Form,
    ) -> Result<Batch, BatchError> {
        let scale = Scale::new(form)?;
        let (n, mut bytes) = (sections.n as i64, bytes.into_iter());
        let groups = sections.groups.iter().map(|group| {
            let edge = group.edge() as i64;
            let view = |bytes: Tensor| {
                let images = scale.apply(&bytes.view([-1, edge, edge, 3]));
                match group.patches() {
                    Some(patches) => images.view([n, patches as i64, 3, edge, edge]),
                    None => images,
                }
            };
            let views = bytes.by_ref().take(group.views.len()).map(view).collect();
            (group.name.to_owned(), views)
        });
        Ok(Batch::new(groups.collect()))
    }

    fn first(&self) -> &Tensor {
        let mut views = self.groups.iter().flat_map(|(_, views)| views);
        views.next().expect("a batch has a view")
    }

    /// Samples, n.
    pub fn len(&self) -> i64 {
        self.first().size()[0]
    }

    /// Where the tensors live.
    pub fn device(&self) -> Device {
        self.first().device()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Makes batch after batch from what holds their bytes, `K`. To a GPU, the bytes of one batch travel
/// while the GPU computes with the one before: from where they lie, on a stream of their own, to two
/// buffers in turn. They are normalised there.
#[derive(Debug)]
pub struct Feeder<K> {
    form: Form,
    lanes: Option<Lanes<K>>,
}

/// Two ways, used in turn: one is filled while the other is read.
#[derive(Debug)]
struct Lanes<K> {
    pair: [Lane<K>; 2],
    next: usize,
}

impl<K> Feeder<K> {
    /// For batches of these sizes.
    ///
    /// # Errors
    /// When the memory for two batches of bytes is not there on the device.
    pub fn new(form: Form, batch_bytes: usize) -> Result<Feeder<K>, BatchError> {
        // On a CPU there is no way to go: a lane would copy once more.
        let lanes =
            if form.device == Device::Cpu { None } else { Some(Lanes::new(form, batch_bytes)?) };
        Ok(Feeder { form, lanes })
    }

    /// Makes a batch from the sections of `keep`, which is kept until its bytes have left it.
    /// `queued` is called when the current stream has been told to wait for the bytes, and nothing
    /// else.
    ///
    /// # Errors
    /// When a section has another length than its shape says, or the device failed.
    ///
    /// # Panics
    /// When the sections are not as long together as the feeder was made for.
    pub fn batch(
        &mut self,
        keep: K,
        sections: impl for<'k> Fn(&'k K) -> Sections<'k>,
        queued: impl FnOnce() -> Result<(), ShimError>,
    ) -> Result<Batch, BatchError> {
        let Some(lanes) = &mut self.lanes else {
            return Batch::from_slab(&sections(&keep), self.form);
        };
        let mut lengths = Vec::new();
        for (bytes, images, edge) in sections(&keep).all() {
            check(bytes, images, edge)?;
            lengths.push(bytes.len() as i64);
        }
        lanes.next = 1 - lanes.next;
        lanes.pair[lanes.next].send(
            keep,
            |kept| sections(kept).all().map(|(bytes, ..)| bytes).collect(),
            |bytes, kept| {
                queued()?;
                Batch::from_bytes(bytes.split_with_sizes(&lengths, 0), &sections(kept), self.form)
            },
        )?
    }

    /// Lets go of what bytes have left; of two that have not, waits for the older, which was sent
    /// before the last batch. So the loader lacks one slab at most.
    ///
    /// # Errors
    /// When the device failed.
    pub fn release(&mut self) -> Result<(), BatchError> {
        let Some(Lanes { pair, next }) = &mut self.lanes else { return Ok(()) };
        pair[1 - *next].settle()?;
        Ok(pair[*next].release()?)
    }
}

impl<K> Lanes<K> {
    fn new(form: Form, bytes: usize) -> Result<Lanes<K>, BatchError> {
        let pair = [Lane::new(form.device, bytes)?, Lane::new(form.device, bytes)?];
        Ok(Lanes { pair, next: 0 })
    }
}

fn check(bytes: &[u8], images: usize, edge: usize) -> Result<(), BatchError> {
    if images.checked_mul(edge * edge * 3) == Some(bytes.len()) {
        return Ok(());
    }
    Err(BatchError::Length { images, edge, found: bytes.len() })
}

/// Bytes `[n, edge, edge, 3]` to normalised floats `[n, 3, edge, edge]` on the device, with
/// torchvision's arithmetic: `(byte / 255 - mean) / std`.
///
/// # Errors
/// When there are more or fewer bytes.
pub fn images(bytes: &[u8], n: usize, edge: usize, device: Device) -> Result<Tensor, BatchError> {
    check(bytes, n, edge)?;
    let (rows, edge) = (n as i64, edge as i64);
    // Bytes travel to the device: a quarter of what floats would be.
    let bytes = Tensor::from_slice(bytes).to_device(device);
    Ok(Scale::new(Form::plain(device))?.apply(&bytes.view([rows, edge, edge, 3])))
}

/// The numbers that pixels are normalised by, `[3, 1, 1]` each on the device.
#[derive(Debug)]
struct Scale {
    form: Form,
    numbers: Numbers,
}

/// torchvision's arithmetic, or the same in a product and a sum.
#[derive(Debug)]
enum Numbers {
    /// `(byte / 255 - mean) / std`.
    Quotients { mean: Tensor, std: Tensor },
    /// `factor * byte + offset`.
    Folded { factor: Tensor, offset: Tensor },
}

impl Scale {
    fn new(form: Form) -> Result<Scale, ShimError> {
        Scale::with(form, form.device.is_cuda() && form.bf16)
    }

    fn with(form: Form, folded: bool) -> Result<Scale, ShimError> {
        let channels = |values: [f32; 3]| {
            let values = Tensor::from_slice(&values).view([3, 1, 1]);
            shim::upload(&values, form.device)
        };
        let numbers = if folded {
            let factor = channels(STD.map(|std| 1.0 / (255.0 * std)))?;
            Numbers::Folded {
                factor,
                offset: channels(std::array::from_fn(|c| -MEAN[c] / STD[c]))?,
            }
        } else {
            Numbers::Quotients { mean: channels(MEAN)?, std: channels(STD)? }
        };
        Ok(Scale { form, numbers })
    }

    /// Bytes `[n, edge, edge, 3]` to `[n, 3, edge, edge]`; all arithmetic in float32.
    fn apply(&self, pixels: &Tensor) -> Tensor {
        let floats = match (&self.numbers, self.form.channels_last) {
            (Numbers::Folded { factor, offset }, _) => self.in_one_pass(pixels, factor, offset),
            (Numbers::Quotients { mean, std }, true) => Scale::channels_last(pixels, mean, std),
            (Numbers::Quotients { mean, std }, false) => self.channels_first(pixels, mean, std),
        };
        if self.form.bf16 { floats.to_kind(Kind::BFloat16) } else { floats }
    }

    /// To bfloat16 without a float in memory, as a GPU's libtorch converts types on its way: the same bits
    /// for every byte as by the quotients, once they are rounded. A CPU's would make floats of all first.
    fn in_one_pass(&self, pixels: &Tensor, factor: &Tensor, offset: &Tensor) -> Tensor {
        let [n, edge] = [pixels.size()[0], pixels.size()[2]];
        let (shape, of) = ([n, edge, edge, 3], (Kind::BFloat16, self.form.device));
        if self.form.channels_last {
            let row = |of: &Tensor| of.flatten(0, -1).repeat([edge]); // [edge * 3]
            let out = Tensor::empty([n * edge, 3 * edge], of);
            let bytes = pixels.view([-1, 3 * edge]);
            let _ = row(offset).addcmul_out(&out, &bytes, &row(factor));
            return out.view(shape).permute([0, 3, 1, 2]);
        }
        let out = Tensor::empty([n, 3, edge, edge], of);
        let _ = offset.addcmul_out(&out, &pixels.permute([0, 3, 1, 2]), factor);
        out
    }

    fn channels_first(&self, pixels: &Tensor, mean: &Tensor, std: &Tensor) -> Tensor {
        let pixels = pixels.permute([0, 3, 1, 2]);
        let mut floats = Tensor::empty(pixels.size(), (Kind::Float, self.form.device));
        floats.copy_(&pixels);
        let mut floats = floats.g_div_scalar_(255.0);
        let mut floats = floats.g_sub_(mean);
        floats.g_div_(std)
    }

    /// Normalised in rows of pixels: a loop over three channels alone is no loop for a vector unit.
    fn channels_last(pixels: &Tensor, mean: &Tensor, std: &Tensor) -> Tensor {
        let (shape, edge) = (pixels.size(), pixels.size()[2]);
        let row = |of: &Tensor| of.flatten(0, -1).repeat([edge]); // [edge * 3]
        let mut floats = pixels.to_kind(Kind::Float).view([-1, 3 * edge]);
        let mut floats = floats.g_div_scalar_(255.0);
        let mut floats = floats.g_sub_(&row(mean));
        floats.g_div_(&row(std)).view(shape.as_slice()).permute([0, 3, 1, 2])
    }
}
