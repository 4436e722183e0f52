//! Reads what is there and what was detected: COCO's JSON, and VOC's folders.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use super::{Box4, Detection, Object, Truth};

/// Why truth or detections cannot be used.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not JSON, or JSON of another form.
    #[error("{}: {source}; expected {expected}", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where in it, and why.
        source: serde_json::Error,
        /// What it should be.
        expected: &'static str,
    },
    /// An annotation file is not VOC's.
    #[error("{}: {source}; expected an annotation of PASCAL VOC", path.display())]
    Xml {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: quick_xml::DeError,
    },
    /// An entry does not fit.
    #[error("{}: {place}: {fault}", path.display())]
    Entry {
        /// Which file.
        path: PathBuf,
        /// Which entry: `annotation 3`, `line 7`.
        place: String,
        /// What is wrong with it.
        fault: String,
    },
}

/// What a file of COCO's annotations should be.
const INSTANCES: &str =
    "COCO annotations: an object with images, categories and annotations with a bbox";

/// COCO's annotations, of what is used here.
#[derive(Deserialize)]
struct Instances {
    images: Vec<CocoImage>,
    categories: Vec<Category>,
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: i64,
    #[serde(default)]
    file_name: String,
}

#[derive(Deserialize)]
struct Category {
    id: i64,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Annotation {
    image_id: i64,
    category_id: i64,
    bbox: Box4,
    area: Option<f64>,
    #[serde(default)]
    iscrowd: u8,
}

/// COCO's results.
#[derive(Deserialize)]
struct Found {
    image_id: i64,
    category_id: i64,
    bbox: Box4,
    score: f64,
}

pub(in crate::eval) fn bytes(path: &Path) -> Result<Vec<u8>, ReadError> {
    std::fs::read(path).map_err(|source| ReadError::Io { path: path.to_path_buf(), source })
}

pub(in crate::eval) fn entry(path: &Path, place: String, fault: impl Into<String>) -> ReadError {
    ReadError::Entry { path: path.to_path_buf(), place, fault: fault.into() }
}

/// Whether a box has finite numbers and no side below zero.
fn is_box(bounds: Box4) -> bool {
    bounds.iter().all(|number| number.is_finite()) && bounds[2] >= 0.0 && bounds[3] >= 0.0
}

/// Reads annotations in COCO's format for detection (`instances_val2017.json`). Images and categories come in the
/// order of their numbers.
///
/// # Errors
/// When the file cannot be read, is not of this form, or names an image or category that it does not list.
pub fn coco_truth(path: &Path) -> Result<Truth, ReadError> {
    let expected = INSTANCES;
    let parsed = serde_json::from_slice(&bytes(path)?);
    let Instances { images, categories, annotations } =
        parsed.map_err(|source| ReadError::Json { path: path.to_path_buf(), source, expected })?;
    let mut ids: Vec<i64> = images.iter().map(|image| image.id).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut kinds: Vec<(i64, String)> =
        categories.into_iter().map(|category| (category.id, category.name)).collect();
    kinds.sort_by_key(|(id, _)| *id);
    if let Some(pair) = kinds.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(entry(path, format!("category {}", pair[0].0), "listed twice"));
    }
    let objects = annotations.iter().enumerate().map(|(i, one)| {
        let place = || format!("annotation {i}");
        let image = ids.binary_search(&one.image_id);
        let image = image.map_err(|_| {
            entry(path, place(), format!("image_id {} is not among the images", one.image_id))
        })?;
        let category = kinds.binary_search_by_key(&one.category_id, |(id, _)| *id);
        let category = category.map_err(|_| {
            entry(
                path,
                place(),
                format!("category_id {} is not among the categories", one.category_id),
            )
        })?;
        let area = one.area.unwrap_or(one.bbox[2] * one.bbox[3]);
        if !is_box(one.bbox) || !area.is_finite() {
            return Err(entry(
                path,
                place(),
                "expected bbox = [left, top, width, height] and a finite area",
            ));
        }
        Ok(Object { image, category, bounds: one.bbox, area, is_ignored: one.iscrowd != 0 })
    });
    let objects = objects.collect::<Result<_, _>>()?;
    let images = ids.iter().map(ToString::to_string).collect();
    Ok(Truth { images, categories: kinds, objects })
}

