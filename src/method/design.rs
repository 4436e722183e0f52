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
    /// Whether heads see the rows of all passes as one batch: a sample's images of the first pass, then those of the
    /// next. All passes are then of one scope.
    pub is_joint: bool,
    /// Heads whose weights stay as they are in a run's first updates.
    pub frozen: Option<FrozenDesign>,
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
            is_joint: false,
            frozen: None,
            logits: Logits::default(),
            lighter: "",
            monitor_level: 5,
        }
    }
}

/// What the logits of a step take, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Logits {
    /// For each sample of a micro-batch; where rows are coupled, of this rank.
    pub each: i64,
    /// For each sample of the batch of all ranks.
    pub all: i64,
    /// For each pair of samples of the batch of all ranks.
    pub pairs: i64,
    /// However many samples there are.
    pub once: i64,
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
    /// Division of a row by its length.
    Unit {
        /// Numbers of a row.
        width: i64,
    },
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
            Layer::Relu | Layer::Unit { .. } => 0,
        }
    }

    /// Bytes beside the parameters: running statistics, a counter, an offset that stays 0.
    pub fn buffer_bytes(&self) -> i64 {
        match *self {
            Layer::Norm { width, shift } => (if shift { 2 } else { 3 }) * width * 4 + 8,
            Layer::Linear { .. } | Layer::Relu | Layer::Unit { .. } => 0,
        }
    }

    /// Multiply-adds for a row.
    fn multiply_adds(&self) -> i64 {
        match *self {
            Layer::Linear { from, to, .. } => from * to,
            Layer::Norm { .. } | Layer::Relu | Layer::Unit { .. } => 0,
        }
    }

    /// Numbers of a row that a training pass keeps: what goes in. A ReLU works in place.
    fn kept(&self) -> i64 {
        match *self {
            Layer::Linear { from, .. } => from,
            Layer::Norm { width, .. } | Layer::Unit { width } => width,
            Layer::Relu => 0,
        }
    }
}

/// What a head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The average of a stage's map: a row for each image.
    Average,
    /// A stage's map: a row for each of its cells, those of an image line by line.
    Cells,
    /// The rows of an earlier head of the same scope and level, by its [label](HeadDesign::label), before they get
    /// unit length.
    Head(&'static str),
    /// The mean of these rows over the cells of an image.
    Mean(&'static str),
}

/// A head: from one of the backbone's maps, or from what another head made of it, to outputs.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadDesign {
    /// Its family: a pass goes through all heads of one scope.
    pub scope: String,
    /// A name of its own, where a scope has several heads at a level.
    pub own_name: Option<&'static str>,
    /// The stage whose map it reads, 2 to 5.
    pub level: u8,
    /// What it reads of it.
    pub reads: Reads,
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
    /// Whether [`Scores::gradients`](super::Scores::gradients) has one by its outputs; otherwise these come without
    /// their history.
    pub is_scored: bool,
    /// Whether its outputs of all ranks are gathered: the teacher's, for the queues; the student's, where rows are
    /// coupled. What is not is known to the sample's own rank alone.
    pub is_gathered: bool,
    /// Whether the teacher has it, too. A predictor is the student's alone.
    pub in_teacher: bool,
    /// Its queues, where the method has any and its outputs are gathered.
    pub queues: i64,
}

impl Default for HeadDesign {
    /// Of the average of Res5, without layers; scored, gathered, the teacher's as well, with one queue.
    fn default() -> HeadDesign {
        HeadDesign {
            scope: String::new(),
            own_name: None,
            level: 5,
            reads: Reads::Average,
            joined: 1,
            each: Vec::new(),
            whole: Vec::new(),
            width: 0,
            unit: true,
            is_scored: true,
            is_gathered: true,
            in_teacher: true,
            queues: 1,
        }
    }
}

impl HeadDesign {
    /// What metrics call it: its own name, or its scope.
    pub fn label(&self) -> &str {
        self.own_name.unwrap_or(&self.scope)
    }

    /// What its tensors' names begin with: `global.5`.
    pub fn name(&self) -> String {
        format!("{}.{}", self.label(), self.level)
    }

