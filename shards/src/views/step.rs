//! Augmentation steps after the crop: a list, each with its probability.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::plan::{Op, ViewPlan};
use super::rng::Rng;
use super::valid::{RecipeError, range, within};

/// One step. In a file: `{ step = "gray", p = 0.2 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "lowercase", deny_unknown_fields)]
pub enum Step {
    /// Brightness, contrast, saturation and hue, in random order (torchvision's `ColorJitter`).
    ///
    /// The factors of the first three are uniform in `[max(0, 1 - x), 1 + x]`, the hue's shift is
    /// uniform in `[-hue, hue]` turns. A value of 0 leaves its operation out.
    Jitter {
        /// Probability that the view is jittered at all.
        p: f64,
        /// Half width of the brightness factor.
        brightness: f64,
        /// Half width of the contrast factor.
        contrast: f64,
        /// Half width of the saturation factor.
        saturation: f64,
        /// Half width of the hue shift in turns, at most 0.5.
        hue: f64,
    },
    /// Gray: three equal channels of luma.
    Gray {
        /// Its probability.
        p: f64,
    },
    /// Pillow's Gaussian blur.
    Blur {
        /// Its probability.
        p: f64,
        /// Least and largest standard deviation in pixels, uniform.
        sigma: [f64; 2],
    },
    /// Values from the threshold on are inverted (torchvision's `RandomSolarize`).
    Solarize {
        /// Its probability.
        p: f64,
        /// The threshold, 0 to 256.
        #[serde(default = "half")]
        threshold: u16,
    },
    /// Left and right are exchanged.
    Flip {
        /// Its probability.
        p: f64,
    },
    /// RandAugment (Cubuk et al., 2020) with timm's fifteen operations and its noise on the
    /// magnitude.
    RandAugment(RandAugment),
}

fn half() -> u16 {
    128
}

/// See [`Step::RandAugment`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandAugment {
    /// Probability that a drawn operation is applied.
    pub p: f64,
    /// Operations drawn for a view, with replacement.
    pub n: u32,
    /// Magnitude, 0 to 10.
    pub m: f64,
    /// Standard deviation of the magnitude of each operation.
    pub mstd: f64,
}

impl Default for RandAugment {
    /// timm's `rand-n2-m10-mstd0.5`.
    fn default() -> Self {
        RandAugment { p: 0.5, n: 2, m: 10.0, mstd: 0.5 }
    }
}

/// The steps of a group: its own, or another's. In a file: a list, or the other's name.
#[derive(Debug, Clone, PartialEq)]
pub enum Steps {
    /// In order.
    Own(Vec<Step>),
    /// Those of the group of this name, drawn anew.
    Of(String),
}

impl Default for Steps {
    fn default() -> Self {
        Steps::Own(Vec::new())
    }
}

impl From<Vec<Step>> for Steps {
    fn from(steps: Vec<Step>) -> Steps {
        Steps::Own(steps)
    }
}

impl Step {
    /// Its name in a file.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Jitter { .. } => "jitter",
            Step::Gray { .. } => "gray",
            Step::Blur { .. } => "blur",
            Step::Solarize { .. } => "solarize",
            Step::Flip { .. } => "flip",
            Step::RandAugment(_) => "randaugment",
        }
    }

    /// Draws the step for a view of `size` pixels. Each draw consumes the same numbers whatever its
    /// probability, but for what is drawn for a step that is applied.
    pub(super) fn draw(&self, size: u32, view: &mut ViewPlan, rng: &mut Rng) {
        match *self {
            Step::Jitter { p, brightness, contrast, saturation, hue } => {
                if rng.chance(p) {
                    jitter([brightness, contrast, saturation, hue], &mut view.ops, rng);
                }
            }
            Step::Gray { p } => {
                if rng.chance(p) {
                    view.ops.push(Op::Gray);
                }
            }
            Step::Blur { p, sigma: [least, largest] } => {
                if rng.chance(p) {
                    view.ops.push(Op::Blur(rng.uniform(least, largest) as f32));
                }
            }
            Step::Solarize { p, threshold } => {
                if rng.chance(p) {
                    view.ops.push(Op::Solarize(threshold));
                }
            }
            Step::Flip { p } => view.flip ^= rng.chance(p),
            Step::RandAugment(randaugment) => {
                let first = view.ops.len();
                randaugment.draw(size, &mut view.ops, rng);
                mirror_before(first, view);
            }
        }
    }
}

