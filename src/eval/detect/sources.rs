//! Scenes with boxes, whoever makes them: the interface of sources, and scenes rendered into memory.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use detco_shards::decode::{Decoder, Image};
use detco_shards::pipe::side_by_side;
use detco_shards::views::Renderer;
use serde_json::{Map, Value};

use super::SceneError;
use crate::draws::Draws;
use crate::eval::ap::{self, Box4, Truth};

/// Which scenes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Those that the detector learns from.
    Train,
    /// Those that it is measured on.
    Test,
    /// More scenes of what training scenes are made of, without boxes: to pre-train on.
    Unlabelled,
}

impl Split {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Test => "test",
            Split::Unlabelled => "unlabelled",
        }
    }

    /// The position of its material: test scenes are made of other pictures.
    pub(super) fn part(self) -> usize {
        usize::from(self == Split::Test)
    }
}

/// An object of a scene.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Position in [`Source::classes`].
    pub class: usize,
    /// Left, top, right and bottom edge in pixels of the scene.
    pub corners: [f32; 4],
    /// Left, top, width and height in the picture that the scene was made of.
    pub bounds: Box4,
    /// Pixels of it in that picture.
    pub area: f64,
    /// Whether evaluation leaves it out: COCO's crowds, VOC's difficult objects.
    pub is_ignored: bool,
    /// Whether the detector learns from it: all but COCO's crowds.
    pub is_learned: bool,
}

impl Object {
    /// An object that fills this box of whole pixels.
    pub fn exact(class: usize, corners: [u32; 4]) -> Object {
        let [left, top, right, bottom] = corners.map(f64::from);
        let bounds = [left, top, right - left, bottom - top];
        Object {
            class,
            corners: corners.map(|corner| corner as f32),
            bounds,
            area: bounds[2] * bounds[3],
            is_ignored: false,
            is_learned: true,
        }
    }
}

/// A scene but for its pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// Its name in files of results: a number, or a file's name without extension.
    pub name: String,
    /// Pixels of the scene for one of the picture that it was made of.
    pub scale: f64,
    /// What is there.
    pub objects: Vec<Object>,
}

/// What a thread needs to make scenes.
#[derive(Debug)]
pub struct Tools {
    pub(super) renderer: Renderer,
    pub(super) decoder: Decoder,
    pub(super) image: Image,
    pub(super) small: Image,
    pub(super) canvas: Vec<f32>,
}

impl Tools {
    /// Tools without memory yet.
    pub fn new() -> Tools {
        let (renderer, decoder) = (Renderer::new(), Decoder::new());
        let (image, small) = (Image::new(), Image::new());
        Tools { renderer, decoder, image, small, canvas: Vec::new() }
    }
}

impl Default for Tools {
    fn default() -> Self {
        Tools::new()
    }
}

/// Where scenes come from.
pub trait Source: Sync {
    /// What they are, as part of the protocol's name: `composites`.
    fn name(&self) -> &'static str;

    /// Edge of a scene in pixels.
    fn size(&self) -> u32;

    /// Numbers and names of the classes, in the order of [`Object::class`].
    fn classes(&self) -> &[(i64, String)];

    /// Scenes of a split that there are.
    fn most(&self, split: Split) -> usize;

    /// Makes a scene: `out` is `[size, size, 3]`.
    ///
    /// # Errors
    /// When its picture cannot be read or decoded.
    fn scene(
        &self,
        split: Split,
        index: usize,
        tools: &mut Tools,
        out: &mut [u8],
    ) -> Result<Scene, SceneError>;

    /// What the scenes depend on, for the report.
    fn describe(&self) -> Map<String, Value>;
}

/// Scenes in memory.
#[derive(Clone, Debug, Default)]
pub struct Scenes {
    /// Edge in pixels.
    pub size: u32,
    /// `[n, size, size, 3]` bytes.
    pub pixels: Vec<u8>,
    /// All but their pixels.
    pub scenes: Vec<Scene>,
}