    /// Names of its queues in a run with queues: its own, or with the queue's number where it has several.
    pub fn queue_names(&self) -> Vec<String> {
        match (self.is_gathered, self.queues) {
            (false, _) => Vec::new(),
            (true, 1) => vec![self.name()],
            (true, queues) => (0..queues).map(|i| format!("{}.{i}", self.name())).collect(),
        }
    }

    /// Rows that it makes of an image whose map has so many cells.
    pub fn rows(&self, cells: i64) -> i64 {
        if self.reads == Reads::Cells { cells } else { 1 }
    }

    /// All layers.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.each.iter().chain(&self.whole)
    }

    /// Numbers that training changes.
    pub fn parameters(&self) -> i64 {
        self.layers().map(Layer::parameters).sum()
    }

    /// Sums over a sample of so many rows: on each, and on what was put side by side.
    fn of_sample(&self, rows: i64, of: fn(&Layer) -> i64) -> i64 {
        let sum = |layers: &[Layer]| layers.iter().map(of).sum::<i64>();
        rows * sum(&self.each) + rows / self.joined.max(1) * sum(&self.whole)
    }

    /// Multiply-adds for a sample of so many rows: images, times [`HeadDesign::rows`].
    pub fn multiply_adds(&self, rows: i64) -> i64 {
        self.of_sample(rows, Layer::multiply_adds)
    }

    /// Numbers that a training pass over a sample of so many rows keeps.
    pub fn kept(&self, rows: i64) -> i64 {
        self.of_sample(rows, Layer::kept)
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
    /// Whether it sees the samples in another order, so that its batch statistics are of other samples than the
    /// student's (MoCo's shuffle).
    pub shuffles: bool,
}

/// Heads whose weights stay as they are in a run's first updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenDesign {
    /// Their [label](HeadDesign::label).
    pub label: &'static str,
    /// So many updates.
    pub updates: u64,
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

    /// The heads of the student's outputs: those of each pass, pass by pass; where passes are joint, once.
    pub fn outputs(&self) -> impl Iterator<Item = &HeadDesign> {
        let passes = if self.is_joint { self.passes.len().min(1) } else { self.passes.len() };
        self.passes[..passes].iter().flat_map(|pass| self.heads_of(&pass.scope))
    }

    /// The heads of the teacher's outputs.
    pub fn targets(&self) -> impl Iterator<Item = &HeadDesign> {
        self.outputs().filter(|head| head.in_teacher)
    }

    /// The heads of the student's outputs whose spread is watched, and their names in metrics: with the group of
    /// views where a head sees several by themselves.
    pub fn watched(&self) -> Vec<(&HeadDesign, String)> {
        let groups = self
            .passes
            .iter()
            .flat_map(|pass| self.heads_of(&pass.scope).map(move |_| pass.group.as_str()));
        let all: Vec<_> = self.outputs().zip(groups).filter(|(head, _)| head.unit).collect();
        let named = all.iter().map(|(head, group)| {
            let alike = all.iter().filter(|(other, _)| other.name() == head.name()).count();
            let label = head.label();
            (*head, if alike > 1 { format!("{label}/{group}") } else { label.to_owned() })
        });
        named.collect()
    }

    /// Whether every head that reads another one comes behind it, in a teacher as well.
    pub(crate) fn reads_what_is_there(&self) -> bool {
        let fits = |(at, head): (usize, &HeadDesign)| match head.reads {
            Reads::Average | Reads::Cells => true,
            Reads::Head(label) | Reads::Mean(label) => self.heads[..at].iter().any(|other| {
                other.label() == label
                    && (&other.scope, other.level) == (&head.scope, head.level)
                    && (other.in_teacher || !head.in_teacher)
            }),
        };
        self.heads.iter().enumerate().all(fits)
    }

    /// The heads that the teacher has.
    #[must_use]
    pub fn of_teacher(&self) -> Design {
        let mut design = self.clone();
        design.heads.retain(|head| head.in_teacher);
        design
    }

    /// The highest stage that a pass through a scope's heads needs; all of them without heads.
    pub fn last_level(&self, scope: &str) -> u8 {
        self.heads_of(scope).map(|head| head.level).max().unwrap_or(5)
    }
}
