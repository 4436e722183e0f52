//! PASCAL VOC as a classification set: which image shows which classes.
//!
//! Read from `ImageSets/Main/CLASS_SPLIT.txt` of a folder such as `VOCdevkit/VOC2007`, as it comes: lines of an image
//! and 1 (the class is there), -1 (it is not) or 0 (only in objects marked as difficult).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::ap::ReadError;
use super::ap::read::{bytes, entry};
use super::ap::voc_images;
use super::svm::Label;

/// Images of VOC 2007's trainval and test.
pub const IMAGES_2007: [(&str, usize); 2] = [("trainval", 5011), ("test", 4952)];

/// A split's images and what they show.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// Names of the images, in the split's order.
    pub images: Vec<String>,
    /// Names of the classes, sorted.
    pub classes: Vec<String>,
    /// Of each class a label an image.
    pub labels: Vec<Vec<Label>>,
}

impl Split {
    /// Reads a split.
    ///
    /// # Errors
    /// When a file cannot be read or has a line of another form, when a class's file lists other images than the
    /// split's, or when there is no class.
    pub fn read(folder: &Path, split: &str) -> Result<Split, ReadError> {
        let images = voc_images(folder, split)?;
        let lists = folder.join("ImageSets/Main");
        let io = |source| ReadError::Io { path: lists.clone(), source };
        let mut classes = Vec::new();
        for file in std::fs::read_dir(&lists).map_err(io)? {
            let name = file.map_err(io)?.file_name();
            let class = name.to_str().and_then(|name| name.strip_suffix(".txt"));
            let class = class.and_then(|name| name.strip_suffix(&format!("_{split}")));
            classes.extend(class.map(str::to_owned));
        }
        classes.sort_unstable();
        if classes.is_empty() {
            let fault = format!("no file CLASS_{split}.txt, such as aeroplane_{split}.txt");
            return Err(entry(&lists, "the folder".to_owned(), fault));
        }
        let places: HashMap<&str, usize> =
            images.iter().zip(0..).map(|(name, at)| (name.as_str(), at)).collect();
        let read = |class: &String| labels(&lists.join(format!("{class}_{split}.txt")), &places);
        let labels = classes.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Split { images, classes, labels })
    }

    /// The images' files.
    pub fn files(&self, folder: &Path) -> Vec<PathBuf> {
        let folder = folder.join("JPEGImages");
        self.images.iter().map(|name| folder.join(format!("{name}.jpg"))).collect()
    }

    /// Reads samples of a low-shot trial as FAIR publishes them: a JSON object of images, each an object of classes,
    /// each 1, 0 (a negative sample) or -1 (left out). Images that it does not name are left out.
    ///
    /// # Errors
    /// When the file cannot be read or has another form, or names an image or class that the split has not.
    pub fn targets(&self, file: &Path) -> Result<Vec<Vec<Label>>, ReadError> {
        let expected = "an object of images, each an object of classes with 1, 0 or -1";
        let parsed = serde_json::from_slice(&bytes(file)?);
        let parsed: BTreeMap<String, BTreeMap<String, i8>> = parsed
            .map_err(|source| ReadError::Json { path: file.to_path_buf(), source, expected })?;
        let places = self.places();
        let mut found = vec![vec![Label::Difficult; self.images.len()]; self.classes.len()];
        for (image, classes) in &parsed {
            let at = |fault: String| entry(file, format!("image {image}"), fault);
            let place = *places
                .get(image.as_str())
                .ok_or_else(|| at("is not in the split's list".to_owned()))?;
            for (name, target) in classes {
                let class = self.classes.binary_search(name);
                let class = class.map_err(|_| at(format!("there is no class {name}")))?;
                found[class][place] = match target {
                    1 => Label::Present,
                    0 => Label::Absent,
                    -1 => Label::Difficult,
                    other => return Err(at(format!("class {name}: {other}: expected 1, 0 or -1"))),
                };
            }
        }
        Ok(found)
    }

    /// Images by their place.
    fn places(&self) -> HashMap<&str, usize> {
        self.images.iter().zip(0..).map(|(name, at)| (name.as_str(), at)).collect()
    }
}

/// A class's labels in the order of `places`.
fn labels(file: &Path, places: &HashMap<&str, usize>) -> Result<Vec<Label>, ReadError> {
    let text = String::from_utf8_lossy(&bytes(file)?).into_owned();
    let mut found = vec![None; places.len()];
    for (number, line) in (1..).zip(text.lines()) {
        let at = |fault: String| entry(file, format!("line {number}"), fault);
        let mut words = line.split_whitespace();
        let Some(image) = words.next() else { continue };
        let label = match (words.next(), words.next()) {
            (Some("1"), None) => Label::Present,
            (Some("-1"), None) => Label::Absent,
            (Some("0"), None) => Label::Difficult,
            _ => return Err(at("expected an image and 1, -1 or 0".to_owned())),
        };
        let place = places.get(image);
        let place = place.ok_or_else(|| at(format!("image {image} is not in the split's list")))?;
        if found[*place].replace(label).is_some() {
            return Err(at(format!("image {image} is listed twice")));
        }
    }
    let missing = places.iter().filter(|(_, place)| found[**place].is_none());
    match missing.min_by_key(|(_, place)| **place) {
        Some((image, _)) => Err(entry(file, format!("image {image}"), "is not listed here")),
        None => Ok(found.into_iter().flatten().collect()),
    }
}
