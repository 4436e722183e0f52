//! Scenes and detections as files: shards of unlabelled composites, and COCO's JSON.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use detco_shards::files::{FileError, hex, write_atomically};
use detco_shards::format::ShardError;
use detco_shards::format::manifest::{FORMAT, Manifest, Part, STATE_FOLDER, ShardRecord};
use detco_shards::format::writer::ShardWriter;
use detco_shards::pipe::side_by_side;
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::SceneError;
use super::run::Detected;
use super::sources::{Source, Split, Tools};

/// Quality of the JPEGs, without chroma subsampling: that of `detco pack` for what it must encode.
pub const QUALITY: u8 = 95;

/// Why scenes cannot be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The folder has something in it.
    #[error("{} is not empty: choose another folder, or remove it", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// A scene cannot be made.
    #[error(transparent)]
    Scene(#[from] SceneError),
    /// A shard cannot be written.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The file system refused something.
    #[error(transparent)]
    File(#[from] FileError),
    /// A JPEG cannot be encoded.
    #[error("scene {index}: {source}")]
    Encode {
        /// The scene.
        index: u64,
        /// Why.
        source: image::ImageError,
    },
}

/// Writes `count` unlabelled scenes into shards of `each`, and their manifest, on `workers` threads; `tick` hears how
/// many are done. The number of threads does not change a byte. A folder that was begun and not finished is refused as
/// a data set.
///
/// # Errors
/// When the folder is not empty, a scene cannot be made, or the file system refuses something.
pub fn write_shards(
    source: &dyn Source,
    folder: &Path,
    (count, each): (u64, u64),
    workers: usize,
    tick: &(dyn Fn(u64) + Sync),
) -> Result<Manifest, WriteError> {
    let refused = |action: &'static str| {
        move |source| FileError { path: folder.to_path_buf(), action, source }
    };
    std::fs::create_dir_all(folder).map_err(refused("create"))?;
    if std::fs::read_dir(folder).map_err(refused("list"))?.next().is_some() {
        return Err(WriteError::NotEmpty { path: folder.to_path_buf() });
    }
    let state = folder.join(STATE_FOLDER);
    std::fs::create_dir(&state).map_err(refused("create a folder in"))?;
    let shards = count.div_ceil(each);
    let (next, done, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let results = Mutex::new(Vec::new());
    let started = side_by_side(workers.max(1), &stop, || {
        let mut tools = Tools::new();
        while !stop.load(Ordering::Relaxed) {
            let shard = next.fetch_add(1, Ordering::Relaxed);
            if shard >= shards {
                break;
            }
            let range = shard * each..((shard + 1) * each).min(count);
            let tick = || tick(done.fetch_add(1, Ordering::Relaxed) + 1);
            let result = write_shard(source, folder, shard, range, &mut tools, &tick);
            stop.fetch_or(result.is_err(), Ordering::Relaxed);
            // A poisoned lock means that a sibling panicked; the scope passes that on.
            results.lock().unwrap_or_else(|poison| poison.into_inner()).push((shard, result));
        }
    });
    started.map_err(|source| SceneError::Thread { source })?;
    let mut results = results.into_inner().unwrap_or_else(|poison| poison.into_inner());
    results.sort_by_key(|(shard, _)| *shard);
    let shards: Vec<ShardRecord> =
        results.into_iter().map(|(_, record)| record).collect::<Result<_, _>>()?;
    let mut options = source.describe();
    options.insert("source".to_owned(), source.name().into());
    options.insert("split".to_owned(), Split::Unlabelled.name().into());
    options.insert("quality".to_owned(), QUALITY.into());
    let options = Value::Object(options);
    let digest = Sha256::digest(options.to_string());
    let manifest = Manifest {
        format: FORMAT,
        samples: count,
        bytes: shards.iter().map(|shard| shard.bytes).sum(),
        members_per_sample: 1,
        part: Part::WHOLE,
        source_sha256: hex(&digest),
        options,
        classes: Vec::new(),
        class_samples: Vec::new(),
        oddities: [].into(),
        skipped: 0,
        shards,
    };
    manifest.write(folder)?;
    std::fs::remove_dir(&state).map_err(refused("remove a folder in"))?;
    Ok(manifest)
}

fn write_shard(
    source: &dyn Source,
    folder: &Path,
    shard: u64,
    range: std::ops::Range<u64>,
    tools: &mut Tools,
    tick: &dyn Fn(),
) -> Result<ShardRecord, WriteError> {
    let size = source.size();
    let mut pixels = vec![0; 3 * (size * size) as usize];
    let mut bytes = Vec::new();
    let mut writer = ShardWriter::create(folder, &format!("{shard:06}.tar"))?;
    for index in range {
        source.scene(Split::Unlabelled, index as usize, tools, &mut pixels)?;
        bytes.clear();
        JpegEncoder::new_with_quality(&mut bytes, QUALITY)
            .encode(&pixels, size, size, ExtendedColorType::Rgb8)
            .map_err(|source| WriteError::Encode { index, source })?;
        writer.append(&format!("{index:08}.jpg"), &bytes)?;
        tick();
    }
    Ok(writer.finish()?.seal()?)
}

/// Writes detections as COCO's results to `path`, and what is there as COCO's annotations beside it: the name with
/// `.truth.json` in place of `.json`, which is returned.
///
/// # Errors
/// When a file cannot be written.
pub fn write_detections(path: &Path, detected: &Detected) -> Result<PathBuf, FileError> {
    let Detected { truth, found } = detected;
    let numbers: Option<Vec<i64>> = truth.images.iter().map(|name| name.parse().ok()).collect();
    // Names that are no numbers get their positions, as COCO's format wants numbers.
    let numbers = numbers.unwrap_or_else(|| (1..=truth.images.len() as i64).collect());
    let category = |position: usize| truth.categories[position].0;
    let results: Vec<Value> = found
        .iter()
        .map(|one| {
            json!({
                "image_id": numbers[one.image],
                "category_id": category(one.category),
                "bbox": one.bounds,
                "score": one.score,
            })
        })
        .collect();
    let annotations = (1..).zip(&truth.objects).map(|(id, object): (i64, _)| {
        json!({
            "id": id,
            "image_id": numbers[object.image],
            "category_id": category(object.category),
            "bbox": object.bounds,
            "area": object.area,
            "iscrowd": u8::from(object.is_ignored),
        })
    });
    let images =
        numbers.iter().zip(&truth.images).map(|(id, name)| json!({ "id": id, "file_name": name }));
    let categories = truth.categories.iter().map(|(id, name)| json!({ "id": id, "name": name }));
    let mut there = Map::new();
    there.insert("images".to_owned(), images.collect());
    there.insert("categories".to_owned(), categories.collect());
    there.insert("annotations".to_owned(), annotations.collect());
    let beside = path.with_extension("truth.json");
    write_atomically(path, Value::Array(results).to_string().as_bytes())?;
    write_atomically(&beside, Value::Object(there).to_string().as_bytes())?;
    Ok(beside)
}
