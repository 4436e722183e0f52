//! Finished readings as files: what was measured once is not measured again.
//!
//! A reading's file is named by the digest of everything that it depends on, and holds that too. Readings of the random
//! initialisations are among them, so that they cost their time once an architecture and settings.

use std::path::{Path, PathBuf};

use detco_shards::files::{FileError, hex, write_atomically};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::run::Scores;

/// A folder of readings, or none: then nothing is kept.
#[derive(Clone, Debug, Default)]
pub struct Keep(Option<PathBuf>);

/// What a file holds, beside what the scores depend on, which is for people.
#[derive(Deserialize)]
struct Kept {
    /// Digest of what the scores depend on.
    key: String,
    scores: Scores,
}

impl Keep {
    /// In a folder, which is made when the first reading is finished.
    pub fn within(folder: &Path) -> Keep {
        Keep(Some(folder.to_path_buf()))
    }

    /// The scores that were found with exactly this, if they were kept. A file that cannot be read, or is of something
    /// else, counts as none.
    pub fn found(&self, of: &Value) -> Option<Scores> {
        let key = key(of);
        let bytes = std::fs::read(file(self.0.as_ref()?, &key)).ok()?;
        let kept: Kept = serde_json::from_slice(&bytes).ok()?;
        (kept.key == key).then_some(kept.scores)
    }

    /// Keeps scores. Returns them as they will be found: a number in JSON may lose its last bit.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&self, of: &Value, scores: &Scores) -> Result<Scores, FileError> {
        let Some(folder) = &self.0 else { return Ok(*scores) };
        std::fs::create_dir_all(folder).map_err(|source| FileError {
            path: folder.clone(),
            action: "create",
            source,
        })?;
        let key = key(of);
        let kept = format!("{:#}\n", serde_json::json!({ "key": key, "of": of, "scores": scores }));
        write_atomically(&file(folder, &key), kept.as_bytes())?;
        Ok(serde_json::from_str(&kept).map_or(*scores, |kept: Kept| kept.scores))
    }
}

/// serde_json's maps are sorted by key: equal values have equal text.
fn key(of: &Value) -> String {
    hex(&Sha256::digest(of.to_string()))
}

fn file(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{}.json", &key[..32]))
}