/// Reads the boxes of COCO's annotations by the name of the image's file, crowds left out.
///
/// # Errors
/// As [`coco_truth`].
pub fn coco_boxes(path: &Path) -> Result<HashMap<String, Vec<Box4>>, ReadError> {
    let parsed = serde_json::from_slice(&bytes(path)?);
    let Instances { images, annotations, .. } = parsed.map_err(|source| ReadError::Json {
        path: path.to_path_buf(),
        source,
        expected: INSTANCES,
    })?;
    let names: HashMap<i64, &str> =
        images.iter().map(|image| (image.id, image.file_name.as_str())).collect();
    let mut boxes: HashMap<String, Vec<Box4>> =
        images.iter().map(|image| (image.file_name.clone(), Vec::new())).collect();
    for (i, one) in annotations.iter().enumerate().filter(|(_, one)| one.iscrowd == 0) {
        let place = || format!("annotation {i}");
        let name = names.get(&one.image_id).ok_or_else(|| {
            entry(path, place(), format!("image_id {} is not among the images", one.image_id))
        })?;
        if !is_box(one.bbox) {
            return Err(entry(path, place(), "expected bbox = [left, top, width, height]"));
        }
        boxes.entry((*name).to_owned()).or_default().push(one.bbox);
    }
    Ok(boxes)
}

/// Reads detections in COCO's format: a list of `{image_id, category_id, bbox, score}`. Those of categories that
/// `truth` has not are left out, as pycocotools does; their number comes second.
///
/// # Errors
/// When the file cannot be read, is not of this form, or names an image that `truth` has not.
pub fn coco_found(path: &Path, truth: &Truth) -> Result<(Vec<Detection>, usize), ReadError> {
    let expected = "COCO results: a list of objects with image_id, category_id, bbox and score";
    let parsed: Result<Vec<Found>, _> = serde_json::from_slice(&bytes(path)?);
    let parsed =
        parsed.map_err(|source| ReadError::Json { path: path.to_path_buf(), source, expected })?;
    let images: HashMap<&str, usize> =
        truth.images.iter().zip(0..).map(|(name, at)| (name.as_str(), at)).collect();
    let (mut found, mut unknown) = (Vec::with_capacity(parsed.len()), 0);
    for (i, one) in parsed.iter().enumerate() {
        let place = || format!("detection {i}");
        let Some(image) = images.get(one.image_id.to_string().as_str()) else {
            let fault = format!("image_id {} is not an image of the truth", one.image_id);
            return Err(entry(path, place(), fault));
        };
        if !is_box(one.bbox) || !one.score.is_finite() {
            let fault = "expected bbox = [left, top, width, height] and a finite score";
            return Err(entry(path, place(), fault));
        }
        match truth.categories.binary_search_by_key(&one.category_id, |(id, _)| *id) {
            Ok(category) => {
                let (image, bounds, score) = (*image, one.bbox, one.score);
                found.push(Detection { image, category, bounds, score });
            }
            Err(_) => unknown += 1,
        }
    }
    Ok((found, unknown))
}

/// An annotation of VOC, of what is used here.
#[derive(Deserialize)]
struct VocAnnotation {
    #[serde(default)]
    object: Vec<VocObject>,
}

#[derive(Deserialize)]
struct VocObject {
    name: String,
    #[serde(default)]
    difficult: u8,
    bndbox: Corners,
}

#[derive(Deserialize)]
struct Corners {
    xmin: f64,
    ymin: f64,
    xmax: f64,
    ymax: f64,
}

/// The pixels that a box of VOC covers: VOC counts them from 1, and a box holds those at both of its ends.
pub fn voc_pixels([left, top, width, height]: Box4) -> Box4 {
    [left - 1.0, top - 1.0, width + 1.0, height + 1.0]
}

impl Corners {
    /// The box, if its corners are in order. Its width is that between pixels' centres.
    fn bounds(&self) -> Option<Box4> {
        let bounds = [self.xmin, self.ymin, self.xmax - self.xmin, self.ymax - self.ymin];
        is_box(bounds).then_some(bounds)
    }
}

/// Reads the names of the images of a split of PASCAL VOC, `ImageSets/Main/SPLIT.txt`, in its order.
///
/// # Errors
/// When the file cannot be read, or names an image twice.
pub fn voc_images(folder: &Path, split: &str) -> Result<Vec<String>, ReadError> {
    let list = folder.join("ImageSets/Main").join(format!("{split}.txt"));
    let text = String::from_utf8_lossy(&bytes(&list)?).into_owned();
    let images: Vec<String> =
        text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    match first_twice(&images) {
        Some(twice) => Err(entry(&list, format!("image {twice}"), "listed twice")),
        None => Ok(images),
    }
}

