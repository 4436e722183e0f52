//! Subsets of COCO annotations by image: the 1, 2, 5 and 10 % of labels that detectors are fine-tuned with.
//!
//! A subset is a file of COCO annotations of its own, so that every engine, and each of its processes, trains on the
//! same images. Images are drawn by their numbers alone, not by their place in the file, uniformly and without
//! replacement; of one seed the smaller subset is part of the larger one. What a subset keeps it keeps byte for byte.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::{Deserialize as FromJson, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::draws::Draws;

/// Why there is no subset.
#[derive(Debug, Error)]
pub enum SubsetError {
    /// The file is not JSON, or JSON of another form.
    #[error(
        "{}: {source}; expected COCO annotations: an object with the lists images and annotations",
        path.display()
    )]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where in it, and why.
        source: serde_json::Error,
    },
    /// A list is not there.
    #[error("{}: there is no list {name}: expected COCO annotations", path.display())]
    Missing {
        /// Which file.
        path: PathBuf,
        /// The list.
        name: &'static str,
    },
    /// An entry does not fit.
    #[error("{}: {list} {at}: {fault}", path.display())]
    Entry {
        /// Which file.
        path: PathBuf,
        /// Which list.
        list: &'static str,
        /// Place in it, from 0.
        at: usize,
        /// What is wrong with it.
        fault: String,
    },
    /// So few percent are no image.
    #[error("{percent} % of {images} images are none: ask for more")]
    Empty {
        /// Asked for.
        percent: f64,
        /// Images to draw from.
        images: usize,
    },
}

/// Which images can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// All that the file lists, those without annotations too.
    AllImages,
    /// Those with an annotation that is not a crowd, as detectron2 trains on them.
    AnnotatedImages,
}

/// COCO annotations as pieces of their own text.
#[derive(Debug)]
pub struct Source<'a> {
    /// Everything in the file's order; the two lists are cut up below.
    members: Vec<(String, &'a RawValue)>,
    images: Vec<(i64, &'a RawValue)>,
    annotations: Vec<(i64, &'a RawValue)>,
    /// Images with an annotation that is not a crowd.
    annotated: HashSet<i64>,
}

/// The members of an object, in order.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;
            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        from.deserialize_map(Object)
    }
}

#[derive(FromJson)]
struct OfImage {
    id: i64,
}

#[derive(FromJson)]
struct OfAnnotation {
    image_id: i64,
    #[serde(default)]
    iscrowd: u8,
}

impl<'a> Source<'a> {
    /// Reads the bytes of a file; `path` is for errors.
    ///
    /// # Errors
    /// [`SubsetError`] but for the empty one.
    pub fn parse(path: &Path, bytes: &'a [u8]) -> Result<Source<'a>, SubsetError> {
        let json = |source| SubsetError::Json { path: path.to_path_buf(), source };
        let Members(members) = serde_json::from_slice(bytes).map_err(json)?;
        let list = |name: &'static str| {
            let found = members.iter().find(|(found, _)| found == name);
            let (_, raw) =
                found.ok_or_else(|| SubsetError::Missing { path: path.to_path_buf(), name })?;
            serde_json::from_str::<Vec<&'a RawValue>>(raw.get()).map_err(json)
        };
        let entry = |list, at, fault: String| {
            let path = path.to_path_buf();
            SubsetError::Entry { path, list, at, fault }
        };
        let (mut images, mut known) = (Vec::new(), HashSet::new());
        for (at, raw) in list("images")?.into_iter().enumerate() {
            let parsed: Result<OfImage, _> = serde_json::from_str(raw.get());
            let OfImage { id } = parsed.map_err(|error| entry("images", at, error.to_string()))?;
            if !known.insert(id) {
                return Err(entry("images", at, format!("the id {id} is listed twice")));
            }
            images.push((id, raw));
        }
        let (mut annotations, mut annotated) = (Vec::new(), HashSet::new());
        for (at, raw) in list("annotations")?.into_iter().enumerate() {
            let parsed: Result<OfAnnotation, _> = serde_json::from_str(raw.get());
            let one = parsed.map_err(|error| entry("annotations", at, error.to_string()))?;
            if !known.contains(&one.image_id) {
                let fault = format!("image_id {} is not among the images", one.image_id);
                return Err(entry("annotations", at, fault));
            }
            if one.iscrowd == 0 {
                annotated.insert(one.image_id);
            }
            annotations.push((one.image_id, raw));
        }
        Ok(Source { members, images, annotations, annotated })
    }

