//! The measurement: scenes, detectors of several seeds on one backbone, and random initialisations beside it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use super::DetectError;
use super::features::{Features, Standard};
use super::fit::{Body, Frozen, Said, Training, detect, fit};
use super::head::{Head, STRIDE, Shape};
use super::keep::Keep;
use super::sources::{Scenes, Source, Split};
use super::targets::assign;
use super::tuned::Tuned;
use crate::config::Config;
use crate::draws::Draws;
use crate::eval::ap::{self, Detection, Truth};
use crate::eval::digest;
use crate::eval::features::device_of;
use crate::eval::report::Spread;
use crate::model::{Encoder, Model};
use crate::shapes;

/// COCO's average precision of one detector, in percent; none where there is nothing to detect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Mean over overlaps 0.50 to 0.95 and over classes.
    pub ap: Option<f64>,
    /// At the overlap 0.50.
    pub ap50: Option<f64>,
    /// At the overlap 0.75.
    pub ap75: Option<f64>,
    /// Of objects up to 32² pixels.
    pub ap_small: Option<f64>,
    /// Of objects of 32² to 96² pixels.
    pub ap_medium: Option<f64>,
    /// Of objects from 96² pixels.
    pub ap_large: Option<f64>,
    /// As `ap`, of the same detector where all classes are one.
    pub agnostic_ap: Option<f64>,
    /// As `ap50`, of the same detector where all classes are one.
    pub agnostic_ap50: Option<f64>,
}

impl Scores {
    /// The scores by name, the one to show first.
    pub fn named(&self) -> [(&'static str, Option<f64>); 8] {
        [
            ("AP50", self.ap50),
            ("AP", self.ap),
            ("AP75", self.ap75),
            ("AP-small", self.ap_small),
            ("AP-medium", self.ap_medium),
            ("AP-large", self.ap_large),
            ("agnostic-AP50", self.agnostic_ap50),
            ("agnostic-AP", self.agnostic_ap),
        ]
    }
}

/// What is measured and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Training scenes.
    pub scenes: usize,
    /// Test scenes.
    pub test_scenes: usize,
    /// Each detector's levels: a reading each.
    pub groups: Vec<Vec<u8>>,
    /// Shares of the training scenes that are learned from, in percent: a reading each.
    pub percents: Vec<f64>,
    /// Seeds of the detector's weights and of the order of scenes.
    pub seeds: Vec<u64>,
    /// Random initialisations, seeds 0 and up.
    pub inits: u64,
    /// How detectors are trained.
    pub training: Training,
    /// Whether each scene's boxes are another's: a control that is to find nothing.
    pub shuffled_boxes: bool,
    /// Decode threads.
    pub workers: usize,
}

/// How far a part of the work is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// What is done.
    pub what: &'a str,
    /// Of it, done.
    pub done: u64,
    /// Of it, in all.
    pub total: u64,
}

/// Hears of progress.
pub type Watch<'a> = dyn Fn(Progress<'_>) + Sync + 'a;

/// The scores of a group of levels on a share of the scenes, by seeds.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// `all`, `res2`, `res4+res5`; with a share of the scenes `all@10%`.
    pub name: String,
    /// One for each seed.
    pub scores: Vec<Scores>,
}

impl Found {
    /// The values of a score by seeds; none where a seed has none.
    pub fn samples(&self, score: usize) -> Option<Vec<f64>> {
        self.scores.iter().map(|scores| scores.named()[score].1).collect()
    }
}

/// Detections of a detector, for files.
#[derive(Debug)]
pub struct Detected {
    /// What is there.
    pub truth: Truth,
    /// What was found.
    pub found: Vec<Detection>,
}

/// A backbone that is measured.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// What it is, for whoever waits.
    pub what: &'a str,
    /// The backbone.
    pub encoder: &'a Encoder,
    /// Its architecture.
    pub config: &'a Config,
}

/// What was computed once of a subject: how its channels are standardised, and a frozen one's maps of training and of
/// test scenes.
struct Prepared {
    standard: Standard,
    features: Option<[Features; 2]>,
}

