//! The device pipeline on its host twin, held against the loader: the same samples, order, bad
//! lists, errors and pixels, whatever the threads and whoever decodes.

#![expect(unsafe_code, reason = "reads numbers at their addresses")]

use std::path::Path;
use std::sync::Arc;

use detco_shards::device::{
    DeviceBatch, DeviceError, DeviceLoader, DeviceOptions, Host, Number, Share, Way,
};
use detco_shards::format::writer::ShardWriter;
use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{
    BadSample, Filled, Loader, LoaderOptions, OnBadSample, PipelineError, Views,
};
use detco_shards::stream::ShardSet;
use detco_shards::views::{MEAN, Note, Recipe, STD};

const SAMPLES: u32 = 200;

/// What no decoder takes: no header, no picture, half of one, a damaged table.
const BAD: [u32; 8] = [3, 17, 18, 58, 90, 121, 122, 199];

fn jpeg(i: u32) -> Vec<u8> {
    let (width, height) = (40 + i % 13, 40 + i % 7);
    let picture = image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([(x * 5 + i) as u8, (y * 6) as u8, ((x ^ y) * 4 + i * 3) as u8])
    });
    let (mut bytes, size) = (Vec::new(), [width as u16, height as u16]);
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
    // A fifth is progressive: not for the batch decoder. Another has its chroma sampled by four:
    // not for the device.
    encoder.set_progressive(i % 5 == 1);
    if i % 5 == 2 {
        encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::R_4_1_1);
    }
    if i % 5 == 3 {
        // Gray: the batch decoder does not take it.
        let gray: Vec<u8> = picture.pixels().map(|pixel| pixel.0[0]).collect();
        encoder.encode(&gray, size[0], size[1], jpeg_encoder::ColorType::Luma).unwrap();
    } else {
        encoder.encode(&picture, size[0], size[1], jpeg_encoder::ColorType::Rgb).unwrap();
    }
    bytes
}

fn damaged(i: u32) -> Vec<u8> {
    let mut bytes = jpeg(i);
    match i % 4 {
        0 => bytes = b"\xff\xd8 no image".to_vec(),
        1 => bytes.truncate(bytes.len() / 2),
        2 => bytes.clear(),
        // Without its first table of quantization: a header that reads well before a picture that does not.
        _ => {
            let table = bytes.windows(2).position(|pair| pair == [0xFF, 0xDB]).unwrap();
            bytes[table + 1] = 0xE9;
        }
    }
    bytes
}

fn shards(folder: &Path) -> Arc<ShardSet> {
    for (number, start) in (0..SAMPLES).step_by(50).enumerate() {
        let mut shard = ShardWriter::create(folder, &format!("{number:06}.tar")).unwrap();
        for i in start..start + 50 {
            let bytes = if BAD.contains(&i) { damaged(i) } else { jpeg(i) };
            shard.append(&format!("s{i:05}.jpg"), &bytes).unwrap();
            shard.append(&format!("s{i:05}.cls"), (i % 7).to_string().as_bytes()).unwrap();
        }
        shard.finish().unwrap().seal().unwrap();
    }
    Arc::new(ShardSet::open(&[folder.to_str().unwrap().to_string()]).unwrap())
}

fn options(set: &ShardSet) -> LoaderOptions {
    let order = Order::shuffled(set.len(), 16, 7).unwrap();
    LoaderOptions {
        workers: 2,
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 0.1,
        labels: true,
        ..LoaderOptions::train(Recipe::detco().with_size(32), order, 7, 2)
    }
}

/// Everything that a consumer sees of a batch.
#[derive(Debug, PartialEq)]
struct Seen {
    cursor: Cursor,
    samples: Vec<u64>,
    bad: Vec<(u64, Option<u64>, String)>,
    views: Vec<Vec<u8>>,
    notes: Vec<Note>,
    labels: Vec<Option<u32>>,
}

fn bad(samples: &[BadSample]) -> Vec<(u64, Option<u64>, String)> {
    samples.iter().map(|bad| (bad.sample, bad.substitute, bad.error.to_string())).collect()
}

/// Group and number of each view.
fn names(views: &Views) -> Vec<(String, usize)> {
    let layout = views.layout(1);
    let sections = layout.sections().iter();
    sections.flat_map(|one| (0..one.views).map(|view| (one.name.clone(), view))).collect()
}

