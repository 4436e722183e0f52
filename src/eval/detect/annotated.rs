//! Annotated photographs as scenes: COCO's file with a folder of images, and folders of PASCAL VOC.
//!
//! A picture is reduced or enlarged, with its ratio, until its long side is the scene's edge; the rest of the scene,
//! to the right or below, has the colour that normalisation maps to zero. Detections are scaled back, so that AP is
//! measured in the pictures' own pixels.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use detco_shards::decode::Rect;
use detco_shards::files::hex;
use detco_shards::views::{Filter, MEAN};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::SceneError;
use super::sources::{Object, Scene, Source, Split, Tools};
use crate::eval::ap::{self, ReadError, Truth};
use crate::eval::pictures;

/// Every so many pictures one is for testing, where nothing else is given for that.
const SPLIT: usize = 5;

/// A picture of a set.
#[derive(Clone, Debug)]
struct Picture {
    /// Its file.
    path: PathBuf,
    /// Its name in [`Truth::images`].
    name: String,
    objects: Vec<ap::Object>,
}

/// Photographs with boxes.
#[derive(Clone, Debug)]
pub struct Annotated {
    name: &'static str,
    size: u32,
    classes: Vec<(i64, String)>,
    /// Whether the detector also learns from objects that evaluation leaves out.
    learns_ignored: bool,
    parts: [Vec<Picture>; 2],
    description: Map<String, Value>,
}

/// The names of image files in COCO's annotations.
#[derive(Deserialize)]
struct Files {
    images: Vec<FileOf>,
}

#[derive(Deserialize)]
struct FileOf {
    id: i64,
    file_name: String,
}

impl Annotated {
    /// COCO's annotations and the folder of their images, for training and for testing. Without the latter every fifth
    /// image is a test image.
    ///
    /// # Errors
    /// When a file cannot be read or is not COCO's, the two list other categories, or a split has no image.
    pub fn coco(
        train: (&Path, &Path),
        test: Option<(&Path, &Path)>,
        size: u32,
    ) -> Result<Annotated, SceneError> {
        let (truth, pictures) = coco(train)?;
        let mut description = Map::from_iter([digest("train", train.0)?]);
        let parts = match test {
            None => dealt(pictures),
            Some(test) => {
                let (other, found) = coco(test)?;
                if other.categories != truth.categories {
                    let [train, test] = [train.0, test.0].map(Path::to_path_buf);
                    return Err(SceneError::Categories { train, test });
                }
                description.extend([digest("test", test.0)?]);
                [pictures, found]
            }
        };
        let classes = truth.categories;
        Annotated { name: "coco", size, classes, learns_ignored: false, parts, description }
            .checked()
    }

    /// A folder such as `VOCdevkit/VOC2007`, and which lists of `ImageSets/Main` are for training and for testing.
    /// Difficult objects are learned from and not counted in testing, as usual.
    ///
    /// # Errors
    /// When a file cannot be read or is not VOC's, or a split has no image.
    pub fn voc(folder: &Path, splits: [&str; 2], size: u32) -> Result<Annotated, SceneError> {
        let [train, test] = splits.map(|split| ap::voc_truth(folder, split));
        let (train, test) = (train?, test?);
        let mut classes: Vec<String> = [&train, &test]
            .iter()
            .flat_map(|truth| &truth.categories)
            .map(|(_, name)| name.clone())
            .collect();
        classes.sort_unstable();
        classes.dedup();
        let mut description = Map::new();
        let mut part = |truth: Truth, split: &str| {
            let numbers: Vec<usize> = truth
                .categories
                .iter()
                .map(|(_, name)| classes.partition_point(|class| class < name))
                .collect();
            let images = folder.join("JPEGImages");
            let mut pictures = of_truth(&truth, |_, name| images.join(format!("{name}.jpg")));
            for object in pictures.iter_mut().flat_map(|picture| &mut picture.objects) {
                object.category = numbers[object.category];
                object.bounds = ap::voc_pixels(object.bounds);
                object.area = object.bounds[2] * object.bounds[3];
            }
            description.insert(format!("{split}_images"), pictures.len().into());
            pictures
        };
        let parts = [part(train, splits[0]), part(test, splits[1])];
        description.insert("splits".to_owned(), json!(splits));
        let classes = (1..).zip(classes).collect();
        Annotated { name: "voc", size, classes, learns_ignored: true, parts, description }.checked()
    }