/// One detector of a subject.
#[derive(Clone, Copy, Debug)]
struct Detector<'a> {
    levels: &'a [u8],
    percent: f64,
    seed: u64,
}

/// Scenes and options: what all backbones are measured with.
pub struct Bench<'a> {
    options: &'a Options,
    keep: &'a Keep,
    watch: &'a Watch<'a>,
    train: Scenes,
    test: Scenes,
    classes: Vec<(i64, String)>,
    truth: Truth,
    one_class: Truth,
    /// What every reading depends on.
    base: Map<String, Value>,
}

impl std::fmt::Debug for Bench<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bench").field("options", &self.options).finish_non_exhaustive()
    }
}

impl<'a> Bench<'a> {
    /// Makes the scenes.
    ///
    /// # Errors
    /// When a scene cannot be made, or no training scene has an object.
    pub fn new(
        source: &dyn Source,
        options: &'a Options,
        keep: &'a Keep,
        watch: &'a Watch<'a>,
    ) -> Result<Bench<'a>, DetectError> {
        let make = |split: Split, what: &str, count: usize| {
            let total = count.min(source.most(split)) as u64;
            let tick = |done| watch(Progress { what, done, total });
            Scenes::make(source, split, count, options.workers, &tick)
        };
        let train = make(Split::Train, "training scenes", options.scenes)?;
        let test = make(Split::Test, "test scenes", options.test_scenes)?;
        if train.learned().iter().all(Vec::is_empty) {
            return Err(DetectError::NoObjects);
        }
        let classes = source.classes().to_vec();
        let (truth, one_class) = (test.truth(&classes, false), test.truth(&classes, true));
        let mut base = source.describe();
        let pairs = [
            ("program", json!(env!("CARGO_PKG_VERSION"))),
            ("source", json!(source.name())),
            ("size", json!(train.size)),
            ("scenes", json!([train.len(), test.len()])),
            ("targets", json!([train.objects(), test.objects()])),
            ("classes", json!(classes)),
        ];
        base.extend(pairs.into_iter().map(|(name, value)| (name.to_owned(), value)));
        Ok(Bench { options, keep, watch, train, test, classes, truth, one_class, base })
    }

    /// Counts and digests of the data.
    pub fn data(&self) -> &Map<String, Value> {
        &self.base
    }

    /// Measures a backbone with these seeds: every group of levels and every share of the scenes. What was kept is not
    /// measured again.
    ///
    /// # Errors
    /// See [`DetectError`]; [`DetectError::Changed`] where the backbone is another one afterwards.
    pub fn measure(&self, subject: Subject<'_>, seeds: &[u64]) -> Result<Vec<Found>, DetectError> {
        let before = digest(&subject.encoder.backbone_tensors())?;
        let mut prepared = None;
        let mut all = Vec::new();
        for levels in &self.options.groups {
            for percent in &self.options.percents {
                let name = name(levels, *percent);
                let mut scores = Vec::with_capacity(seeds.len());
                for seed in seeds {
                    let detector = Detector { levels, percent: *percent, seed: *seed };
                    let of = self.depends(&before, detector);
                    if let Some(kept) = self.keep.found(&of) {
                        scores.push(kept);
                        continue;
                    }
                    let prepared = match &mut prepared {
                        Some(prepared) => prepared,
                        none => none.insert(self.prepare(subject)?),
                    };
                    let found = self.score(&self.said(subject, prepared, detector)?);
                    scores.push(self.keep.put(&of, &found)?);
                }
                all.push(Found { name, scores });
            }
        }
        let after = digest(&subject.encoder.backbone_tensors())?;
        if after != before {
            return Err(DetectError::Changed { before, after });
        }
        Ok(all)
    }

    /// Puts statistics of the training scenes in the place of an encoder's own. Returns the number of scenes.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn recompute_bn(&self, encoder: &mut Encoder) -> Result<u64, DetectError> {
        super::features::recompute_bn(encoder, &self.train)
    }

    /// Measures random initialisations of a backbone's architecture, each with the first seed alone.
    ///
    /// # Errors
    /// As [`Bench::measure`]; when a backbone cannot be made.
    pub fn random(&self, config: &Config, device: Device) -> Result<Vec<Found>, DetectError> {
        let first = self.options.seeds.first().copied().unwrap_or(0);
        let mut all: BTreeMap<usize, Found> = BTreeMap::new();
        for seed in 0..self.options.inits {
            let model = Model::bare(&Config { seed, ..config.clone() }, device)?;
            let what = format!("random init {}/{}", seed + 1, self.options.inits);
            let subject = Subject { what: &what, encoder: &model.query, config };
            for (at, found) in self.measure(subject, &[first])?.into_iter().enumerate() {
                match all.get_mut(&at) {
                    Some(all) => all.scores.extend(found.scores),
                    None => drop(all.insert(at, found)),
                }
            }
        }
        Ok(all.into_values().collect())
    }

    /// The detections of the first reading and the first seed, which is trained anew for it.
    ///
    /// # Errors
    /// As [`Bench::measure`].
    pub fn detections(&self, subject: Subject<'_>) -> Result<Detected, DetectError> {
        let options = self.options;
        let detector = Detector {
            levels: options.groups.first().map_or(&[][..], Vec::as_slice),
            percent: options.percents.first().copied().unwrap_or(100.0),
            seed: options.seeds.first().copied().unwrap_or(0),
        };
        let found = self.said(subject, &self.prepare(subject)?, detector)?.by_class;
        Ok(Detected { truth: self.truth.clone(), found })
    }

    fn depends(&self, backbone: &str, detector: Detector<'_>) -> Value {
        json!({
            "backbone": backbone,
            "data": self.base,
            "training": self.options.training,
            "shuffled_boxes": self.options.shuffled_boxes,
            "levels": detector.levels,
            "percent": detector.percent,
            "seed": detector.seed,
        })
    }

    /// What all detectors of a subject need: of a frozen one the maps of all levels that a reading asks for.
    fn prepare(&self, subject: Subject<'_>) -> Result<Prepared, DetectError> {
        let mut levels: Vec<u8> = self.options.groups.concat();
        levels.sort_unstable();
        levels.dedup();
        let standard = Standard::of(subject.encoder, &self.train)?;
        if self.options.training.backbone_lr.is_some() {
            return Ok(Prepared { standard, features: None });
        }
        let total = (self.train.len() + self.test.len()) as u64;
        let mut done = 0;
        let text = format!("{}: features", subject.what);
        let mut of = |scenes: &Scenes| {
            Features::of(subject.encoder, scenes, &standard, &levels, &mut |count| {
                done += count;
                (self.watch)(Progress { what: &text, done, total });
            })
        };
        let features = [of(&self.train)?, of(&self.test)?];
        Ok(Prepared { standard, features: Some(features) })
    }

    /// Trains a detector and lets it look at the test scenes.
    fn said(
        &self,
        subject: Subject<'_>,
        prepared: &Prepared,
        detector: Detector<'_>,
    ) -> Result<Said, DetectError> {
        let (levels, device) = (detector.levels, device_of(subject.encoder));
        let channels = shapes::ResNet::of(&subject.config.model).channels();
        let channels: Vec<(u8, i64)> =
            levels.iter().map(|level| (*level, channels[usize::from(*level) - 2])).collect();
        let shape = Shape {
            levels: &channels,
            width: self.options.training.width,
            classes: self.classes.len() as i64,
            grid: self.grid(),
        };
        let head = Head::new(&shape, detector.seed, device);
        if let Some([train, test]) = &prepared.features {
            let _one = OneThread::on(device);
            self.train(subject, &head, &mut Frozen { features: train, levels }, detector)?;
            let mut maps = |first: usize, count: usize| {
                let rows: Vec<i64> = (first as i64..(first + count) as i64).collect();
                Ok(test.rows(levels, &Tensor::from_slice(&rows).to_device(device)))
            };
            return detect(&head, &mut maps, &self.test);
        }
        let backbone = subject.encoder.backbone_tensors();
        let copied = (subject.config, &backbone[..]);
        let mut body = Tuned::copy(copied, device, &self.train, &prepared.standard, levels)?;
        self.train(subject, &head, &mut body, detector)?;
        detect(&head, &mut |first, count| body.after(&self.test, first, count), &self.test)
    }

    fn grid(&self) -> i64 {
        i64::from(self.train.size) / STRIDE
    }

    fn train(
        &self,
        subject: Subject<'_>,
        head: &Head,
        body: &mut dyn Body,
        Detector { levels, percent, seed }: Detector<'_>,
    ) -> Result<(), DetectError> {
        let training = &self.options.training;
        let mut learned = self.train.learned();
        if self.options.shuffled_boxes {
            let order = Draws::new(seed, "detect.shuffle", 0).permutation(learned.len());
            learned = order.into_iter().map(|at| learned[at as usize].clone()).collect();
        }
        let targets = assign(&learned, self.grid());
        let rows = self.train.part(percent, seed);
        let (mut done, total) = (0, u64::from(training.steps));
        let text = format!("{}: {}, seed {seed}", subject.what, name(levels, percent));
        fit(head, body, &targets, &rows, training, seed, &mut || {
            done += 1;
            (self.watch)(Progress { what: &text, done, total });
        })?;
        Ok(())
    }

    fn score(&self, said: &Said) -> Scores {
        let of = ap::coco(&self.truth, &said.by_class);
        let one = ap::coco(&self.one_class, &said.one_class);
        Scores {
            ap: of.ap,
            ap50: of.ap50,
            ap75: of.ap75,
            ap_small: of.ap_small,
            ap_medium: of.ap_medium,
            ap_large: of.ap_large,
            agnostic_ap: one.ap,
            agnostic_ap50: one.ap50,
        }
    }
}

