//! What a method declares: views, heads, passes, teacher, queues, terms.
//!
//! Data alone. The memory sum, the plan, the profile, the dry run, checkpoints and metrics read it, none of
//! them makes a pass for it, and none of them knows a method by its name. Needs no libtorch.

use serde::{Deserialize, Serialize};

/// A method's declaration, for one backbone.
#[derive(Clone, Debug, PartialEq)]
pub struct Design {
    /// Groups of views that training takes, by their names in the recipe. The first one's size is that of
    /// images in an evaluation.
    pub groups: Vec<String>,
    /// Heads, in the order in which their weights are made.
    pub heads: Vec<HeadDesign>,
    /// What the student (the encoder trained by gradient) sees in a step, in this order.
    pub passes: Vec<PassDesign>,
    /// The key encoder, if there is one.
    pub teacher: Option<TeacherDesign>,
    /// Keys in the queue of each head, k; 0 without queues.
    pub queue: i64,
    /// Samples that only fill the queues, before the first change of a weight.
    pub fill: i64,
    /// Terms of the loss.
    pub terms: Vec<TermDesign>,
    /// What is read of each term, in the columns of [`Scores::readings`](super::Scores::readings); the first
    /// is `loss`.
    pub readings: Vec<&'static str>,
    /// Whether a sample's loss depends on the other samples' outputs: those of all ranks are then gathered
    /// before they are scored.
    pub is_coupled: bool,
    /// Numbers that a step's losses hold at once for so many samples (of this micro-batch; of all ranks).
    pub logits: Logits,
    /// Keys whose lower values take less memory, for error messages.
    pub lighter: &'static str,
    /// The stage whose map the kNN monitor reads, 2 to 5: where images of a class are nearest to each other.
    pub monitor_level: u8,
}

impl Default for Design {
    /// Nothing, and a monitor that reads Res5.
    fn default() -> Design {
        Design {
            groups: Vec::new(),
            heads: Vec::new(),
            passes: Vec::new(),
            teacher: None,
            queue: 0,
            fill: 0,
            terms: Vec::new(),
            readings: Vec::new(),
            is_coupled: false,
            logits: Logits::default(),
            lighter: "",
            monitor_level: 5,
        }
    }
}

/// What the logits of a step take, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Logits {
    /// For each sample of a micro-batch.
    pub each: i64,
    /// For each pair of samples of the batch of all ranks.
    pub pairs: i64,
}

/// A layer of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Fully connected.
    Linear {
        /// Numbers that go in.
        from: i64,
        /// Numbers that come out.
        to: i64,
        /// Whether an offset is added.
        bias: bool,
    },
    /// Batch normalisation over rows.
    Norm {
        /// Numbers of a row.
        width: i64,
        /// Whether the offset is trained; without, it stays 0.
        shift: bool,
    },
    /// The larger of 0 and the number.
    Relu,
}

impl Layer {
    /// Linear layers with ReLU between them: `mlp(&[c, c, d])`.
    pub fn mlp(sizes: &[i64]) -> Vec<Layer> {
        let linear = |pair: &[i64]| Layer::Linear { from: pair[0], to: pair[1], bias: true };
        let all = sizes.windows(2).flat_map(|pair| [Layer::Relu, linear(pair)]);
        all.skip(1).collect()
    }

    /// Numbers that training changes.
    pub fn parameters(&self) -> i64 {
        match *self {
            Layer::Linear { from, to, bias } => from * to + if bias { to } else { 0 },
            Layer::Norm { width, shift } => width + if shift { width } else { 0 },
            Layer::Relu => 0,
        }
    }

    /// Bytes beside the parameters: running statistics, a counter, an offset that stays 0.
    pub fn buffer_bytes(&self) -> i64 {
        match *self {
            Layer::Norm { width, shift } => (if shift { 2 } else { 3 }) * width * 4 + 8,
            Layer::Linear { .. } | Layer::Relu => 0,
        }
    }

