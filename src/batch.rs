//! Slab to tensors: the only place where bytes become tensors.

use tch::{Device, Kind, Tensor};
use thiserror::Error;

use crate::config::Config;
use crate::device;
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

/// The sections of a slab that a batch of n samples is made of.
#[derive(Clone, Copy, Debug)]
pub struct Sections<'a> {
    /// Two of `[n, size, size, 3]` bytes.
    pub global: [&'a [u8]; 2],
    /// Two of `[n, 9, patch, patch, 3]` bytes.
    pub local: Option<[&'a [u8]; 2]>,
    /// Samples.
    pub n: usize,
    /// Edge of a crop in pixels.
    pub size: usize,
    /// Edge of a patch in pixels.
    pub patch: usize,
}

impl<'a> Sections<'a> {
    /// All of them, crops first, and the number and edge of the images in each.
    fn all(&self) -> impl Iterator<Item = (&'a [u8], usize, usize)> {
        let (n, size, patch) = (self.n, self.size, self.patch);
        let crops = self.global.into_iter().map(move |bytes| (bytes, n, size));
        let patches = self.local.into_iter().flatten();
        crops.chain(patches.map(move |bytes| (bytes, 9 * n, patch)))
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

/// What the encoders see in one step: two renditions of the same n samples.
#[derive(Debug)]
pub struct Batch {
    /// Crops `[n, 3, h, w]`, normalised: for the query encoder and for the key encoder.
    pub global: [Tensor; 2],
    /// Patches `[n, 9, 3, p, p]`, normalised: for the query encoder and for the key encoder.
    pub local: Option<[Tensor; 2]>,
}

impl Batch {
    /// Copies the sections of a slab and waits until they are copied.
    ///
    /// # Errors
    /// When a section has another length.
    pub fn from_slab(sections: Sections<'_>, form: Form) -> Result<Batch, BatchError> {
        let bytes = |(bytes, images, edge)| -> Result<Tensor, BatchError> {
            check(bytes, images, edge)?;
            Ok(Tensor::from_slice(bytes).to_device(form.device))
        };
        let bytes = sections.all().map(bytes).collect::<Result<Vec<Tensor>, BatchError>>()?;
        Batch::from_bytes(bytes, sections, form)
    }

    /// The bytes of each section, on the form's device.
    fn from_bytes(
        bytes: Vec<Tensor>,
        sections: Sections<'_>,
        form: Form,
    ) -> Result<Batch, BatchError> {
        let scale = Scale::new(form)?;
        let mut images = bytes.into_iter().zip(sections.all()).map(|(bytes, (_, images, edge))| {
            let (images, edge) = (images as i64, edge as i64);
            scale.apply(&bytes.view([images, edge, edge, 3]))
        });
        let mut next = || images.next().expect("sections are as many as their bytes");
        let global = [next(), next()];
        let local = sections.local.map(|_| {
            let (n, p) = (sections.n as i64, sections.patch as i64);
            [next(), next()].map(|patches| patches.view([n, 9, 3, p, p]))
        });
        Ok(Batch { global, local })
    }

    /// Samples, n.
    pub fn len(&self) -> i64 {
        self.global[0].size()[0]
    }

    /// Where the tensors live.
    pub fn device(&self) -> Device {
        self.global[0].device()
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
        sections: impl Fn(&K) -> Sections<'_>,
        queued: impl FnOnce() -> Result<(), ShimError>,
    ) -> Result<Batch, BatchError> {
        let Some(lanes) = &mut self.lanes else {
            return Batch::from_slab(sections(&keep), self.form);
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
                Batch::from_bytes(bytes.split_with_sizes(&lengths, 0), sections(kept), self.form)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_channels_first_normalised_floats() {
        let bytes: Vec<u8> = (0..2 * 4 * 4 * 3).map(|i| (i * 37 % 256) as u8).collect();
        let x = images(&bytes, 2, 4, Device::Cpu).unwrap();
        assert_eq!(x.size(), [2, 3, 4, 4]);
        assert!(x.is_contiguous());
        for (n, c, y, column) in [(0, 0, 0, 0), (0, 2, 3, 1), (1, 1, 2, 3), (1, 2, 3, 3)] {
            let byte = bytes[((n * 4 + y) * 4 + column) * 3 + c];
            let expected = (f32::from(byte) / 255.0 - MEAN[c]) / STD[c];
            let found = x.double_value(&[n as i64, c as i64, y as i64, column as i64]) as f32;
            assert_eq!(found, expected, "{n} {c} {y} {column}");
        }
    }

    #[test]
    fn patches_of_a_sample_stay_together() {
        let crops = [0_u8; 2 * 8 * 8 * 3];
        let patch = |n: usize, i: usize| vec![(n * 9 + i) as u8; 2 * 2 * 3];
        let patches: Vec<u8> = (0..2).flat_map(|n| (0..9).flat_map(move |i| patch(n, i))).collect();
        let (global, local) = ([&crops[..]; 2], Some([&patches[..]; 2]));
        let sections = Sections { global, local, n: 2, size: 8, patch: 2 };
        let batch = Batch::from_slab(sections, Form::plain(Device::Cpu)).unwrap();
        let [query, _] = batch.local.unwrap();
        assert_eq!(query.size(), [2, 9, 3, 2, 2]);
        let value = query.double_value(&[1, 4, 0, 1, 1]) as f32;
        assert_eq!(value, (13.0 / 255.0 - MEAN[0]) / STD[0]);
    }

    #[test]
    fn a_short_section_is_refused() {
        let error = images(&[0; 47], 1, 4, Device::Cpu).unwrap_err();
        assert!(matches!(error, BatchError::Length { images: 1, edge: 4, found: 47 }));
        assert!(images(&[], usize::MAX, 4, Device::Cpu).is_err());
    }

    fn bytes(length: usize, seed: usize) -> Vec<u8> {
        (0..length).map(|i| ((i + seed) * 37 % 251) as u8).collect()
    }

    #[test]
    fn a_form_changes_where_channels_lie_and_how_far_pixels_are_rounded() {
        let (crops, patches) = (bytes(2 * 8 * 8 * 3, 0), bytes(2 * 9 * 4 * 4 * 3, 5));
        let (global, local) = ([&crops[..]; 2], Some([&patches[..]; 2]));
        let sections = Sections { global, local, n: 2, size: 8, patch: 4 };
        let plain = Batch::from_slab(sections, Form::plain(Device::Cpu)).unwrap();
        for (channels_last, bf16) in [(true, false), (false, true), (true, true)] {
            let form = Form { device: Device::Cpu, channels_last, bf16 };
            let batch = Batch::from_slab(sections, form).unwrap();
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let pairs =
                [(&plain.global[0], &batch.global[0]), (&plain.global[1], &batch.global[1])];
            let locals = plain.local.iter().flatten().zip(batch.local.iter().flatten());
            for (plain, formed) in pairs.into_iter().chain(locals) {
                assert!(formed.equal(&plain.to_kind(kind)));
                assert_eq!(device::is_channels_last(formed), channels_last);
                assert!(!device::is_channels_last(plain));
            }
        }
    }

    /// Every byte in every channel: as by the quotients, to the bit.
    #[test]
    fn one_pass_to_bfloat16_is_what_the_quotients_round_to() {
        let bytes: Vec<u8> = (0..768).map(|i| ((i / 3) % 256) as u8).collect();
        let pixels = Tensor::from_slice(&bytes).view([1, 16, 16, 3]);
        for channels_last in [false, true] {
            let form = Form { device: Device::Cpu, channels_last, bf16: true };
            let apply = |folded| Scale::with(form, folded).unwrap().apply(&pixels);
            let (once, plain) = (apply(true), apply(false));
            assert_eq!((once.kind(), once.size()), (Kind::BFloat16, plain.size()));
            assert_eq!(device::is_channels_last(&once), channels_last);
            assert!(once.equal(&plain));
        }
    }

    /// Two views' crops, and two views' patches.
    type Kept = std::sync::Arc<([Vec<u8>; 2], [Vec<u8>; 2])>;

    fn sections(kept: &Kept) -> Sections<'_> {
        let (crops, patches) = &**kept;
        let [global, local] = [crops, patches].map(|views| views.each_ref().map(Vec::as_slice));
        Sections { global, local: Some(local), n: 2, size: 8, patch: 4 }
    }

    /// The way to a GPU, with both of its ends on the CPU.
    #[test]
    fn batches_through_lanes_are_those_made_at_once() {
        let form = Form { device: Device::Cpu, channels_last: true, bf16: false };
        let length = 2 * (2 * 8 * 8 * 3 + 2 * 9 * 4 * 4 * 3);
        let mut feeder = Feeder { form, lanes: Some(Lanes::new(form, length).unwrap()) };
        for seed in 0..5 {
            let crops = [bytes(2 * 8 * 8 * 3, seed), bytes(2 * 8 * 8 * 3, seed + 90)];
            let patches = [bytes(2 * 9 * 4 * 4 * 3, seed), bytes(2 * 9 * 4 * 4 * 3, seed + 90)];
            let keep = std::sync::Arc::new((crops, patches));
            let at_once = Batch::from_slab(sections(&keep), form).unwrap();
            let watch = std::sync::Arc::downgrade(&keep);
            let through = feeder.batch(keep, sections, || Ok(())).unwrap();
            assert!(watch.upgrade().is_some(), "kept until it is asked for");
            feeder.release().unwrap();
            assert!(watch.upgrade().is_none(), "its bytes have left");
            for view in 0..2 {
                assert!(through.global[view].equal(&at_once.global[view]), "{seed} {view}");
                let local = |batch: &Batch| batch.local.as_ref().unwrap()[view].shallow_clone();
                assert!(local(&through).equal(&local(&at_once)), "{seed} {view}");
            }
        }
    }
}