/// While it lives, an operation on a CPU takes one thread: those of a detector are too small to share, and threads that
/// wait for each other a million times take longer than one. Figures then are the same on any number of cores.
struct OneThread(Option<i32>);

impl OneThread {
    fn on(device: Device) -> OneThread {
        let before = (device == Device::Cpu).then(tch::get_num_threads);
        if before.is_some() {
            tch::set_num_threads(1);
        }
        OneThread(before)
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            tch::set_num_threads(before);
        }
    }
}

/// A reading's name.
fn name(levels: &[u8], percent: f64) -> String {
    let mut name = match levels {
        [2, 3, 4, 5] => "all".to_owned(),
        levels => levels.iter().map(|level| format!("res{level}")).collect::<Vec<_>>().join("+"),
    };
    if percent < 100.0 {
        name.push_str(&format!("@{percent}%"));
    }
    name
}

/// A backbone against random initialisations of its architecture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// The reading's name.
    pub name: String,
    /// Mean over the initialisations.
    pub random: f64,
    /// Standard deviation of the initialisations (n - 1); none of a single one.
    pub random_sd: Option<f64>,
    /// The value of each.
    pub samples: Vec<f64>,
    /// The backbone's mean less the initialisations'.
    pub above: f64,
    /// The same in deviations of the initialisations; none where they do not differ.
    pub deviations: Option<f64>,
}

/// How far each score lies above the random initialisations'.
pub fn distances(found: &[Found], random: &[Found]) -> Vec<Distance> {
    let mut all = Vec::new();
    for (ours, theirs) in found.iter().zip(random) {
        for (score, (name, _)) in Scores::default().named().into_iter().enumerate() {
            let (Some(ours_are), Some(samples)) = (ours.samples(score), theirs.samples(score))
            else {
                continue;
            };
            let [mean, random] = [&ours_are, &samples].map(|of| Spread::of(of));
            let (above, random_sd, random) = (mean.mean - random.mean, random.sd, random.mean);
            let deviations = random_sd.filter(|sd| *sd > 0.0).map(|sd| above / sd);
            let name = format!("{}/{name}", ours.name);
            all.push(Distance { name, random, random_sd, samples, above, deviations });
        }
    }
    all
}
