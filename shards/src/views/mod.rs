//! What the model is shown: draw, then render.
//!
//! A [`Recipe`] says what may be drawn. [`Recipe::draw`] turns it and an address (run seed, epoch,
//! sample) into a [`SamplePlan`]: crop boxes, colour factors and their order, blur radii, flips,
//! patch offsets, permutations. A [`Renderer`] turns pixels and a plan into views and draws nothing:
//! the same plan gives the same bytes on any thread, in any run.
//!
//! Rendering follows Pillow on 8-bit pixels, which is what torchvision does with `PIL` images and
//! what MoCo and DetCo were trained with.

mod blur;
mod color;
mod geometry;
mod numbers;
mod plan;
mod randaugment;
mod recipe;
mod render;

pub use plan::{LocalPlan, Op, Rect, SamplePlan, ViewPlan};
pub use recipe::{
    Blur, ColorStep, Crop, GlobalRecipe, Jitter, LocalRecipe, Photometric, RandAugment, Recipe,
    RecipeError,
};
pub use render::Renderer;
