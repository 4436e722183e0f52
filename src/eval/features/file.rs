//! Features as a `.safetensors` file, written while they are made: a set of any size in little memory.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use detco_shards::order::{Order, OrderError};
use detco_shards::stream::ShardSet;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};
use thiserror::Error;

use super::{FeaturesError, Look, Passed, Pool, pass};
use crate::export::{self, ExportError, whole};
use crate::model::Encoder;

/// Samples that go through the network together.
const BATCH: u64 = 128;

/// Why there is no file of features.
#[derive(Debug, Error)]
pub enum FileError {
    /// Samples gave no features.
    #[error(transparent)]
    Features(#[from] FeaturesError),
    /// The set is empty.
    #[error("the set cannot be read: {0}")]
    Order(#[from] OrderError),
    /// A tensor has no bytes.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The file could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What a file of features is to hold.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Levels, 2 for Res2 to 5 for Res5.
    pub levels: &'a [u8],
    /// How their maps become rows.
    pub pool: Pool,
    /// How samples are looked at.
    pub look: Look,
    /// At most this many samples, evenly spaced; 0 means all.
    pub samples_max: u64,
    /// Goes into the file's metadata.
    pub about: Map<String, Value>,
}

/// Writes the features of a set's samples.
///
/// The file holds `res2`..`res5`, those that were asked for, float32 `[n, d]`; `labels`, int64 `[n]`, -1 without a
/// class; and `keys`, the samples' keys as bytes, each ended by a zero. It appears whole or not at all; the same backbone and samples give the same bytes. Returns n and the width of each level;
/// `watch` hears of the samples done and of all.
///
/// # Errors
/// [`FileError`].
pub fn write(
    path: &Path,
    encoder: &Encoder,
    set: &Arc<ShardSet>,
    wanted: &Wanted<'_>,
    watch: &mut dyn FnMut(u64, u64),
) -> Result<(u64, Vec<i64>), FileError> {
    let Wanted { levels, pool, look, samples_max, about } = wanted;
    let most = if *samples_max == 0 { set.len() } else { *samples_max };
    let order = Order::spaced(set.len(), most, BATCH)?;
    let total = order.samples();
    let fault = |source| FileError::Write { path: path.to_path_buf(), source };
    let mut written = (0, Vec::new());
    whole::write(path, fault, |file| {
        let file = file.get_ref();
        let mut layout: Option<Layout> = None;
        let (mut done, mut keys, mut labels) = (0, Vec::new(), Vec::new());
        let top = levels.iter().copied().max().unwrap_or(5);
        pass(encoder, (set, order), look, top, &mut |passed: Passed| {
            let n = passed.ids.len() as u64;
            let rows = levels.iter().map(|level| pool.rows(&passed.maps[usize::from(*level) - 2]));
            let rows = rows.collect::<Result<Vec<Tensor>, _>>().map_err(FeaturesError::from)?;
            let layout = layout.get_or_insert_with(|| {
                let widths = rows.iter().map(|rows| rows.size()[1]).collect();
                Layout::new(set, about, total, widths)
            });
            for (i, rows) in rows.iter().enumerate() {
                let bytes = export::bytes("features", &rows.to_kind(Kind::Float))?;
                file.write_all_at(&bytes, layout.row(i, done)).map_err(fault)?;
            }
            for (id, class) in passed.ids.iter().zip(&passed.classes) {
                labels.extend(class.map_or(-1, i64::from).to_le_bytes());
                keys.extend(set.place(*id).map_or("", |(_, key, _)| key).bytes());
                keys.push(0);
            }
            done += n;
            watch(done, total);
            Ok::<_, FileError>(())
        })?;
        let layout = layout.unwrap_or_else(|| Layout::new(set, about, total, Vec::new()));
        file.write_all_at(&labels, layout.labels()).map_err(fault)?;
        file.write_all_at(&keys, layout.keys()).map_err(fault)?;
        let head = layout.head(levels, keys.len() as u64, about, set.classes());
        file.write_all_at(&head, 0).map_err(fault)?;
        written = (done, layout.widths);
        Ok(())
    })?;
    Ok(written)
}

/// Where each tensor lies: labels, levels, keys, the widest elements first, without gaps. The header comes first but is
/// known last: room is left for it, and what it does not need of that is spaces, as the format allows.
struct Layout {
    n: u64,
    /// Bytes of the header, with its length.
    head: u64,
    widths: Vec<i64>,
}

impl Layout {
    fn new(set: &ShardSet, about: &Map<String, Value>, n: u64, widths: Vec<i64>) -> Layout {
        // JSON within a string of JSON: at most 7 bytes for one.
        let about = 7 * Value::Object(about.clone()).to_string().len();
        let names: usize = set.classes().iter().map(|name| 7 * name.len() + 8).sum();
        Layout { n, head: ((names + about) as u64 + 16_384).next_multiple_of(8), widths }
    }

    fn labels(&self) -> u64 {
        self.head
    }

    fn row(&self, level: usize, row: u64) -> u64 {
        let numbers: u64 = self.widths[..level].iter().map(|width| self.n * *width as u64).sum();
        self.labels()
            + 8 * self.n
            + 4 * (numbers + row * self.widths.get(level).map_or(0, |w| *w as u64))
    }

    fn keys(&self) -> u64 {
        self.row(self.widths.len(), 0)
    }

    fn head(
        &self,
        levels: &[u8],
        keys: u64,
        about: &Map<String, Value>,
        classes: &[String],
    ) -> Vec<u8> {
        let entry = |dtype: &str, shape: &[i64], start: u64, bytes: u64| {
            let start = start - self.head;
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, start + bytes] })
        };
        let mut header = Map::new();
        // Values are strings by the format; "format": "pt" is what Hugging Face's loaders look for.
        let about = Value::Object(about.clone()).to_string();
        let classes = json!(classes).to_string();
        header.insert(
            "__metadata__".into(),
            json!({ "format": "pt", "detco": about, "classes": classes }),
        );
        for (i, (level, width)) in levels.iter().zip(&self.widths).enumerate() {
            let bytes = self.n * *width as u64 * 4;
            let rows = self.n as i64;
            header.insert(
                format!("res{level}"),
                entry("F32", &[rows, *width], self.row(i, 0), bytes),
            );
        }
        header.insert("labels".into(), entry("I64", &[self.n as i64], self.labels(), 8 * self.n));
        header.insert("keys".into(), entry("U8", &[keys as i64], self.keys(), keys));
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize((self.head - 8) as usize, b' ');
        let mut bytes = (self.head - 8).to_le_bytes().to_vec();
        bytes.append(&mut text);
        bytes
    }
}