    /// Images in the file.
    pub fn images(&self) -> usize {
        self.images.len()
    }

    /// Annotations in the file.
    pub fn annotations(&self) -> usize {
        self.annotations.len()
    }

    /// Images with an annotation that is not a crowd.
    pub fn annotated(&self) -> usize {
        self.annotated.len()
    }

    /// Images that can be drawn, in the order of this seed: the subset of p % is the first p % of them.
    pub fn order(&self, pool: Pool, seed: u64) -> Vec<i64> {
        let mut ids: Vec<i64> = self.images.iter().map(|(id, _)| *id).collect();
        if pool == Pool::AnnotatedImages {
            ids.retain(|id| self.annotated.contains(id));
        }
        ids.sort_unstable();
        let places = Draws::new(seed, "subset", 0).permutation(ids.len());
        places.into_iter().map(|place| ids[place as usize]).collect() // a permutation of 0..len
    }

    /// The annotations of some images as a file of the same form: entries as they are, in their order.
    pub fn subset(&self, images: &[i64]) -> Subset {
        let kept: HashSet<i64> = images.iter().copied().collect();
        let mut counts = HashMap::new();
        let mut json = String::from("{");
        for (at, (name, raw)) in self.members.iter().enumerate() {
            let before = if at == 0 { "" } else { "," };
            json += &format!("{before}\n{}: ", serde_json::Value::from(name.as_str()));
            let list = match name.as_str() {
                "images" => &self.images,
                "annotations" => &self.annotations,
                _ => {
                    json += raw.get();
                    continue;
                }
            };
            let entries = list.iter().filter(|(id, _)| kept.contains(id)).map(|(_, raw)| raw.get());
            json.push('[');
            let mut count = 0;
            for entry in entries {
                json += if count == 0 { "\n" } else { ",\n" };
                json += entry;
                count += 1;
            }
            json.push(']');
            counts.insert(name.as_str(), count);
        }
        json += "\n}\n";
        let count = |name| counts.get(name).copied().unwrap_or(0);
        let unannotated = kept.iter().filter(|id| !self.annotated.contains(id)).count();
        Subset { images: count("images"), annotations: count("annotations"), unannotated, json }
    }
}

/// A subset's file.
#[derive(Debug)]
pub struct Subset {
    /// Images.
    pub images: usize,
    /// Annotations.
    pub annotations: usize,
    /// Images without an annotation, or with crowds alone.
    pub unannotated: usize,
    /// The file.
    pub json: String,
}

/// Images in a subset: ⌊p / 100 · n⌋.
///
/// # Errors
/// [`SubsetError::Empty`].
pub fn size(percent: f64, images: usize) -> Result<usize, SubsetError> {
    // Of a product that rounding left just below a whole number, the whole number.
    let size = (percent * images as f64 / 100.0 + 1e-9).floor() as usize;
    if size == 0 { Err(SubsetError::Empty { percent, images }) } else { Ok(size.min(images)) }
}

/// SHA-256 in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    detco_shards::files::hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_coco() {
        let of = [1.0, 2.0, 5.0, 10.0].map(|percent| size(percent, 118_287).unwrap());
        assert_eq!(of, [1182, 2365, 5914, 11828]);
        assert_eq!(size(0.3, 1000).unwrap(), 3);
        assert_eq!(size(100.0, 7).unwrap(), 7);
        assert!(size(1.0, 99).unwrap_err().to_string().contains("1 % of 99 images are none"));
    }

    #[test]
    fn the_order_is_the_files_no_more() {
        let file = |ids: &[i64]| {
            let images: Vec<String> = ids.iter().map(|id| format!("{{\"id\": {id}}}")).collect();
            format!("{{\"images\": [{}], \"annotations\": []}}", images.join(","))
        };
        let (up, down): (Vec<i64>, Vec<i64>) = ((1..=50).collect(), (1..=50).rev().collect());
        let (up, down) = (file(&up), file(&down));
        let read = |text: &str| {
            let source = Source::parse(Path::new("f.json"), text.as_bytes()).unwrap();
            [0, 1].map(|seed| source.order(Pool::AllImages, seed))
        };
        assert_eq!(read(&up), read(&down));
        let [first, second] = read(&up);
        assert_ne!(first, second);
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, (1..=50).collect::<Vec<i64>>());
    }
}
