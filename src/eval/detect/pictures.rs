//! Pictures of composite scenes, in memory: small labelled ones to paste, photos to paste them on.

use std::sync::Arc;

use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions};
use detco_shards::stream::ShardSet;
use detco_shards::views::{IMAGE, Recipe};

use super::SceneError;
use crate::eval::features::place_of;

/// Square pictures `[n, edge, edge, 3]` of one edge, in bytes.
#[derive(Clone, Debug, Default)]
pub struct Pictures {
    /// Edge in pixels.
    pub edge: u32,
    /// All of them, one after the other.
    pub pixels: Vec<u8>,
    /// The class number of each; empty where nobody asked for classes.
    pub classes: Vec<u32>,
}

impl Pictures {
    /// Reads the middle square of each picture of a set, resized to `edge` x `edge`, but of at most `most` pictures,
    /// evenly spaced. With `labelled` each needs a class. `which` names the set in errors.
    ///
    /// # Errors
    /// When a picture cannot be read or decoded, or has no class where it needs one.
    pub fn read(
        which: &'static str,
        set: &Arc<ShardSet>,
        (edge, most): (u32, u64),
        labelled: bool,
        workers: usize,
    ) -> Result<Pictures, SceneError> {
        let order = Order::spaced(set.len(), most, 64)
            .map_err(|source| SceneError::Order { which, source })?;
        let loading = LoaderOptions {
            workers,
            labels: labelled,
            ..LoaderOptions::evaluate(Recipe::center(edge, 1.0), order)
        };
        let pipeline = |source| SceneError::Pipeline { which, source: Box::new(source) };
        let loader = Loader::start(Arc::clone(set), loading).map_err(pipeline)?;
        let mut all = Pictures { edge, ..Pictures::default() };
        for batch in loader {
            let batch = batch.map_err(pipeline)?;
            all.pixels.extend_from_slice(batch.view(IMAGE, 0));
            if !labelled {
                continue;
            }
            let classes = batch
                .labels()
                .map_err(|source| SceneError::Class { which, source: Box::new(source) })?;
            for (id, class) in batch.samples.iter().zip(classes) {
                all.classes.push(class.ok_or_else(|| {
                    let (shard, key) = place_of(set, *id);
                    SceneError::NoClass { which, shard, key }
                })?);
            }
        }
        Ok(all)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pixels.len().checked_div(self.bytes()).unwrap_or(0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    fn bytes(&self) -> usize {
        3 * self.edge as usize * self.edge as usize
    }

    /// The pixels of one.
    ///
    /// # Panics
    /// Where there is no such picture.
    pub fn get(&self, index: usize) -> &[u8] {
        &self.pixels[index * self.bytes()..][..self.bytes()]
    }

    /// Deals every `nth` picture, beginning with number `nth - 1`, out to the second set.
    pub fn split(&self, nth: usize) -> [Pictures; 2] {
        let mut parts = [(); 2].map(|()| Pictures { edge: self.edge, ..Pictures::default() });
        for index in 0..self.len() {
            let part = &mut parts[usize::from(index % nth == nth - 1)];
            part.pixels.extend_from_slice(self.get(index));
            part.classes.extend(self.classes.get(index));
        }
        parts
    }
}
