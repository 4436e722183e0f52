//! Attention maps: where the maps of a backbone are large, as an image of the picture's size, and how much of that
//! lies in boxes.
//!
//! How DetCo's figure 4 was made is not public; this definition is ours. A picture keeps its ratio and goes through the
//! query encoder with running statistics. A map `[c, h, w]` becomes `[h, w]` by a [`Method`], is scaled to 0 to 1 by
//! its own extremes, and enlarged bilinearly. The same is done to all backbones, without any tuning.

use detco_shards::decode::Image;
use detco_shards::views::{Filter, Rect, Renderer};
use serde::Serialize;
use tch::{Device, Kind, TchError, Tensor};

use super::ap::Box4;
use super::pictures::PictureError;

/// Sides of a picture after the resize, in pixels.
pub const SIDE_MAX: u32 = 4096;

/// How the channels of a map become one number a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Their mean (LaFAM).
    Mean,
    /// The sum of their squares (Zagoruyko & Komodakis, ICLR 2017).
    SumSquares,
    /// The projection on the first right singular vector of the map as a matrix `[h w, c]` (Eigen-CAM,
    /// arXiv 2008.00299), its sign such that it goes along with the mean.
    Eigen,
}

/// Where a backbone looks in a picture.
#[derive(Debug)]
pub struct Attention {
    /// Row by row, 0 to 1: all 0 where the map is constant.
    pub values: Vec<f64>,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Whether the map was the same everywhere.
    pub is_constant: bool,
}

impl Method {
    /// `[h, w]` of a map `[c, h, w]`, in float64 on the CPU.
    ///
    /// # Errors
    /// When libtorch refuses: a map of another shape.
    pub fn reduce(self, map: &Tensor) -> Result<Tensor, TchError> {
        let map = map.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let mean = map.f_mean_dim([0].as_slice(), false, Kind::Double)?;
        match self {
            Method::Mean => Ok(mean),
            Method::SumSquares => {
                map.f_square()?.f_sum_dim_intlist([0].as_slice(), false, Kind::Double)
            }
            Method::Eigen => {
                let rows = map.f_flatten(1, -1)?.f_transpose(0, 1)?; // [h w, c]
                let along = first_component(&rows)?.f_view_as(&mean)?;
                let apart = |of: &Tensor| of - of.mean(Kind::Double);
                let turned =
                    (apart(&along) * apart(&mean)).sum(Kind::Double).double_value(&[]) < 0.0;
                Ok(if turned { -along } else { along })
            }
        }
    }
}

/// A matrix `[n, m]` times its first right singular vector, `[n]`, up to the sign.
fn first_component(of: &Tensor) -> Result<Tensor, TchError> {
    let turned = of.f_transpose(0, 1)?;
    let [n, m] = [of.size()[0], of.size()[1]];
    // By the smaller of the two Gram matrices; eigenvalues rise.
    if n < m {
        let (values, vectors) = of.f_matmul(&turned)?.f_linalg_eigh("L")?;
        let length = values.f_select(0, n - 1)?.f_clamp_min(0.0)?.f_sqrt()?;
        vectors.f_select(1, n - 1)?.f_mul(&length)
    } else {
        let (_, vectors) = turned.f_matmul(of)?.f_linalg_eigh("L")?;
        of.f_matmul(&vectors.f_select(1, m - 1)?)
    }
}

/// The attention of a map `[c, h, w]` in a picture of so many pixels.
///
/// # Errors
/// As [`Method::reduce`].
pub fn attention(
    map: &Tensor,
    method: Method,
    [width, height]: [u32; 2],
) -> Result<Attention, TchError> {
    let reduced = method.reduce(map)?;
    let (low, high) = (reduced.f_min()?.double_value(&[]), reduced.f_max()?.double_value(&[]));
    // The extremes of a map that is constant but for rounding are no picture.
    let is_constant = high - low <= 1e-6 * low.abs().max(high.abs());
    let unit = match is_constant {
        true => reduced.f_zeros_like()?,
        false => (reduced - low) / (high - low),
    };
    let side = unit.size();
    let unit = unit.f_view([1, 1, side[0], side[1]])?;
    let size = [i64::from(height), i64::from(width)];
    let large = unit.f_upsample_bilinear2d(size, false, None::<f64>, None::<f64>)?;
    let values = Vec::<f64>::try_from(large.f_flatten(0, -1)?.f_contiguous()?)?;
    Ok(Attention { values, width, height, is_constant })
}

