//! Plans: every drawn number that rendering needs, and nothing else.

use serde::{Deserialize, Serialize};

use super::crop::Filter;
use super::recipe::Recipe;
use super::rng::Rng;
use crate::decode::Part;
pub use crate::decode::Rect;
use crate::layout::Note;

/// One operation with its drawn number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Blend with black: factor 0 is black, 1 the image.
    Brightness(f32),
    /// Blend with the image's mean gray: factor 0 is flat, 1 the image.
    Contrast(f32),
    /// Blend with the image's gray: factor 0 is gray, 1 the image.
    Saturation(f32),
    /// Shift of the hue in turns, in [-0.5, 0.5].
    Hue(f32),
    /// Three equal channels of luma.
    Gray,
    /// Gaussian blur with this standard deviation in pixels.
    Blur(f32),
    /// Stretch each channel to 0..=255.
    AutoContrast,
    /// Even out each channel's histogram.
    Equalize,
    /// 255 minus the value.
    Invert,
    /// Keep this many high bits, 0 to 8.
    Posterize(u8),
    /// Invert values from this threshold on, 0 to 256.
    Solarize(u16),
    /// Add to values below 128.
    SolarizeAdd(u8),
    /// Exchange left and right.
    Flip,
    /// Blend with the smoothed image: factor 0 is smooth, 1 the image.
    Sharpness(f32),
    /// Fetch pixel (x, y) from `matrix` * (x + 1/2, y + 1/2, 1); grey outside the image.
    Affine {
        /// Two rows of three: input x, then input y, in pixels.
        matrix: [f64; 6],
        /// Bicubic instead of bilinear interpolation.
        bicubic: bool,
    },
}

/// Everything drawn for one view.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ViewPlan {
    /// Side of the view in pixels; with a grid, of the image that is cut, a multiple of its cells.
    pub size: u32,
    /// Width and height of the image.
    pub picture: [u32; 2],
    /// Width and height that the whole image is resized to before the crop, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resized: Option<[u32; 2]>,
    /// How pixels are weighed in a resize.
    #[serde(default)]
    pub filter: Filter,
    /// The box that is resized to `size` x `size`: of the image, or of what it was resized to.
    pub crop: Rect,
    /// The operations, in order.
    pub ops: Vec<Op>,
    /// Exchange left and right, after the operations.
    pub flip: bool,
    /// The patches it is cut into, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<GridPlan>,
    /// Counter-clockwise quarter turns, 0 to 3, which the reader of the view applies.
    #[serde(default)]
    pub rotation: u8,
}

/// The patches of a view.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GridPlan {
    /// Cells along a side.
    pub cells: u32,
    /// Side of a patch in pixels.
    pub patch: u32,
    /// For each cell, row by row: the patch's left and top edge within its cell.
    pub offsets: Vec<[u32; 2]>,
    /// Slot `i` of the output holds the patch of cell `order[i]`: a permutation of the cells.
    pub order: Vec<u8>,
    /// Which permutation of its set it is, where it was drawn from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permutation: Option<u32>,
}

/// Everything drawn for one sample in one epoch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplePlan {
    /// The views of all groups, in the recipe's order.
    pub views: Vec<ViewPlan>,
}

impl ViewPlan {
    /// Bytes of the view: `size * size * 3`, or those of its patches.
    pub fn bytes(&self) -> usize {
        let (images, side) =
            self.grid.as_ref().map_or((1, self.size), |grid| (grid.order.len(), grid.patch));
        images * side as usize * side as usize * 3
    }

    /// The part of the image that rendering reads, and the short side of what it is resized to first.
    fn looked_at(&self) -> (Rect, u32) {
        match self.resized {
            None => (self.crop, self.size),
            Some([width, height]) => (self.whole(), width.min(height)),
        }
    }

    /// All of the image.
    pub(super) fn whole(&self) -> Rect {
        let [width, height] = self.picture;
        Rect { left: 0, top: 0, width, height }
    }
}

