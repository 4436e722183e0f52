//! What a composite scene is made of, drawn from its address alone.

use serde::Serialize;

use crate::draws::Draws;

/// Edge of the pictures that are pasted, before they are enlarged: CIFAR's.
pub const OBJECT: u32 = 32;

/// Cells along a side that a distractor's blocks are shuffled by.
const BLOCKS: usize = 4;

/// Tries at a place that overlaps little enough with the places before.
const TRIES: usize = 20;

/// What may be drawn for a scene.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rules {
    /// Edge of the scene in pixels.
    pub size: u32,
    /// Least and largest side of what is pasted, in pixels; uniform in the logarithm.
    pub sides: [u32; 2],
    /// Targets of a scene: 1 to so many.
    pub targets_max: u32,
    /// Whether as many pastes come that are no targets: shuffled pictures and patches of photos.
    pub distractors: bool,
    /// Largest |ln(width / height)| of a paste's ratio before rounding, halved for each side; uniform.
    pub ratio: f64,
    /// Largest overlap of two pastes, in areas of the smaller one.
    pub overlap: f64,
    /// Widths of the seam over which a paste fades in, in pixels; one is drawn for each paste.
    pub seams: [u32; 3],
}

impl Rules {
    /// The prototype's, for scenes of this edge: its sides are a quarter and three quarters of 128 pixels.
    pub fn of_size(size: u32) -> Rules {
        Rules {
            size,
            sides: [size / 4, size * 3 / 4],
            targets_max: 3,
            distractors: true,
            ratio: 0.3,
            overlap: 0.3,
            seams: [0, 2, 4],
        }
    }

    /// Edge of the photos that are cut: room for crops of the scene's size and larger ones.
    pub fn photo(&self) -> u32 {
        self.size * 7 / 4
    }
}

/// A square of a photo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// Number of the photo.
    pub photo: usize,
    /// Its left edge.
    pub left: u32,
    /// Its upper edge.
    pub top: u32,
    /// Its side.
    pub side: u32,
}

/// What is pasted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A target: the object of this number.
    Object(usize),
    /// An object whose 4 x 4 blocks are in this order.
    Shuffled(usize, Vec<i64>),
    /// A part of a photo.
    Patch(Cut),
}

/// A paste.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Paste {
    /// Left, top, right and bottom edge in the scene, in pixels.
    pub corners: [u32; 4],
    /// What it shows.
    pub what: What,
    /// Whether left and right are exchanged.
    pub flip: bool,
    /// Pixels over which it fades in from its edges.
    pub seam: u32,
}

/// A scene: its background, then its pastes in the order in which they are pasted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// The part of a photo behind everything.
    pub background: Cut,
    /// The edge that it is reduced to, before it is enlarged to the scene's: its sharpness is then that of the pastes,
    /// and tells nothing.
    pub reduced: u32,
    /// Targets and distractors.
    pub pastes: Vec<Paste>,
}

/// Of how many pictures a scene may show.
#[derive(Clone, Copy, Debug)]
pub struct Stock {
    /// Objects.
    pub objects: usize,
    /// Photos.
    pub photos: usize,
}

impl Layout {
    /// Draws a scene. The same address gives the same scene on any machine, whoever drew others before.
    ///
    /// # Panics
    /// Where a stock is empty.
    pub fn draw(rules: &Rules, stock: Stock, (seed, split): (u64, &str), index: u64) -> Layout {
        let mut draw = Draws::new(seed, split, index);
        let size = rules.size;
        let [least, most] = rules.sides.map(f64::from);
        let object = f64::from(OBJECT);
        let enlargement = log_uniform(&mut draw, least / object, most / object).max(1.0);
        let reduced = (f64::from(size) / enlargement).round_ties_even() as u32;
        let background = cut(&mut draw, rules, stock, [size, rules.photo()]);
        let targets = 1 + draw.below(u64::from(rules.targets_max)) as usize;
        let count = if rules.distractors { 2 * targets } else { targets };
        let mut places: Vec<([u32; 4], bool)> = Vec::with_capacity(count);
        for number in 0..count {
            let side = log_uniform(&mut draw, least, most);
            let ratio = (rules.ratio * (2.0 * draw.unit() - 1.0)).exp().sqrt();
            let [width, height] = [side * ratio, side / ratio]
                .map(|side| (side.round_ties_even() as u32).clamp(rules.sides[0], rules.sides[1]));
            let place = (0..TRIES).find_map(|_| {
                let [left, top] =
                    [width, height].map(|side| draw.below(u64::from(size - side) + 1) as u32);
                let corners = [left, top, left + width, top + height];
                let fits =
                    |(other, _): &([u32; 4], bool)| overlap(corners, *other) <= rules.overlap;
                places.iter().all(fits).then_some(corners)
            });
            // Where nothing fits there is one paste less.
            places.extend(place.map(|corners| (corners, number < targets)));
        }
        let order = draw.permutation(places.len());
        let pastes = order.into_iter().map(|place| {
            let (corners, is_target) = places[place as usize];
            let what = if is_target {
                What::Object(draw.below(stock.objects as u64) as usize)
            } else if draw.unit() < 0.5 {
                let object = draw.below(stock.objects as u64) as usize;
                What::Shuffled(object, draw.permutation(BLOCKS * BLOCKS))
            } else {
                What::Patch(cut(&mut draw, rules, stock, [size * 5 / 16, size * 5 / 4]))
            };
            let flip = draw.unit() < 0.5;
            let seam = rules.seams[draw.below(rules.seams.len() as u64) as usize];
            Paste { corners, what, flip, seam }
        });
        let pastes = pastes.collect();
        Layout { background, reduced: reduced.clamp(16.min(size), size), pastes }
    }
}

/// Uniform in the logarithm.
fn log_uniform(draw: &mut Draws, least: f64, most: f64) -> f64 {
    (least.ln() + (most / least).ln() * draw.unit()).exp()
}

/// A square of a photo whose side is in these bounds, both included.
fn cut(draw: &mut Draws, rules: &Rules, stock: Stock, [least, most]: [u32; 2]) -> Cut {
    let photo = draw.below(stock.photos as u64) as usize;
    let side = least + draw.below(u64::from(most - least) + 1) as u32;
    let [top, left] = [(); 2].map(|()| draw.below(u64::from(rules.photo() - side) + 1) as u32);
    Cut { photo, left, top, side }
}

/// Area that two boxes share, in areas of the smaller one.
pub fn overlap(a: [u32; 4], b: [u32; 4]) -> f64 {
    let along =
        |axis: usize| f64::from(a[axis + 2].min(b[axis + 2]).saturating_sub(a[axis].max(b[axis])));
    let area = |of: [u32; 4]| f64::from(of[2] - of[0]) * f64::from(of[3] - of[1]);
    along(0) * along(1) / area(a).min(area(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_of_the_smaller() {
        assert_eq!(overlap([0, 0, 4, 4], [2, 2, 4, 4]), 1.0);
        assert_eq!(overlap([0, 0, 4, 4], [2, 0, 6, 4]), 0.5);
        assert_eq!(overlap([0, 0, 4, 4], [4, 0, 8, 4]), 0.0);
    }
}
