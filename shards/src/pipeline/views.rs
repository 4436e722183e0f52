//! What is rendered of each sample.

use crate::decode::Part;
use crate::limits;
use crate::slab::Layout;
use crate::views::{Recipe, SamplePlan, needed};

/// What is rendered of each sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Views {
    /// The views of a recipe.
    Recipe(Recipe),
    /// No view: the image is decoded and dropped. A batch holds no pixels.
    Decode,
    /// No view and no picture: the image's bytes are read. A batch holds no pixels.
    Read,
}

impl From<Recipe> for Views {
    fn from(recipe: Recipe) -> Views {
        Views::Recipe(recipe)
    }
}

impl Views {
    /// Draws the plan for an image of this width and height, by run seed, epoch and sample.
    pub(crate) fn draw(&self, image: [u32; 2], at: (u64, u32, u64), into: &mut SamplePlan) {
        match self {
            Views::Recipe(recipe) => recipe.draw_into(image, at, into),
            Views::Decode | Views::Read => {}
        }
    }

    /// The part of an image that a plan's views need, at up to this reduction; all of it without views.
    pub(crate) fn part(plan: &SamplePlan, [width, height]: [u32; 2], reduction: u32) -> Part {
        needed(&plan.views, reduction).unwrap_or(Part::whole(width, height))
    }

    /// The layout of a batch of up to `n` samples.
    pub fn layout(&self, n: usize) -> Layout {
        match self {
            Views::Recipe(recipe) => Layout::new(n, recipe.sections()),
            Views::Decode | Views::Read => Layout::new(n, Vec::new()),
        }
    }
}

/// Reads an image's bytes from the disk, so that this wait is counted apart from decoding: one byte of each
/// page, or all bytes if reading is all that is measured.
pub(crate) fn touch(jpeg: &[u8], views: &Views) {
    let page = limits::page_size();
    let sum = match views {
        Views::Read => jpeg.iter().fold(0, |sum, byte| sum ^ byte),
        _ => jpeg.iter().step_by(page).chain(jpeg.last()).fold(0, |sum, byte| sum ^ byte),
    };
    std::hint::black_box(sum);
}