fn of_loader(filled: &Filled, names: &[(String, usize)]) -> Seen {
    let views = names.iter().map(|(group, view)| filled.view(group, *view).to_vec()).collect();
    let (cursor, samples) = (filled.cursor, filled.samples.clone());
    let note = |group: &str, view, slot| filled.note(group, view, slot);
    let notes = notes(names, filled.len(), note);
    let labels = filled.labels().unwrap();
    Seen { cursor, samples, bad: bad(&filled.bad), views, notes, labels }
}

fn of_device(batch: &DeviceBatch<Host>, names: &[(String, usize)]) -> Seen {
    let buffers = batch.buffers().expect("one rank has samples in each batch");
    let views = names.iter().map(|(group, view)| buffers.view(group, *view).to_vec()).collect();
    let (cursor, samples) = (batch.cursor, batch.samples.clone());
    let note = |group: &str, view, slot| batch.note(group, view, slot);
    let notes = notes(names, batch.len(), note);
    let labels = batch.labels().unwrap();
    Seen { cursor, samples, bad: bad(&batch.bad), views, notes, labels }
}

fn notes(
    names: &[(String, usize)],
    n: usize,
    note: impl Fn(&str, usize, usize) -> Note,
) -> Vec<Note> {
    let of = |slot| names.iter().map(move |(group, view)| (group, *view, slot));
    (0..n).flat_map(of).map(|(group, view, slot)| note(group, view, slot)).collect()
}

fn with_loader(set: &Arc<ShardSet>, options: LoaderOptions) -> Vec<Seen> {
    let names = names(&options.views);
    let loader = Loader::start(Arc::clone(set), options).unwrap();
    loader.map(|filled| of_loader(&filled.unwrap(), &names)).collect()
}

fn start(
    set: &Arc<ShardSet>,
    loader: LoaderOptions,
    share: Share,
    batches: bool,
) -> DeviceLoader<Host> {
    let options = DeviceOptions { loader, share };
    DeviceLoader::start(Arc::clone(set), Host::new(batches), options).unwrap()
}

#[test]
fn a_consumer_that_keeps_every_batch_is_told_as_by_the_loader() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let few = LoaderOptions { batches_ahead: 1, ..options(&set) };
    let mut device =
        start(&set, few, Share::Fixed(0.5), true).with_patience(std::time::Duration::ZERO);
    let kept: Vec<_> = device.by_ref().take(2).map(Result::unwrap).collect();
    let error = device.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("all 2 batches are held by the caller"), "{error}");
    drop(kept);
    assert_eq!(device.map(Result::unwrap).count(), 22, "the rest of two epochs of twelve");
}

#[test]
fn the_device_gives_what_the_loader_gives_whoever_decodes() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let names = names(&options(&set).views);
    let expected = with_loader(&set, options(&set));
    assert_eq!(expected.len(), 24, "two epochs of twelve batches");
    for seen in &expected {
        let labels = seen.samples.iter().map(|id| set.class(*id).unwrap());
        assert_eq!(seen.labels, labels.collect::<Vec<_>>(), "substitutes have their own");
    }
    let replaced: usize = expected.iter().map(|seen| seen.bad.len()).sum();
    assert!((14..=16).contains(&replaced), "eight an epoch, less those in the dropped batch");
    for (share, workers, batches_ahead) in [(0.0, 1, 1), (0.5, 4, 3), (1.0, 3, 2)] {
        let loader = LoaderOptions { workers, batches_ahead, ..options(&set) };
        let mut device = start(&set, loader, Share::Fixed(share), true);
        let found: Vec<Seen> =
            device.by_ref().map(|batch| of_device(&batch.unwrap(), &names)).collect();
        assert!(found == expected, "share {share}, {workers} workers");
        let counts = device.counts();
        // 4:1:1 went to the CPU, baseline and progressive to the device.
        assert!(counts.cpu > 30 && counts.single > 30, "{counts:?}");
        assert_eq!((share > 0.0, counts.share), (counts.batched > 0, Some(share)), "{counts:?}");
        assert_eq!(share > 0.0, counts.refused > 0, "damaged images are refused: {counts:?}");
        // Of the damaged ones a single one gets there; gray ones spoil no batch.
        assert!(counts.refused <= 2, "two epochs: {counts:?}");
        let decoded = counts.batched + counts.single + counts.cpu;
        assert_eq!(decoded, 24 * 16, "each sample of each batch once: {counts:?}");
    }
}

