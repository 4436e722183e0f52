//! What may be drawn: the augmentation recipe and its presets.
//!
//! Defaults are DetCo's (arXiv 2102.04803, section 3.4): MoCo v2's augmentation for the global
//! views, PIRL's 3x3 jigsaw for the local ones with the same colour and blur before the cut.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Patches in a set: a 3x3 grid.
pub(super) const CELLS: u32 = 9;
/// Cells along a side of the grid.
pub(super) const GRID: u32 = 3;
/// Largest side of a view. Slab sizes are products of it, so it is bounded where it enters.
const SIDE_MAX: u32 = 4096;

/// The recipe of all four views of a sample: two global crops and two sets of nine patches.
///
/// Every field has a default, and the default is the DetCo paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The two global views.
    pub global: GlobalRecipe,
    /// The two local views (patch sets). In a file: a table, or `local = false` for none (MoCo).
    #[serde(deserialize_with = "local_or_false", serialize_with = "false_or_local")]
    pub local: Option<LocalRecipe>,
}

/// A global view: random resized crop, colour, blur, flip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GlobalRecipe {
    /// Side of the square view in pixels. DetCo and MoCo: 224.
    pub size: u32,
    /// The random resized crop. DetCo and MoCo: 20 % to 100 % of the image.
    pub crop: Crop,
    /// Colour and blur.
    pub photometric: Photometric,
    /// Probability of a horizontal flip.
    pub flip: f64,
}

/// A local view: the image is cropped, resized, coloured, blurred and flipped as a whole, then cut
/// into a 3x3 grid; from each cell a patch is cut at its own random offset, and the nine patches are
/// put in a random order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LocalRecipe {
    /// Side of the square image that is cut, in pixels; a multiple of 3. DetCo: 255.
    pub size: u32,
    /// Side of a patch in pixels, at most `size / 3`. DetCo: 64, cut from cells of 85.
    pub patch: u32,
    /// The random resized crop. DetCo (after PIRL): 60 % to 100 % of the image.
    pub crop: Crop,
    /// Colour and blur. Absent: the global view's, as in the paper.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub photometric: Option<Photometric>,
    /// Probability of a horizontal flip of the whole image, before the cut.
    pub flip: f64,
}

/// torchvision's `RandomResizedCrop`: ten tries at a box of random area and aspect ratio, then the
/// largest central box whose ratio is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Crop {
    /// Least and largest share of the image's area, uniform.
    pub scale: [f64; 2],
    /// Least and largest width / height, uniform in its logarithm.
    pub ratio: [f64; 2],
}

/// Colour and blur of a view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Photometric {
    /// The steps in the order they are applied; a step left out is never applied.
    /// MoCo v2 and DetCo: jitter, gray, blur. MoCo v1: gray, jitter.
    pub order: Vec<ColorStep>,
    /// Brightness, contrast, saturation and hue, in random order.
    pub jitter: Jitter,
    /// Probability of turning the view gray (three equal channels).
    pub gray: f64,
    /// Gaussian blur.
    pub blur: Blur,
    /// RandAugment; applied where `order` names it.
    pub randaugment: RandAugment,
}

/// A photometric step of a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColorStep {
    /// Brightness, contrast, saturation and hue, in random order.
    Jitter,
    /// Gray.
    Gray,
    /// Gaussian blur.
    Blur,
    /// RandAugment. In the global views' recipe it is theirs alone: local views that take over their
    /// colour and blur leave it out (DetCo).
    RandAugment,
}

/// torchvision's `ColorJitter`, applied with a probability.
///
/// Brightness, contrast and saturation factors are uniform in `[max(0, 1 - x), 1 + x]`, the hue
/// shift is uniform in `[-hue, hue]` turns; the four are applied in random order. A value of 0
/// leaves its operation out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Jitter {
    /// Probability that the view is jittered at all.
    pub probability: f64,
    /// Half width of the brightness factor.
    pub brightness: f64,
    /// Half width of the contrast factor.
    pub contrast: f64,
    /// Half width of the saturation factor.
    pub saturation: f64,
    /// Half width of the hue shift in turns, at most 0.5.
    pub hue: f64,
}