    fn checked(self) -> Result<Annotated, SceneError> {
        let [train, test] = [0, 1].map(|part| self.parts[part].len());
        if train == 0 || test == 0 {
            return Err(SceneError::TooFew { what: "images", train, test, least: SPLIT });
        }
        Ok(self)
    }
}

/// Truth and pictures of a COCO file.
fn coco((file, images): (&Path, &Path)) -> Result<(Truth, Vec<Picture>), SceneError> {
    let truth = ap::coco_truth(file)?;
    let bytes = read(file)?;
    let files: Files = serde_json::from_slice(&bytes).map_err(|source| {
        let expected = "COCO annotations whose images have a file_name";
        ReadError::Json { path: file.to_path_buf(), source, expected }
    })?;
    let names: HashMap<String, String> =
        files.images.into_iter().map(|image| (image.id.to_string(), image.file_name)).collect();
    // Every image of the truth is one of the file.
    let path = |_, name: &str| images.join(names.get(name).map_or("", String::as_str));
    let found = of_truth(&truth, path);
    Ok((truth, found))
}

/// The pictures of a truth with their objects.
fn of_truth(truth: &Truth, path: impl Fn(usize, &str) -> PathBuf) -> Vec<Picture> {
    let mut all: Vec<Picture> = truth
        .images
        .iter()
        .enumerate()
        .map(|(at, name)| Picture { path: path(at, name), name: name.clone(), objects: Vec::new() })
        .collect();
    for object in &truth.objects {
        all[object.image].objects.push(object.clone());
    }
    all
}

/// Every fifth picture goes to the second part.
fn dealt(pictures: Vec<Picture>) -> [Vec<Picture>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for (at, picture) in pictures.into_iter().enumerate() {
        parts[usize::from(at % SPLIT == SPLIT - 1)].push(picture);
    }
    parts
}

fn read(path: &Path) -> Result<Vec<u8>, SceneError> {
    let bytes = std::fs::read(path);
    bytes.map_err(|source| ReadError::Io { path: path.to_path_buf(), source }.into())
}

/// `train_sha256` and the digest of a file.
fn digest(of: &str, path: &Path) -> Result<(String, Value), SceneError> {
    let digest = Sha256::digest(read(path)?);
    Ok((format!("{of}_sha256"), hex(&digest).into()))
}

impl Source for Annotated {
    fn name(&self) -> &'static str {
        self.name
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn classes(&self) -> &[(i64, String)] {
        &self.classes
    }

    fn most(&self, split: Split) -> usize {
        self.parts[split.part()].len()
    }

    fn scene(
        &self,
        split: Split,
        index: usize,
        tools: &mut Tools,
        out: &mut [u8],
    ) -> Result<Scene, SceneError> {
        let picture = &self.parts[split.part()][index];
        let Tools { renderer, decoder, image, small, .. } = tools;
        pictures::decode(decoder, &picture.path, image).map_err(Box::new)?;
        let scale = f64::from(self.size) / f64::from(image.width.max(image.height));
        let [width, height] = [image.width, image.height]
            .map(|side| ((f64::from(side) * scale).round() as u32).clamp(1, self.size));
        small.pixels.resize(3 * (width * height) as usize, 0);
        let whole = Rect { left: 0, top: 0, width: image.width, height: image.height };
        renderer.resize(image, whole, Filter::Bilinear, [width, height], &mut small.pixels);
        let ground = MEAN.map(|mean| (255.0 * mean).round() as u8);
        out.as_chunks_mut::<3>().0.fill(ground);
        let row = 3 * width as usize;
        for (to, from) in
            out.chunks_exact_mut(3 * self.size as usize).zip(small.pixels.chunks_exact(row))
        {
            to[..row].copy_from_slice(from);
        }
        let objects = picture.objects.iter().map(|object| {
            let [left, top, width, height] = object.bounds;
            Object {
                class: object.category,
                corners: [left, top, left + width, top + height].map(|at| (at * scale) as f32),
                bounds: object.bounds,
                area: object.area,
                is_ignored: object.is_ignored,
                is_learned: self.learns_ignored || !object.is_ignored,
            }
        });
        Ok(Scene { name: picture.name.clone(), scale, objects: objects.collect() })
    }

    fn describe(&self) -> Map<String, Value> {
        self.description.clone()
    }
}