#[test]
fn a_device_without_a_batch_decoder_decodes_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let names = names(&options(&set).views);
    let mut device = start(&set, options(&set), Share::Fixed(1.0), false);
    let found: Vec<Seen> =
        device.by_ref().map(|batch| of_device(&batch.unwrap(), &names)).collect();
    assert!(found == with_loader(&set, options(&set)));
    let counts = device.counts();
    assert_eq!((counts.batched, counts.share), (0, Some(0.0)));
}

#[test]
fn a_device_that_starts_later_gives_the_same_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let names = names(&options(&set).views);
    let whole = with_loader(&set, options(&set));
    for skip in [1, 11, 12, 17, 23] {
        let start_at = Cursor { epoch: skip as u32 / 12, step: skip as u64 % 12 };
        let loader = LoaderOptions { start: start_at, ..options(&set) };
        let device = start(&set, loader, Share::Fixed(0.7), true);
        let rest: Vec<Seen> = device.map(|batch| of_device(&batch.unwrap(), &names)).collect();
        assert!(rest == whole[skip..], "from {start_at:?}");
    }
}

#[test]
fn two_ranks_together_give_what_one_gives() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let names = names(&options(&set).views);
    let whole = with_loader(&set, options(&set));
    let ranks: Vec<Vec<Seen>> = (0..2)
        .map(|rank| {
            let loader = LoaderOptions { rank: (rank, 2), ..options(&set) };
            let device = start(&set, loader, Share::Fixed(0.5), true);
            device.map(|batch| of_device(&batch.unwrap(), &names)).collect()
        })
        .collect();
    for (step, seen) in whole.iter().enumerate() {
        let parts = [&ranks[0][step], &ranks[1][step]];
        let joined: Vec<u64> = parts.iter().flat_map(|part| part.samples.clone()).collect();
        assert_eq!(joined, seen.samples);
        for (view, expected) in seen.views.iter().enumerate() {
            let joined: Vec<u8> = parts.iter().flat_map(|part| part.views[view].clone()).collect();
            assert!(joined == *expected, "step {step}, view {view}");
        }
    }
}

#[test]
fn other_views_are_those_of_the_loader() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let recipes = Recipe::presets().map(|name| Recipe::preset(name).unwrap().with_size(28));
    let lists = recipes.map(Views::Recipe).chain([Views::Decode, Views::Read]);
    for views in lists {
        let names = names(&views);
        let loader = LoaderOptions { views: views.clone(), epochs: 1, ..options(&set) };
        let device = start(&set, loader.clone(), Share::Fixed(0.5), true);
        let found: Vec<Seen> = device.map(|batch| of_device(&batch.unwrap(), &names)).collect();
        assert!(found == with_loader(&set, loader), "{views:?}");
    }
}

/// The error at the end of a run, and how many batches came before it.
fn end(batches: impl Iterator<Item = Option<PipelineError>>) -> (usize, String) {
    let mut before = 0;
    for outcome in batches {
        match outcome {
            None => before += 1,
            Some(error) => return (before, error.to_string()),
        }
    }
    (before, "the end".to_string())
}

#[test]
fn policies_end_a_run_where_the_loader_ends_it_with_the_same_words() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let fail = LoaderOptions { on_bad_sample: OnBadSample::Fail, ..options(&set) };
    let budget = LoaderOptions { bad_share_max: 0.02, ..options(&set) };
    let run = LoaderOptions { bad_run_max: 1, ..options(&set) };
    for loader in [fail, budget, run] {
        let expected = Loader::start(Arc::clone(&set), loader.clone()).unwrap();
        let expected = end(expected.map(Result::err));
        assert_ne!(expected.1, "the end");
        for share in [0.0, 1.0] {
            let mut device = start(&set, loader.clone(), Share::Fixed(share), true);
            let found = end(device.by_ref().map(|batch| match batch.err()? {
                DeviceError::Pipeline(error) => Some(error),
                DeviceError::Engine(never) => match never {},
            }));
            assert_eq!(found, expected, "share {share}");
            assert!(device.next().is_none(), "nothing follows an error");
        }
    }
}