    /// Multiply-adds for a row.
    fn multiply_adds(&self) -> i64 {
        match *self {
            Layer::Linear { from, to, .. } => from * to,
            Layer::Norm { .. } | Layer::Relu => 0,
        }
    }

    /// Numbers of a row that a training pass keeps: what goes in. A ReLU works in place.
    fn kept(&self) -> i64 {
        match *self {
            Layer::Linear { from, .. } => from,
            Layer::Norm { width, .. } => width,
            Layer::Relu => 0,
        }
    }
}

/// A head on the average of one of the backbone's maps.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadDesign {
    /// Its family: a pass goes through all heads of one scope.
    pub scope: String,
    /// The stage whose map it reads, 2 to 5.
    pub level: u8,
    /// Images of a sample whose features are put side by side before `whole`: 9 for patches, 1 for crops.
    pub joined: i64,
    /// Layers on each image by itself; empty where features are put side by side first.
    pub each: Vec<Layer>,
    /// Layers on what was put side by side.
    pub whole: Vec<Layer>,
    /// Numbers that come out.
    pub width: i64,
    /// Whether outputs are divided by their length. The spread of those that are is watched for a collapse.
    pub unit: bool,
}

impl HeadDesign {
    /// What its tensors' names begin with: `global.5`.
    pub fn name(&self) -> String {
        format!("{}.{}", self.scope, self.level)
    }

    /// All layers.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.each.iter().chain(&self.whole)
    }

    /// Numbers that training changes.
    pub fn parameters(&self) -> i64 {
        self.layers().map(Layer::parameters).sum()
    }

    /// Sums over a sample of so many images: on each image, and on what was put side by side.
    fn of_sample(&self, images: i64, of: fn(&Layer) -> i64) -> i64 {
        let sum = |layers: &[Layer]| layers.iter().map(of).sum::<i64>();
        images * sum(&self.each) + images / self.joined.max(1) * sum(&self.whole)
    }

    /// Multiply-adds for a sample of so many images.
    pub fn multiply_adds(&self, images: i64) -> i64 {
        self.of_sample(images, Layer::multiply_adds)
    }

    /// Numbers that a training pass over a sample of so many images keeps.
    pub fn kept(&self, images: i64) -> i64 {
        self.of_sample(images, Layer::kept)
    }
}

/// One pass of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct PassDesign {
    /// Which heads it goes through.
    pub scope: String,
    /// The group of views that its images come from.
    pub group: String,
    /// Images of a sample: 1 crop, 9 patches, 4 rotations.
    pub images: i64,
    /// Whether the method makes them anew from the views, which takes their memory once more.
    pub is_made: bool,
}

/// An encoder without gradients that follows the student, and sees the same passes of other views.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TeacherDesign {
    /// Momentum, m: `teacher = m * teacher + (1 - m) * student`.
    pub ema: f64,
    /// How it goes over a run.
    pub schedule: EmaSchedule,
}

/// How a teacher's momentum goes over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmaSchedule {
    /// The same in every step.
    Constant,
    /// `1 - (1 - m) * (cos(pi * step / steps) + 1) / 2`: from m to 1 (BYOL).
    Cosine,
}

/// A term of the loss, which is the sum of all terms times their weights.
#[derive(Clone, Debug, PartialEq)]
pub struct TermDesign {
    /// What metrics call it: `res5/gg`.
    pub name: String,
    /// Its weight.
    pub weight: f64,
}

impl Design {
    /// The heads of a scope.
    pub fn heads_of<'a>(&'a self, scope: &'a str) -> impl Iterator<Item = &'a HeadDesign> {
        self.heads.iter().filter(move |head| head.scope == scope)
    }

    /// The heads of the student's outputs: those of each pass, pass by pass.
    pub fn outputs(&self) -> impl Iterator<Item = &HeadDesign> {
        self.passes.iter().flat_map(|pass| self.heads_of(&pass.scope))
    }

    /// The highest stage that a pass through a scope's heads needs; all of them without heads.
    pub fn last_level(&self, scope: &str) -> u8 {
        self.heads_of(scope).map(|head| head.level).max().unwrap_or(5)
    }
}
