//! Views: drawn from the sample's identity, then rendered.
//!
//! A [`Recipe`] is a list of groups of views and says what may be drawn for them. [`Recipe::draw`]
//! turns it and an address (run seed, epoch, sample) into a [`SamplePlan`]: for each view its crop box,
//! operations with their numbers and order, flip, patches and permutation. A [`Renderer`] turns pixels
//! and a plan into views and draws nothing: the same plan gives the same bytes on any thread, in any
//! run.
//!
//! Rendering follows Pillow on 8-bit pixels, which is what torchvision does with `PIL` images and
//! what MoCo and DetCo were trained with.

use std::ffi::OsStr;

#[cfg(target_arch = "x86_64")]
mod avx2;
mod blur;
mod color;
mod crop;
#[cfg(feature = "cuda")]
pub mod cuda;
mod geometry;
mod grid;
mod plan;
mod planes;
mod presets;
mod randaugment;
mod recipe;
mod render;
mod rng;
mod step;
mod valid;

pub use crate::layout::Note;
pub use crop::{Crop, Filter, Region};
pub use grid::{Grid, Shuffle, permutations};
pub use plan::{GridPlan, Op, REDUCTIONS, Rect, SamplePlan, ViewPlan, needed};
pub use presets::IMAGE;
pub use recipe::{Group, Recipe};
pub use render::Renderer;
pub use step::{RandAugment, Step, Steps};
pub use valid::RecipeError;

/// ImageNet's channel means, of bytes / 255: what torchvision normalises with.
pub const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's channel deviations.
pub const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// The instructions used for rendering.
#[derive(Debug, Clone, Copy)]
enum Vectors {
    /// Plain loops, for every CPU.
    Plain,
    /// The most used operations in AVX2 by hand.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
}

/// The variable that holds [`Renderer::new`] to `plain` loops or to `avx2`. The bytes are the same.
const HELD: &str = "DETCO_SIMD";

/// The variable `DETCO_SIMD` names no instructions that views can be rendered with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("DETCO_SIMD={value}: expected plain, or avx2 on a processor that has it")]
pub struct SimdError {
    /// What it says.
    pub value: String,
}

/// Checks the variable `DETCO_SIMD`, which [`Renderer::new`] does not follow where it is wrong.
///
/// # Errors
/// When it names no instructions, or those that this processor lacks.
pub fn check_simd() -> Result<(), SimdError> {
    match std::env::var_os(HELD) {
        Some(name) if Vectors::named(&name).is_none() => {
            Err(SimdError { value: name.to_string_lossy().into_owned() })
        }
        _ => Ok(()),
    }
}

impl Vectors {
    /// What the variable holds views to, else the best that this CPU has.
    fn detect() -> Vectors {
        let held = std::env::var_os(HELD).and_then(|name| Vectors::named(&name));
        held.or_else(|| Vectors::named("avx2".as_ref())).unwrap_or(Vectors::Plain)
    }

    /// By name, where the CPU has them.
    fn named(name: &OsStr) -> Option<Vectors> {
        match name.to_str() {
            Some("plain") => Some(Vectors::Plain),
            #[cfg(target_arch = "x86_64")]
            Some("avx2") => avx2::Avx2::detect().map(Vectors::Avx2),
            _ => None,
        }
    }
}