/// What a map has to do with boxes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct InBoxes {
    /// The map's share within boxes.
    pub energy: f64,
    /// The boxes' share of the area.
    pub area: f64,
    /// Whether the maximum lies in a box (the pointing game).
    pub pointed: bool,
    /// The best overlap of a box with where the map is above its mean: intersection over union.
    pub iou: f64,
}

impl InBoxes {
    /// Energy over area: 1 is chance.
    pub fn ratio(&self) -> f64 {
        self.energy / self.area
    }
}

impl Attention {
    /// Compares with boxes `[left, top, width, height]` in pixels of this map; a pixel is in a box if its centre is.
    /// None for a constant map, or where no pixel is in a box.
    pub fn in_boxes(&self, boxes: &[Box4]) -> Option<InBoxes> {
        let width = self.width as usize;
        let inside = |[left, top, w, h]: &Box4, at: usize| {
            let (x, y) = ((at % width) as f64 + 0.5, (at / width) as f64 + 0.5);
            (*left..left + w).contains(&x) && (*top..top + h).contains(&y)
        };
        let all = self.values.len();
        let covered: Vec<bool> =
            (0..all).map(|at| boxes.iter().any(|one| inside(one, at))).collect();
        let count = covered.iter().filter(|one| **one).count();
        let total: f64 = self.values.iter().sum();
        if self.is_constant || count == 0 || total <= 0.0 {
            return None;
        }
        let within = self.values.iter().zip(&covered).filter(|(_, covered)| **covered);
        let energy = within.map(|(value, _)| value).sum::<f64>() / total;
        let top =
            (0..all).fold(0, |top, at| if self.values[at] > self.values[top] { at } else { top });
        let mean = total / all as f64;
        let overlap = |one: &Box4| {
            let (mut both, mut either) = (0_usize, 0_usize);
            for (at, value) in self.values.iter().enumerate() {
                let (bright, inside) = (*value >= mean, inside(one, at));
                both += usize::from(bright && inside);
                either += usize::from(bright || inside);
            }
            both as f64 / either.max(1) as f64
        };
        Some(InBoxes {
            energy,
            area: count as f64 / all as f64,
            pointed: covered[top],
            iou: boxes.iter().map(overlap).fold(0.0, f64::max),
        })
    }
}

/// A picture of another size: bytes `[height, width, 3]`.
#[derive(Debug)]
pub struct Resized {
    /// The pixels.
    pub pixels: Vec<u8>,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

/// Resizes a picture to a short side of `short` pixels as Pillow does it, its ratio kept as torchvision's `Resize`
/// keeps it. None where the long side would be above [`SIDE_MAX`].
pub fn resized(image: &Image, short: u32, renderer: &mut Renderer) -> Option<Resized> {
    let [least, most] = [image.width.min(image.height), image.width.max(image.height)];
    let long = u64::from(short) * u64::from(most) / u64::from(least.max(1));
    let long = u32::try_from(long).ok().filter(|long| (*long).max(short) <= SIDE_MAX)?;
    let [width, height] = if image.width <= image.height { [short, long] } else { [long, short] };
    let mut pixels = vec![0; (width * height * 3) as usize];
    let whole = Rect { left: 0, top: 0, width: image.width, height: image.height };
    renderer.resize(image, whole, Filter::Bilinear, [width, height], &mut pixels);
    Some(Resized { pixels, width, height })
}

/// Maps of Res2..Res5 of a resized picture, `[c, h', w']` each.
///
/// # Errors
/// When libtorch fails.
pub fn maps(
    encoder: &crate::model::Encoder,
    picture: &Resized,
) -> Result<Vec<Tensor>, PictureError> {
    let device = super::features::device_of(encoder);
    let shape = [i64::from(picture.height), i64::from(picture.width), 3];
    let pixels = Tensor::f_from_slice(&picture.pixels)?.f_view(shape)?.f_to_device(device)?;
    let numbers = |values: [f32; 3]| Tensor::from_slice(&values).to_device(device);
    let (mean, std) = (numbers(crate::batch::MEAN), numbers(crate::batch::STD));
    let pixels = (pixels.f_to_kind(Kind::Float)? / 255.0 - mean) / std;
    let pixels = pixels.f_permute([2, 0, 1])?.f_unsqueeze(0)?.f_contiguous()?;
    Ok(encoder.maps(&pixels)?.into_iter().map(|map| map.squeeze_dim(0)).collect())
}