#[test]
fn dropping_the_device_loader_anywhere_ends_its_threads() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    for taken in [0, 1, 2, 5, 24] {
        let mut device = start(&set, options(&set), Share::Measure, true);
        assert_eq!(device.by_ref().take(taken).filter(Result::is_ok).count(), taken);
        let last = device.next();
        drop(device); // returns only when all its threads have ended
        drop(last); // a batch outlives its loader
    }
    assert_eq!(Arc::strong_count(&set), 1, "no thread holds the shards");
}

/// The numbers behind a batch's pointers, as the consumer of a device reads them.
fn numbers(at: u64, len: usize, number: Number) -> Vec<f32> {
    let bytes = len * number.bytes();
    // SAFETY: the twin's addresses are the host's, of as many numbers; the batch is held.
    let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, bytes) };
    let word = |two: &[u8]| u32::from(u16::from_ne_bytes([two[0], two[1]]));
    match number {
        Number::F32 => bytes.as_chunks().0.iter().map(|four| f32::from_ne_bytes(*four)).collect(),
        Number::Bf16 => bytes.chunks(2).map(|two| f32::from_bits(word(two) << 16)).collect(),
    }
}

#[test]
fn pointers_lead_to_the_views_normalised() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let names = names(&options(&set).views);
    for (number, most) in [(Number::F32, 0.0), (Number::Bf16, 1.0 / 256.0)] {
        let options = DeviceOptions { loader: options(&set), share: Share::Fixed(0.5) };
        let twin = Host::new(true).normalising(number);
        let mut device = DeviceLoader::start(Arc::clone(&set), twin, options).unwrap();
        let batch = device.next().unwrap().unwrap();
        let (views, at) = (of_device(&batch, &names).views, batch.pointers().unwrap());
        let sections = Recipe::detco().with_size(32).sections();
        assert_eq!(
            (at.layout().n(), at.layout().sections(), at.number()),
            (16, &sections[..], number)
        );
        assert_eq!((at.view("patches", 1), at.view("crops", 2)), (Some(at.views()[3]), None));
        for (bytes, at) in views.iter().zip(at.views().to_vec()) {
            for (i, number) in numbers(at, bytes.len(), number).into_iter().enumerate() {
                let exact = (f32::from(bytes[i]) / 255.0 - MEAN[i % 3]) / STD[i % 3];
                assert!((number - exact).abs() <= exact.abs() * most, "{i}: {number} for {exact}");
            }
        }
    }
    let batch = start(&set, options(&set), Share::Fixed(0.5), true).next().unwrap().unwrap();
    assert_eq!(batch.pointers(), None, "bytes have no numbers");
}

#[test]
fn buffers_circulate() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let loader = LoaderOptions { batches_ahead: 2, ..options(&set) };
    let device = start(&set, loader, Share::Fixed(0.5), true);
    let seen: std::collections::HashSet<*const u8> =
        device.map(|batch| batch.unwrap().buffers().unwrap().view("crops", 0).as_ptr()).collect();
    assert_eq!(seen.len(), 3, "two ahead and the consumer's, for 24 batches");
}

#[test]
fn the_share_is_measured_in_the_run_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path());
    let loader = LoaderOptions { epochs: 30, views: Views::Decode, ..options(&set) };
    let mut device = start(&set, loader, Share::Measure, true);
    assert_eq!(device.counts().share, None);
    assert_eq!(device.by_ref().filter(Result::is_ok).count(), 30 * 12);
    let counts = device.counts();
    let share = counts.share.expect("5,760 images are enough");
    // Both ways were timed with 512 images each, and two kinds of five are the batch decoder's.
    assert!(share > 0.0 && share <= 1.0, "{share}");
    assert!((512..=5760 / 2).contains(&counts.batched), "{counts:?}");
    assert!(counts.single + counts.cpu >= 512, "{counts:?}");
    assert!(counts.batched + counts.single + counts.cpu >= 5760, "{counts:?}");
}

#[test]
fn headers_decide_the_way() {
    let way = |bytes: &[u8]| Way::of(&detco_shards::decode::probe(bytes).unwrap(), bytes);
    assert_eq!([0, 1, 2].map(|i| way(&jpeg(i))), [Way::Batch, Way::Single, Way::Cpu]);
    let whole = jpeg(0);
    assert_eq!(way(&whole[..whole.len() - 2]), Way::Cpu, "without its end");
}
