//! A fixed amount of the loader's kind of work, done with nothing of the loader's: what the machine
//! is worth at the moment.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use detco_shards::decode::{Decoder, Image};
use detco_shards::stream::ShardSet;
use detco_shards::views::{Recipe, Renderer};

/// Decoders, renderers and pixels of its own, made once. A measure decodes the same images and
/// renders the same views each time, by as many threads as the loader has.
pub(crate) struct Yardstick {
    images: u64,
    recipe: Recipe,
    workers: Vec<Worker>,
}

struct Worker {
    decoder: Decoder,
    image: Image,
    renderer: Renderer,
    /// As many views as a slab of the loader holds, so that both write to memory and not to the
    /// processor's cache.
    pixels: Vec<u8>,
}

impl Yardstick {
    /// The first `images` samples of the set (fewer if it has fewer), by `workers` threads, whose
    /// pixels hold `batch` samples.
    pub(crate) fn new(set: &ShardSet, images: u64, workers: usize, batch: u64) -> Yardstick {
        let recipe = Recipe::detco();
        let bytes = batch as usize * recipe.bytes();
        let workers = (0..workers).map(|_| Worker {
            decoder: Decoder::new(),
            image: Image::new(),
            renderer: Renderer::new(),
            pixels: vec![0; bytes],
        });
        Yardstick { images: images.min(set.len()), workers: workers.collect(), recipe }
    }

    /// Does the work, and says how many images it was (damaged ones count: they are the same ones
    /// each time).
    pub(crate) fn measure(&mut self, set: &ShardSet) -> u64 {
        let (recipe, images) = (&self.recipe, self.images);
        let next = AtomicU64::new(0);
        let failed = Mutex::new(None);
        std::thread::scope(|scope| {
            for worker in &mut self.workers {
                let (next, failed) = (&next, &failed);
                scope.spawn(move || {
                    let room = recipe.bytes();
                    for turn in 0.. {
                        let sample = next.fetch_add(1, Ordering::Relaxed);
                        if sample >= images {
                            return;
                        }
                        let slots = worker.pixels.len() / room;
                        if let Err(error) = worker.make(set, recipe, sample, turn % slots * room) {
                            *failed.lock().expect("nobody panics with it") = Some(error);
                            return;
                        }
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().expect("nobody panics with it") {
            panic!("a shard changed: {error}");
        }
        images
    }
}

impl Worker {
    fn make(
        &mut self,
        set: &ShardSet,
        recipe: &Recipe,
        id: u64,
        start: usize,
    ) -> Result<(), detco_shards::format::ShardError> {
        let sample = set.sample(id)?;
        if self.decoder.decode(sample.jpeg(), &mut self.image).is_err() {
            return Ok(());
        }
        let plan = recipe.draw(self.image.width, self.image.height, 1, 0, id);
        let mut rest = &mut self.pixels[start..];
        for view in &plan.views {
            let (pixels, after) = rest.split_at_mut(view.bytes());
            self.renderer.view(&self.image, view, pixels);
            rest = after;
        }
        Ok(())
    }
}