/// Reads a folder of PASCAL VOC such as `VOCdevkit/VOC2007`: the images of `ImageSets/Main/SPLIT.txt` and their
/// `Annotations`. Categories come in the order of their names.
///
/// # Errors
/// When a file cannot be read or is not of this form.
pub fn voc_truth(folder: &Path, split: &str) -> Result<Truth, ReadError> {
    let images = voc_images(folder, split)?;
    let (mut objects, mut names) = (Vec::new(), Vec::new());
    for (image, name) in images.iter().enumerate() {
        let path = folder.join("Annotations").join(format!("{name}.xml"));
        for (name, bounds, is_ignored) in voc_objects(&path)? {
            names.push(name);
            let area = bounds[2] * bounds[3];
            objects.push(Object { image, category: 0, bounds, area, is_ignored });
        }
    }
    let mut categories: Vec<String> =
        names.iter().cloned().collect::<HashSet<_>>().into_iter().collect();
    categories.sort_unstable();
    for (object, name) in objects.iter_mut().zip(&names) {
        // It is among them: they were made of these names.
        object.category = categories.partition_point(|category| category < name);
    }
    let categories = (1..).zip(categories).collect();
    Ok(Truth { images, categories, objects })
}

/// Reads an annotation of VOC: of each object its class, box, and whether it is difficult.
///
/// # Errors
/// When the file cannot be read or is not of this form.
pub fn voc_objects(path: &Path) -> Result<Vec<(String, Box4, bool)>, ReadError> {
    let text = String::from_utf8_lossy(&bytes(path)?).into_owned();
    let parsed: VocAnnotation = quick_xml::de::from_str(&text)
        .map_err(|source| ReadError::Xml { path: path.to_path_buf(), source })?;
    let object = |(i, object): (usize, VocObject)| {
        let fault = "expected xmin <= xmax and ymin <= ymax";
        let bounds = object.bndbox.bounds();
        let bounds = bounds.ok_or_else(|| entry(path, format!("object {i}"), fault))?;
        Ok((object.name, bounds, object.difficult != 0))
    };
    parsed.object.into_iter().enumerate().map(object).collect()
}

fn first_twice(names: &[String]) -> Option<&String> {
    let mut seen = HashSet::new();
    names.iter().find(|name| !seen.insert(name.as_str()))
}

/// Reads detections as VOC's development kits do: a folder of text files, one a category, whose names end in
/// `_CATEGORY.txt` (`comp4_det_test_dog.txt`), with lines `image score xmin ymin xmax ymax`. Detections of images that
/// `truth` has not are left out; their number comes second.
///
/// # Errors
/// When a file cannot be read, a line is not of this form, or no file is of a category of `truth`.
pub fn voc_found(folder: &Path, truth: &Truth) -> Result<(Vec<Detection>, usize), ReadError> {
    let io = |source| ReadError::Io { path: folder.to_path_buf(), source };
    let mut files: Vec<PathBuf> = Vec::new();
    for file in std::fs::read_dir(folder).map_err(io)? {
        files.push(file.map_err(io)?.path());
    }
    files.sort_unstable();
    let images: HashMap<&str, usize> =
        truth.images.iter().zip(0..).map(|(name, at)| (name.as_str(), at)).collect();
    let (mut found, mut unknown, mut seen) = (Vec::new(), 0, HashMap::<usize, PathBuf>::new());
    for path in files {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(stem) = name.strip_suffix(".txt") else { continue };
        let is_of = |(_, category): &(i64, String)| {
            stem == category
                || stem.strip_suffix(category.as_str()).is_some_and(|head| head.ends_with('_'))
        };
        let Some(category) = truth.categories.iter().position(is_of) else { continue };
        if let Some(other) = seen.insert(category, path.clone()) {
            let fault = format!("{} is of the same category", other.display());
            return Err(entry(&path, "the file".to_owned(), fault));
        }
        let text = String::from_utf8_lossy(&bytes(&path)?).into_owned();
        for (number, line) in (1..).zip(text.lines()) {
            let mut words = line.split_whitespace();
            let Some(image) = words.next() else { continue };
            let numbers: Option<Vec<f64>> = words.map(|word| word.parse().ok()).collect();
            let parsed = match numbers.as_deref() {
                Some([score, xmin, ymin, xmax, ymax]) if score.is_finite() => {
                    let corners = Corners { xmin: *xmin, ymin: *ymin, xmax: *xmax, ymax: *ymax };
                    corners.bounds().map(|bounds| (*score, bounds))
                }
                _ => None,
            };
            let (score, bounds) = parsed.ok_or_else(|| {
                entry(&path, format!("line {number}"), "expected: image score xmin ymin xmax ymax")
            })?;
            match images.get(image) {
                Some(image) => found.push(Detection { image: *image, category, bounds, score }),
                None => unknown += 1,
            }
        }
    }
    if seen.is_empty() {
        let fault = "no file ends in _CATEGORY.txt of a category that is there, such as comp4_det_test_dog.txt";
        return Err(entry(folder, "the folder".to_owned(), fault));
    }
    Ok((found, unknown))
}