/// A view is mirrored last, which is the same as earlier for all operations that know no left and right.
/// Where one that does came after the flip, the flip stands before it.
fn mirror_before(first: usize, view: &mut ViewPlan) {
    let turns = |op: &Op| matches!(op, Op::Affine { .. });
    if let Some(at) = view.ops[first..].iter().position(turns).filter(|_| view.flip) {
        view.ops.insert(first + at, Op::Flip);
        view.flip = false;
    }
}

fn jitter([brightness, contrast, saturation, hue]: [f64; 4], ops: &mut Vec<Op>, rng: &mut Rng) {
    let mut which = [0u8, 1, 2, 3];
    rng.shuffle(&mut which);
    let mut factor = |x: f64| rng.uniform((1.0 - x).max(0.0), 1.0 + x) as f32;
    let factors = [factor(brightness), factor(contrast), factor(saturation)];
    let turns = rng.uniform(-hue, hue) as f32;
    for op in which {
        match op {
            0 if brightness > 0.0 => ops.push(Op::Brightness(factors[0])),
            1 if contrast > 0.0 => ops.push(Op::Contrast(factors[1])),
            2 if saturation > 0.0 => ops.push(Op::Saturation(factors[2])),
            3 if hue > 0.0 => ops.push(Op::Hue(turns)),
            _ => {}
        }
    }
}

impl Steps {
    pub(super) fn validate(&self, field: &str) -> Result<(), RecipeError> {
        let Steps::Own(steps) = self else { return Ok(()) };
        for (at, step) in steps.iter().enumerate() {
            if steps[..at].iter().any(|other| other.name() == step.name()) {
                return Err(RecipeError::RepeatedStep {
                    field: field.to_owned(),
                    step: step.name(),
                });
            }
            step.validate(&format!("{field}.{}", step.name()))?;
        }
        Ok(())
    }
}

impl Step {
    fn validate(&self, field: &str) -> Result<(), RecipeError> {
        let probability = |p| within(&format!("{field}.p"), p, 0.0, 1.0);
        match *self {
            Step::Jitter { p, brightness, contrast, saturation, hue } => {
                probability(p)?;
                within(&format!("{field}.brightness"), brightness, 0.0, 10.0)?;
                within(&format!("{field}.contrast"), contrast, 0.0, 10.0)?;
                within(&format!("{field}.saturation"), saturation, 0.0, 10.0)?;
                within(&format!("{field}.hue"), hue, 0.0, 0.5)
            }
            Step::Gray { p } | Step::Flip { p } => probability(p),
            Step::Blur { p, sigma } => {
                probability(p)?;
                range(&format!("{field}.sigma"), sigma, 0.0, 100.0)
            }
            Step::Solarize { p, threshold } => {
                probability(p)?;
                within(&format!("{field}.threshold"), f64::from(threshold), 0.0, 256.0)
            }
            Step::RandAugment(RandAugment { p, n, m, mstd }) => {
                probability(p)?;
                within(&format!("{field}.n"), f64::from(n), 0.0, 100.0)?;
                within(&format!("{field}.m"), m, 0.0, 10.0)?;
                within(&format!("{field}.mstd"), mstd, 0.0, 100.0)
            }
        }
    }
}

impl Serialize for Steps {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Steps::Own(steps) => steps.serialize(to),
            Steps::Of(name) => to.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for Steps {
    /// Not an untagged enum: that would replace "unknown field `brigthness`" by "did not match any
    /// variant".
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Steps, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Steps;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of steps, or the name of a group of views with one")
            }

            fn visit_str<E>(self, name: &str) -> Result<Steps, E> {
                Ok(Steps::Of(name.to_owned()))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, list: A) -> Result<Steps, A::Error> {
                let list = serde::de::value::SeqAccessDeserializer::new(list);
                Vec::deserialize(list).map(Steps::Own)
            }
        }
        from.deserialize_any(Visitor)
    }
}