/// Pillow's Gaussian blur, applied with a probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blur {
    /// Probability of a blur.
    pub probability: f64,
    /// Least and largest standard deviation in pixels, uniform.
    pub sigma: [f64; 2],
}

/// RandAugment (Cubuk et al., 2020) with timm's fifteen operations and its noise on the magnitude.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandAugment {
    /// Operations drawn for a view, with replacement.
    pub n: u32,
    /// Magnitude, 0 to 10.
    pub m: f64,
    /// Standard deviation of the magnitude of each operation.
    pub mstd: f64,
    /// Probability that a drawn operation is applied.
    pub probability: f64,
}

impl Default for RandAugment {
    /// timm's `rand-n2-m10-mstd0.5`.
    fn default() -> Self {
        RandAugment { n: 2, m: 10.0, mstd: 0.5, probability: 0.5 }
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe { global: GlobalRecipe::default(), local: Some(LocalRecipe::default()) }
    }
}

impl Default for GlobalRecipe {
    fn default() -> Self {
        GlobalRecipe {
            size: 224,
            crop: Crop { scale: [0.2, 1.0], ..Crop::default() },
            photometric: Photometric::default(),
            flip: 0.5,
        }
    }
}

impl Default for LocalRecipe {
    fn default() -> Self {
        LocalRecipe {
            size: 255,
            patch: 64,
            crop: Crop { scale: [0.6, 1.0], ..Crop::default() },
            photometric: None,
            flip: 0.5,
        }
    }
}

impl Default for Crop {
    /// torchvision's defaults: scale (0.08, 1), ratio (3/4, 4/3).
    fn default() -> Self {
        Crop { scale: [0.08, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0] }
    }
}

impl Default for Photometric {
    fn default() -> Self {
        Photometric {
            order: vec![ColorStep::Jitter, ColorStep::Gray, ColorStep::Blur],
            jitter: Jitter::default(),
            gray: 0.2,
            blur: Blur::default(),
            randaugment: RandAugment::default(),
        }
    }
}

impl Default for Jitter {
    fn default() -> Self {
        Jitter { probability: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1 }
    }
}

impl Default for Blur {
    fn default() -> Self {
        Blur { probability: 0.5, sigma: [0.1, 2.0] }
    }
}

impl Recipe {
    /// DetCo (arXiv 2102.04803, section 3.4) without RandAugment. The default.
    pub fn detco() -> Recipe {
        Recipe::default()
    }

    /// MoCo v2 (`main_moco.py --aug-plus`): DetCo's global views alone.
    pub fn moco_v2() -> Recipe {
        Recipe { local: None, ..Recipe::default() }
    }

    /// MoCo v1: gray before the jitter, which is always applied with hue 0.4; no blur.
    pub fn moco_v1() -> Recipe {
        let photometric = Photometric {
            order: vec![ColorStep::Gray, ColorStep::Jitter],
            jitter: Jitter { probability: 1.0, hue: 0.4, ..Jitter::default() },
            blur: Blur { probability: 0.0, ..Blur::default() },
            ..Photometric::default()
        };
        Recipe { global: GlobalRecipe { photometric, ..GlobalRecipe::default() }, local: None }
    }

    /// A preset by name: `detco`, `moco-v2` or `moco-v1`.
    pub fn preset(name: &str) -> Option<Recipe> {
        match name {
            "detco" => Some(Recipe::detco()),
            "moco-v2" => Some(Recipe::moco_v2()),
            "moco-v1" => Some(Recipe::moco_v1()),
            _ => None,
        }
    }