impl Scenes {
    /// Makes `count` scenes of a split, or as many as there are, evenly spaced, on `workers` threads; `tick` hears how
    /// many are done. The number of threads does not change a byte.
    ///
    /// # Errors
    /// The first of a scene; when no thread can be started.
    pub fn make(
        source: &dyn Source,
        split: Split,
        count: usize,
        workers: usize,
        tick: &(dyn Fn(u64) + Sync),
    ) -> Result<Scenes, SceneError> {
        let (most, size) = (source.most(split), source.size());
        let count = count.min(most);
        let bytes = 3 * size as usize * size as usize;
        let place = |index: usize| {
            if most == usize::MAX {
                index
            } else {
                (index as u128 * most as u128 / count as u128) as usize
            }
        };
        let mut pixels = Vec::new();
        let room = count.checked_mul(bytes).filter(|all| pixels.try_reserve_exact(*all).is_ok());
        let all = room.ok_or(SceneError::Memory { scenes: count, size })?;
        pixels.resize(all, 0);
        let jobs = Mutex::new(pixels.chunks_exact_mut(bytes).enumerate());
        let results = Mutex::new(Vec::with_capacity(count));
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let started = side_by_side(workers.clamp(1, count.max(1)), &stop, || {
            let mut tools = Tools::new();
            while !stop.load(Ordering::Relaxed) {
                // A poisoned lock means that a sibling panicked; the scope passes that on.
                let job = jobs.lock().unwrap_or_else(|poison| poison.into_inner()).next();
                let Some((index, out)) = job else { break };
                let result = source.scene(split, place(index), &mut tools, out);
                stop.fetch_or(result.is_err(), Ordering::Relaxed);
                results.lock().unwrap_or_else(|poison| poison.into_inner()).push((index, result));
                tick(done.fetch_add(1, Ordering::Relaxed) + 1);
            }
        });
        started.map_err(|source| SceneError::Thread { source })?;
        let mut results = results.into_inner().unwrap_or_else(|poison| poison.into_inner());
        results.sort_by_key(|(index, _)| *index);
        let scenes = results.into_iter().map(|(_, scene)| scene).collect::<Result<_, _>>()?;
        Ok(Scenes { size, pixels, scenes })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.scenes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.scenes.is_empty()
    }

    /// The pixels of scenes from `first` on, `count` of them.
    ///
    /// # Panics
    /// Where there are not so many.
    pub fn bytes(&self, first: usize, count: usize) -> &[u8] {
        let bytes = 3 * self.size as usize * self.size as usize;
        &self.pixels[first * bytes..][..count * bytes]
    }

    /// Objects of all scenes.
    pub fn objects(&self) -> usize {
        self.scenes.iter().map(|scene| scene.objects.len()).sum()
    }

    /// What a detector is measured against. With `one_class`, everything is of the same class.
    pub fn truth(&self, classes: &[(i64, String)], one_class: bool) -> Truth {
        let objects = self.scenes.iter().enumerate().flat_map(|(image, scene)| {
            scene.objects.iter().map(move |object| ap::Object {
                image,
                category: if one_class { 0 } else { object.class },
                bounds: object.bounds,
                area: object.area,
                is_ignored: object.is_ignored,
            })
        });
        Truth {
            images: self.scenes.iter().map(|scene| scene.name.clone()).collect(),
            categories: if one_class { vec![(1, "object".to_owned())] } else { classes.to_vec() },
            objects: objects.collect(),
        }
    }

    /// What the detector learns from: corners in pixels of the scene and class of each scene's objects.
    pub fn learned(&self) -> Vec<Vec<([f32; 4], usize)>> {
        let of = |scene: &Scene| {
            let learned = scene.objects.iter().filter(|object| object.is_learned);
            learned.map(|object| (object.corners, object.class)).collect()
        };
        self.scenes.iter().map(of).collect()
    }

    /// `percent` of the scenes, by number: drawn without replacement, at least one, and a part of what more percent draw
    /// of the same seed.
    pub fn part(&self, percent: f64, seed: u64) -> Vec<i64> {
        let count = (self.len() as f64 * percent / 100.0).round_ties_even().max(1.0) as usize;
        if count >= self.len() {
            return (0..self.len() as i64).collect();
        }
        let drawn = Draws::new(seed, "detect.part", 0).permutation(self.len());
        let drawn: BTreeSet<i64> = drawn.into_iter().take(count).collect();
        drawn.into_iter().collect()
    }
}