/// The reductions a picture may be decoded at, and how many of its pixels along each side a pixel of
/// a view must at least be made of for it: three decoded ones at 1/2, four at 1/4.
///
/// So no view of a photograph was further than 0.84 levels of 255 on average from that of the whole
/// picture, colour and blur included, where a level is allowed. With two decoded ones it would be
/// 1.2 before colour; at 1/8 hardly a photo has so many (`benches/record/2026-11-23-scale.md`). That was
/// measured for bilinear resizes; of a picture for bicubic ones all pixels are decoded.
pub const REDUCTIONS: [(u32, u32); 2] = [(2, 6), (4, 16)];

/// The region of interest of views: the smallest box around their crops, and the largest
/// reduction, of those up to `reduction_max`, that [`REDUCTIONS`] allows for the shorter side of
/// each. `None` without views.
pub fn needed<'a>(
    views: impl IntoIterator<Item = &'a ViewPlan>,
    reduction_max: u32,
) -> Option<Part> {
    let mut reduction = reduction_max;
    let boxes = views.into_iter().map(|view| {
        let (area, side) = view.looked_at();
        let short = u64::from(area.width.min(area.height));
        let allowed = REDUCTIONS.iter().rfind(|(reduction, ratio)| {
            let measured = view.filter == Filter::Bilinear;
            measured && *reduction <= reduction_max && short >= u64::from(side) * u64::from(*ratio)
        });
        reduction = reduction.min(allowed.map_or(1, |allowed| allowed.0));
        area
    });
    let area = boxes.reduce(|all, one| all.union(&one))?;
    Some(Part { area, reduction })
}

impl Recipe {
    /// Draws the views of `sample` (of `width` x `height` pixels, both at least 1) in `epoch` of the
    /// run with this `seed`. Each view has a random stream of its own.
    ///
    /// Numbers follow torchvision's distributions: `RandomResizedCrop`, `ColorJitter`,
    /// `RandomGrayscale`, `RandomHorizontalFlip`, `RandomSolarize`; blur as in MoCo v2. The recipe is
    /// expected to be [valid](Recipe::validate).
    pub fn draw(&self, width: u32, height: u32, seed: u64, epoch: u32, sample: u64) -> SamplePlan {
        let mut plan = SamplePlan::default();
        self.draw_into([width, height], (seed, epoch, sample), &mut plan);
        plan
    }

    /// [`Recipe::draw`] into a plan whose memory is used again. The image's width and height; run
    /// seed, epoch, sample.
    pub fn draw_into(
        &self,
        image: [u32; 2],
        (seed, epoch, sample): (u64, u32, u64),
        into: &mut SamplePlan,
    ) {
        let [width, height] = image;
        assert!(width > 0 && height > 0, "an image of {width}x{height} has no views");
        into.views.resize_with(self.views(), ViewPlan::default);
        let groups = self.groups.iter().flat_map(|group| (0..group.count).map(move |_| group));
        // A view's place in the list is part of the address of every number drawn for it.
        for ((stream, group), view) in (0..).zip(groups).zip(&mut into.views) {
            let mut rng = Rng::at(seed, epoch, sample, stream);
            view.size = group.size;
            view.ops.clear();
            view.flip = false;
            group.crop.draw(image, &mut rng, view);
            for step in self.steps(group) {
                step.draw(group.size, view, &mut rng);
            }
            match &group.grid {
                None => view.grid = None,
                Some(grid) => {
                    grid.draw(group.size, &mut rng, view.grid.get_or_insert_default());
                }
            }
            view.rotation = if group.rotate { rng.below(4) as u8 } else { 0 };
        }
    }
}

impl Note {
    /// Of a view.
    pub fn of(view: &ViewPlan) -> Note {
        Note {
            picture: view.resized.unwrap_or(view.picture),
            crop: view.crop,
            flip: view.flip ^ view.ops.contains(&Op::Flip),
            rotation: view.rotation,
            permutation: view.grid.as_ref().and_then(|grid| grid.permutation),
        }
    }
}