    /// The names [`Recipe::preset`] knows.
    pub const PRESETS: [&'static str; 3] = ["detco", "moco-v2", "moco-v1"];

    /// The same recipe at another global size; the local sizes shrink with it in the paper's
    /// proportions (255 and 64 for 224), rounded so that the grid still divides the image.
    pub fn with_size(mut self, size: u32) -> Recipe {
        if let Some(local) = &mut self.local {
            let scaled = |side: u32| (side * size + 112) / 224;
            local.size = (scaled(255) / GRID).max(1) * GRID;
            local.patch = scaled(64).clamp(1, local.size / GRID);
        }
        self.global.size = size;
        self
    }

    /// Bytes of one global view, `[size, size, 3]`.
    pub fn global_bytes(&self) -> usize {
        let side = self.global.size as usize;
        side * side * 3
    }

    /// Bytes of one local view, `[9, patch, patch, 3]`; 0 without local views.
    pub fn local_bytes(&self) -> usize {
        self.local.as_ref().map_or(0, |local| {
            let side = local.patch as usize;
            CELLS as usize * side * side * 3
        })
    }

    /// Checks every number of the recipe.
    ///
    /// # Errors
    /// [`RecipeError`] names the first field that is out of range, in the spelling of a recipe file.
    pub fn validate(&self) -> Result<(), RecipeError> {
        let global = &self.global;
        side("global.size", global.size, 1)?;
        global.crop.validate("global.crop")?;
        global.photometric.validate("global.photometric")?;
        within("global.flip", global.flip, 0.0, 1.0)?;
        let Some(local) = &self.local else { return Ok(()) };
        side("local.size", local.size, GRID)?;
        if local.size % GRID != 0 {
            return Err(RecipeError::NotAGrid { size: local.size });
        }
        side("local.patch", local.patch, 1)?;
        if local.patch > local.size / GRID {
            return Err(RecipeError::PatchTooLarge {
                patch: local.patch,
                cell: local.size / GRID,
                size: local.size,
            });
        }
        local.crop.validate("local.crop")?;
        if let Some(photometric) = &local.photometric {
            photometric.validate("local.photometric")?;
        }
        within("local.flip", local.flip, 0.0, 1.0)
    }
}

impl Crop {
    fn validate(&self, field: &str) -> Result<(), RecipeError> {
        // A scale of 0 would draw empty boxes, one above 1 boxes larger than the image.
        let scale = format!("{field}.scale");
        for value in self.scale {
            // Written so that NaN fails too.
            let share = value > 0.0 && value <= 1.0;
            if !share {
                return Err(RecipeError::NotAShare { field: scale, value });
            }
        }
        ordered(&scale, self.scale)?;
        range(&format!("{field}.ratio"), self.ratio, 0.01, 100.0)
    }
}

impl Photometric {
    fn validate(&self, field: &str) -> Result<(), RecipeError> {
        for (at, step) in self.order.iter().enumerate() {
            if self.order[..at].contains(step) {
                return Err(RecipeError::RepeatedStep {
                    field: format!("{field}.order"),
                    step: *step,
                });
            }
        }
        let jitter = &self.jitter;
        within(&format!("{field}.jitter.probability"), jitter.probability, 0.0, 1.0)?;
        within(&format!("{field}.jitter.brightness"), jitter.brightness, 0.0, 10.0)?;
        within(&format!("{field}.jitter.contrast"), jitter.contrast, 0.0, 10.0)?;
        within(&format!("{field}.jitter.saturation"), jitter.saturation, 0.0, 10.0)?;
        within(&format!("{field}.jitter.hue"), jitter.hue, 0.0, 0.5)?;
        within(&format!("{field}.gray"), self.gray, 0.0, 1.0)?;
        within(&format!("{field}.blur.probability"), self.blur.probability, 0.0, 1.0)?;
        range(&format!("{field}.blur.sigma"), self.blur.sigma, 0.0, 100.0)?;
        let randaugment = &self.randaugment;
        within(&format!("{field}.randaugment.n"), f64::from(randaugment.n), 0.0, 100.0)?;
        within(&format!("{field}.randaugment.m"), randaugment.m, 0.0, 10.0)?;
        within(&format!("{field}.randaugment.mstd"), randaugment.mstd, 0.0, 100.0)?;
        within(&format!("{field}.randaugment.probability"), randaugment.probability, 0.0, 1.0)
    }
}

/// A recipe that cannot be drawn from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecipeError {
    /// A number lies outside what is allowed, or is not a number.
    #[error("{field} = {value}: must lie in [{least}, {largest}]")]
    OutOfRange {
        /// The field as a recipe file spells it.
        field: String,
        /// What was given.
        value: f64,
        /// Least allowed value.
        least: f64,
        /// Largest allowed value.
        largest: f64,
    },
    /// A share of an image that is nothing, more than the image, or not a number.
    #[error("{field} = {value:?}: must be above 0 and at most 1")]
    NotAShare {
        /// The field as a recipe file spells it.
        field: String,
        /// What was given.
        value: f64,
    },
    /// A range whose lower end is above its upper end.
    #[error("{field} = [{from}, {to}]: the first must not be above the second")]
    Reversed {
        /// The field as a recipe file spells it.
        field: String,
        /// Given lower end.
        from: f64,
        /// Given upper end.
        to: f64,
    },
    /// The local image cannot be cut into three equal columns.
    #[error("local.size = {size}: must be a multiple of 3 (the grid is 3x3)")]
    NotAGrid {
        /// What was given.
        size: u32,
    },
    /// A patch does not fit into its cell.
    #[error("local.patch = {patch}: must be at most {cell}, a cell of local.size = {size}")]
    PatchTooLarge {
        /// What was given.
        patch: u32,
        /// Side of a cell.
        cell: u32,
        /// Side of the local image.
        size: u32,
    },
    /// A step appears twice.
    #[error("{field}: {step:?} appears twice")]
    RepeatedStep {
        /// The field as a recipe file spells it.
        field: String,
        /// The step.
        step: ColorStep,
    },
}

