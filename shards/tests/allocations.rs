//! What the loader allocates once it runs: the allocator of this program counts on all threads.
//!
//! Two runs that differ only in their number of epochs do the same work before and after, so the
//! difference of their counts is that of whole epochs in the steady state. What the JPEG library
//! allocates for the very same samples is counted apart.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use detco_shards::decode::{Decoder, Frame, Image, probe};
use detco_shards::format::writer::ShardWriter;
use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{Loader, LoaderOptions};
use detco_shards::stream::ShardSet;
use detco_shards::views::{Recipe, Renderer, SamplePlan, needed};

#[path = "support/images.rs"]
mod images;

struct Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged; counting touches an atomic
// only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of `alloc`, which are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls(work: impl FnOnce()) -> u64 {
    let before = CALLS.load(Ordering::Relaxed);
    work();
    CALLS.load(Ordering::Relaxed) - before
}

/// What the decoder allocates for a 4:2:0 baseline picture, its own and out of our reach: four tables
/// of codes, the lists of a header, a plane for each of three components, and four rows of upsampling.
const DECODER_MAX: u64 = 18;

/// A batch, whatever its size: its sample numbers, twice (as drawn and as judged), what its slots
/// share, the slots, what shares the slab, and its place among those that wait for their turn. One
/// more is for the growth of scratch memory and of the channels' lists of waiting threads.
const BATCH_MAX: u64 = 7;

const SAMPLES: u32 = 48;
const BATCH: u64 = 16;
/// Epochs in which scratch memory grows to its size, and all epochs of the longer run.
const WARM: u32 = 3;
const EPOCHS: u32 = 8;

/// An indexed shard of photographs of two sizes, with classes.
fn shards(folder: &Path) -> Arc<ShardSet> {
    let mut shard = ShardWriter::create(folder, "000000.tar").unwrap();
    for number in 0..SAMPLES {
        let (width, height) = if number % 3 == 0 { (90, 120) } else { (120, 90) };
        let picture = images::textured(width, height, u64::from(number));
        let mut bytes = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
        encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_2_2);
        let (width, height) = (width as u16, height as u16);
        encoder.encode(&picture.pixels, width, height, jpeg_encoder::ColorType::Rgb).unwrap();
        shard.append(&format!("class/{number:03}.jpg"), &bytes).unwrap();
        shard.append(&format!("class/{number:03}.cls"), b"7").unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    Arc::new(ShardSet::open(&[folder.display().to_string()]).unwrap())
}

fn recipe() -> Recipe {
    Recipe::detco().with_size(64)
}

fn run(set: &Arc<ShardSet>, workers: usize, epochs: u32) -> u64 {
    let order = Order::shuffled(set.len(), BATCH, 7).unwrap();
    let options = LoaderOptions { workers, ..LoaderOptions::train(recipe(), order, 7, epochs) };
    calls(|| {
        for filled in Loader::start(Arc::clone(set), options).unwrap() {
            assert_eq!(filled.unwrap().samples.len() as u64, BATCH);
        }
    })
}

/// What the parts allocate for the epochs from [`WARM`] on, one after the other on one thread.
struct Parts {
    find: u64,
    decode: u64,
    draw: u64,
    render: u64,
}

fn parts(set: &ShardSet) -> Parts {
    let recipe = recipe();
    let (mut decoder, mut renderer, mut image) = (Decoder::new(), Renderer::new(), Image::new());
    let mut plan = SamplePlan::default();
    let mut out = vec![0; recipe.bytes()];
    let mut sum = Parts { find: 0, decode: 0, draw: 0, render: 0 };
    let order = Order::shuffled(set.len(), BATCH, 7).unwrap();
    for epoch in 0..EPOCHS {
        for position in 0..order.steps_per_epoch() * BATCH {
            let cursor = Cursor { epoch, step: position / BATCH };
            let id = order.sample(cursor, position % BATCH);
            let mut sample = None;
            let find = calls(|| sample = Some(set.sample(id).unwrap()));
            let sample = sample.unwrap();
            let jpeg = sample.jpeg();
            let header = probe(jpeg).unwrap();
            let size = [header.width, header.height];
            let draw = calls(|| recipe.draw_into(size, (7, epoch, id), &mut plan));
            let wanted = needed(&plan.views, u32::MAX).unwrap();
            let mut part = wanted;
            let decode = calls(|| {
                part = decoder.decode_part(jpeg, &header, wanted, &mut image).unwrap();
            });
            let frame = Frame { image: &image, part };
            let render = calls(|| {
                for view in &plan.views {
                    renderer.view(frame, view, &mut out[..view.bytes()]);
                }
            });
            if epoch >= WARM {
                sum.find += find;
                sum.decode += decode;
                sum.draw += draw;
                sum.render += render;
            }
        }
    }
    sum
}

#[test]
fn the_steady_state_allocates_nothing_of_ours_per_sample() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let samples = u64::from(SAMPLES * (EPOCHS - WARM));
    let batches = samples / BATCH;
    let parts = parts(&set);
    let each = |calls: u64| calls as f64 / samples as f64;
    println!(
        "a sample: {:.2} to find it, {:.2} to decode, {:.2} to draw, {:.2} to render",
        each(parts.find),
        each(parts.decode),
        each(parts.draw),
        each(parts.render),
    );
    assert_eq!((parts.find, parts.draw, parts.render), (0, 0, 0));
    assert!(parts.decode <= DECODER_MAX * samples, "{} to decode", each(parts.decode));
    for workers in [1, 2] {
        let all = run(&set, workers, EPOCHS) - run(&set, workers, WARM);
        let rest = all as i64 - parts.decode as i64;
        println!(
            "{workers} workers: {all} for {samples} samples, {:.2} a sample; without decoding \
             {rest} for {batches} batches, {:.2} a batch",
            each(all),
            rest as f64 / batches as f64,
        );
        let most = (BATCH_MAX * batches) as i64;
        assert!(rest <= most, "{rest}, of which a batch may have {BATCH_MAX}");
    }
}