fn within(field: &str, value: f64, least: f64, largest: f64) -> Result<(), RecipeError> {
    // Written so that NaN fails too.
    if value >= least && value <= largest {
        return Ok(());
    }
    Err(RecipeError::OutOfRange { field: field.to_owned(), value, least, largest })
}

fn range(field: &str, [from, to]: [f64; 2], least: f64, largest: f64) -> Result<(), RecipeError> {
    within(field, from, least, largest)?;
    within(field, to, least, largest)?;
    ordered(field, [from, to])
}

fn ordered(field: &str, [from, to]: [f64; 2]) -> Result<(), RecipeError> {
    if from > to {
        return Err(RecipeError::Reversed { field: field.to_owned(), from, to });
    }
    Ok(())
}

fn side(field: &str, value: u32, least: u32) -> Result<(), RecipeError> {
    within(field, f64::from(value), f64::from(least), f64::from(SIDE_MAX))
}

/// Reads `local = false`, `local = true` or a table. Not an untagged enum: that would replace
/// "unknown field `sise`" by "did not match any variant".
fn local_or_false<'de, D: Deserializer<'de>>(from: D) -> Result<Option<LocalRecipe>, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = Option<LocalRecipe>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table of local view settings, or false")
        }

        fn visit_bool<E>(self, on: bool) -> Result<Self::Value, E> {
            Ok(on.then(LocalRecipe::default))
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            LocalRecipe::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Some)
        }
    }
    from.deserialize_any(Visitor)
}

/// The inverse of [`local_or_false`]: a resolved recipe says `false` where TOML has no null.
fn false_or_local<S: Serializer>(local: &Option<LocalRecipe>, to: S) -> Result<S::Ok, S::Error> {
    match local {
        Some(local) => local.serialize(to),
        None => to.serialize_bool(false),
    }
}
