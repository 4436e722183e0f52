//! The loader: same bytes whatever the threads, clean ends, bad samples by policy.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use detco_shards::decode::{Decoder, Image};
use detco_shards::format::writer::ShardWriter;
use detco_shards::format::{SampleFault, ShardError};
use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{
    Filled, Loader, LoaderOptions, OnBadSample, PipelineError, TASKS_MAX, bad_budget,
};
use detco_shards::stream::ShardSet;
use detco_shards::views::{Note, Recipe, Renderer, permutations};

/// A JPEG of its own for each number.
fn jpeg(i: u32) -> Vec<u8> {
    let (width, height) = (40 + i % 13, 40 + i % 7);
    let picture = image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([(x * 5 + i) as u8, (y * 6) as u8, ((x ^ y) * 4 + i * 3) as u8])
    });
    let mut bytes = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90);
    picture.write_with_encoder(encoder).unwrap();
    bytes
}

/// Shards of 10 samples; the samples in `bad` hold no image.
fn shards(folder: &Path, samples: u32, bad: &[u32]) -> Arc<ShardSet> {
    for (number, start) in (0..samples).step_by(10).enumerate() {
        let mut shard = ShardWriter::create(folder, &format!("{number:06}.tar")).unwrap();
        for i in start..(start + 10).min(samples) {
            let bytes = if bad.contains(&i) { b"\xff\xd8 no image".to_vec() } else { jpeg(i) };
            shard.append(&format!("s{i:05}.jpg"), &bytes).unwrap();
            shard.append(&format!("s{i:05}.cls"), (i % 3).to_string().as_bytes()).unwrap();
        }
        shard.finish().unwrap().seal().unwrap();
    }
    Arc::new(ShardSet::open(&[folder.to_str().unwrap().to_string()]).unwrap())
}

fn recipe() -> Recipe {
    Recipe::detco().with_size(32)
}

fn options(set: &ShardSet, batch: u64) -> LoaderOptions {
    let order = Order::shuffled(set.len(), batch, 7).unwrap();
    LoaderOptions { workers: 2, ..LoaderOptions::train(recipe(), order, 7, 2) }
}

type Bytes = (Cursor, Vec<u64>, Vec<Vec<u8>>);

fn bytes(filled: &Filled) -> Bytes {
    let sections = [("crops", 0), ("crops", 1), ("patches", 0), ("patches", 1)];
    let sections = sections.map(|(group, view)| filled.view(group, view));
    (filled.cursor, filled.samples.clone(), sections.iter().map(|s| s.to_vec()).collect())
}

fn read(set: &Arc<ShardSet>, options: LoaderOptions) -> Vec<Bytes> {
    let loader = Loader::start(Arc::clone(set), options).unwrap();
    loader.map(|filled| bytes(&filled.unwrap())).collect()
}

#[test]
fn one_worker_and_five_give_the_same_bytes_in_the_same_order() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 43, &[]);
    let alone = LoaderOptions { workers: 1, batches_ahead: 1, ..options(&set, 8) };
    let many = LoaderOptions { workers: 5, batches_ahead: 4, ..options(&set, 8) };
    let (alone, many) = (read(&set, alone), read(&set, many));
    assert_eq!(alone.len(), 10, "two epochs of five batches");
    assert!(alone == many, "threads changed the bytes or their order");
    for epoch in alone.chunks(5) {
        let seen: HashSet<u64> = epoch.iter().flat_map(|(_, ids, _)| ids).copied().collect();
        assert_eq!(seen.len(), 40);
    }
    assert!(alone[0].2 != alone[5].2, "epochs are drawn apart");
}

#[test]
fn a_loader_that_starts_later_reads_the_same_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 43, &[]);
    let whole = read(&set, options(&set, 8));
    for skip in [1, 4, 5, 7, 9] {
        let start = Cursor { epoch: skip as u32 / 5, step: skip as u64 % 5 };
        let rest = read(&set, LoaderOptions { start, ..options(&set, 8) });
        assert!(rest == whole[skip..], "from {start:?}");
    }
    let end = LoaderOptions { start: Cursor { epoch: 2, step: 0 }, ..options(&set, 8) };
    assert!(read(&set, end).is_empty());
}

#[test]
fn ranks_together_read_what_one_reads() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 43, &[]);
    let alone = read(&set, options(&set, 8));
    for world in [2, 3, 4, 11] {
        let ranks: Vec<Vec<Bytes>> = (0..world)
            .map(|rank| read(&set, LoaderOptions { rank: (rank, world), ..options(&set, 8) }))
            .collect();
        for (step, (cursor, ids, sections)) in alone.iter().enumerate() {
            let parts: Vec<&Bytes> = ranks.iter().map(|rank| &rank[step]).collect();
            assert!(parts.iter().all(|part| part.0 == *cursor));
            let joined: Vec<u64> = parts.iter().flat_map(|part| part.1.clone()).collect();
            assert_eq!(joined, *ids, "world {world}");
            for (section, whole) in sections.iter().enumerate() {
                let joined: Vec<u8> =
                    parts.iter().flat_map(|part| part.2[section].clone()).collect();
                assert!(joined == *whole, "world {world}, step {step}, section {section}");
            }
        }
    }
}

#[test]
fn slots_hold_what_the_renderer_draws_for_their_sample() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 20, &[]);
    let loader = Loader::start(Arc::clone(&set), options(&set, 5)).unwrap();
    let (mut decoder, mut renderer, mut image) = (Decoder::new(), Renderer::new(), Image::new());
    for filled in loader {
        let filled = filled.unwrap();
        for (slot, id) in filled.samples.iter().enumerate() {
            decoder.decode(set.sample(*id).unwrap().jpeg(), &mut image).unwrap();
            let plan = recipe().draw(image.width, image.height, 7, filled.cursor.epoch, *id);
            let views = [("crops", 0), ("crops", 1), ("patches", 0), ("patches", 1)];
            for ((group, view), plan) in views.into_iter().zip(&plan.views) {
                let mut out = vec![0; plan.bytes()];
                renderer.view(&image, plan, &mut out);
                assert!(filled.view(group, view)[slot * out.len()..][..out.len()] == out[..]);
                assert_eq!(filled.note(group, view, slot), Note::of(plan));
            }
        }
    }
}

#[test]
fn evaluation_reads_everything_once_with_its_classes() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 23, &[]);
    let order = Order::sequential(set.len(), 10).unwrap();
    let options = LoaderOptions::evaluate(Recipe::center(24, 0.875), order);
    let loader = Loader::start(Arc::clone(&set), options).unwrap();
    let (mut ids, mut sizes) = (Vec::new(), Vec::new());
    for filled in loader {
        let filled = filled.unwrap();
        let classes = filled.labels().unwrap();
        for (id, class) in filled.samples.iter().zip(classes) {
            let key: u32 = set.sample(*id).unwrap().key[1..].parse().unwrap();
            assert_eq!(class, Some(key % 3));
        }
        sizes.push(filled.len());
        assert_eq!(filled.view("image", 0).len(), filled.len() * 24 * 24 * 3);
        ids.extend(filled.samples.iter().copied());
    }
    assert_eq!(sizes, [10, 10, 3]);
    assert_eq!(ids, (0..23).collect::<Vec<u64>>());
}

/// Without a second look at the shard, and with what was drawn for each view.
#[test]
fn a_batch_carries_ids_labels_and_notes() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 23, &[4]);
    let order = Order::shuffled(set.len(), 5, 7).unwrap();
    let recipe = Recipe::jigsaw().with_size(48);
    let options = LoaderOptions {
        labels: true,
        on_bad_sample: OnBadSample::Skip,
        ..LoaderOptions::train(recipe.clone(), order, 7, 1)
    };
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let mut seen = HashSet::new();
    for filled in Loader::start(Arc::clone(&set), options).unwrap() {
        let filled = filled.unwrap();
        let labels = filled.labels().unwrap();
        assert_eq!(filled.layout().unwrap().sections(), recipe.sections());
        for (slot, (id, label)) in filled.samples.iter().zip(labels).enumerate() {
            assert_eq!(label, set.class(*id).unwrap());
            decoder.decode(set.sample(*id).unwrap().jpeg(), &mut image).unwrap();
            let plan = recipe.draw(image.width, image.height, 7, 0, *id);
            let note = filled.note("patches", 0, slot);
            assert_eq!(note, Note::of(&plan.views[0]));
            let grid = plan.views[0].grid.as_ref().unwrap();
            assert_eq!(permutations(9, 2000)[note.permutation.unwrap() as usize], grid.order);
            seen.insert(note.permutation);
        }
    }
    assert!(seen.len() > 15, "{seen:?}");
    let unasked = Loader::start(Arc::clone(&set), self::options(&set, 5)).unwrap().next();
    assert!(unasked.unwrap().unwrap().labels().unwrap().is_empty());
}

/// Labels in words, negative ones, none: nothing that training would look at.
#[test]
fn a_class_that_is_no_number_is_no_fault_of_its_sample() {
    let folder = tempfile::tempdir().unwrap();
    let labels = [&b"dog"[..], b"-1", b"", b"99999999999", b"\xff", b"7"];
    let mut shard = ShardWriter::create(folder.path(), "000000.tar").unwrap();
    for (i, label) in (0..).zip(labels) {
        shard.append(&format!("s{i:05}.jpg"), &jpeg(i)).unwrap();
        shard.append(&format!("s{i:05}.cls"), label).unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    let set = Arc::new(ShardSet::open(&[folder.path().display().to_string()]).unwrap());
    let options = LoaderOptions { labels: true, ..options(&set, 6) };
    let loader = Loader::start(Arc::clone(&set), options).unwrap();
    let batches: Vec<Filled> = loader.map(|batch| batch.expect("no fault")).collect();
    assert_eq!(batches.len(), 2, "two epochs of one batch");
    assert!(batches.iter().all(|batch| batch.bad.is_empty()));
    let error = batches[0].labels().expect_err("five of six");
    let ShardError::Shared(read) = &error else { panic!("{error}") };
    let named = matches!(**read, ShardError::Sample { fault: SampleFault::Class { .. }, .. });
    assert!(named, "{error}");
    assert_eq!(set.class(5).unwrap(), Some(7));
    let error = set.class(1).unwrap_err().to_string();
    assert!(error.contains("sample `s00001`") && error.contains("holds `-1`"), "{error}");
}

/// In a process of its own: other tests of this binary run beside this one, and their threads come
/// and go.
#[test]
fn dropping_the_loader_anywhere_ends_its_threads() {
    const NAME: &str = "dropping_the_loader_anywhere_ends_its_threads";
    const ALONE: &str = "DETCO_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut test = std::process::Command::new(std::env::current_exe().unwrap());
        let ran = test.args(["--exact", NAME]).env(ALONE, "1").output().unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 60, &[]);
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let before = threads();
    for taken in [0, 1, 2, 5, 15, 30] {
        let mut loader = Loader::start(Arc::clone(&set), options(&set, 4)).unwrap();
        assert!(threads() > before, "a loader has threads, which wait for what is taken");
        let held: Vec<Filled> =
            loader.by_ref().take(taken.min(2)).collect::<Result<_, _>>().unwrap();
        drop(held);
        let rest = taken.saturating_sub(2);
        assert_eq!(loader.by_ref().take(rest).filter(Result::is_ok).count(), rest);
        let last = loader.next();
        drop(loader); // returns only when all its threads have ended
        drop(last); // a batch outlives its loader
    }
    // A thread that was joined stands in the list for a moment more.
    for _ in 0..1000 {
        if threads() == before {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(threads(), before, "threads of a loader are left");
}

#[test]
fn a_bad_sample_ends_the_run_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 40, &[17]);
    let mut loader = Loader::start(Arc::clone(&set), options(&set, 8)).unwrap();
    let error = loader.find_map(Result::err).expect("sample 17 is bad");
    let text = error.to_string();
    assert!(matches!(error, PipelineError::Bad(_)), "{text}");
    assert!(text.contains("000001.tar") && text.contains("s00017"), "{text}");
    assert!(loader.next().is_none(), "nothing follows an error");
}

#[test]
fn skipped_samples_are_replaced_alike_at_any_worker_count() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 40, &[3, 17, 18, 33]);
    let skip = |workers, share| LoaderOptions {
        workers,
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: share,
        ..options(&set, 8)
    };
    let one = read(&set, skip(1, 0.1));
    assert!(one == read(&set, skip(4, 0.1)));
    assert_eq!(one.len(), 10);
    let bad: HashSet<u64> = [3, 17, 18, 33].into();
    assert!(one.iter().all(|(_, ids, _)| ids.iter().all(|id| !bad.contains(id))));

    let loader = Loader::start(Arc::clone(&set), skip(2, 0.1)).unwrap();
    let named: Vec<u64> =
        loader.flat_map(|f| f.unwrap().bad.iter().map(|b| b.sample).collect::<Vec<_>>()).collect();
    assert_eq!(named.len(), 8, "four an epoch, two epochs");
    assert_eq!(named.into_iter().collect::<HashSet<_>>(), bad);

    let mut loader = Loader::start(Arc::clone(&set), skip(2, 0.08)).unwrap();
    let error = loader.find_map(Result::err).expect("four of forty are above 8 %");
    assert!(matches!(error, PipelineError::TooManyBad { bad: 4, budget: 3, .. }), "{error}");
}

/// It would wait for ever: nobody else can give a batch back.
#[test]
fn a_consumer_that_keeps_every_batch_is_told_and_goes_on_once_it_drops_one() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 40, &[]);
    let few = LoaderOptions { batches_ahead: 2, ..options(&set, 8) };
    let loader = Loader::start(Arc::clone(&set), few).unwrap();
    let mut loader = loader.with_patience(Duration::ZERO);
    let mut kept: Vec<Filled> = (0..3).map(|_| loader.next().unwrap().unwrap()).collect();
    for _ in 0..2 {
        let error = loader.next().unwrap().unwrap_err();
        assert!(matches!(error, PipelineError::AllHeld { batches: 3 }), "{error}");
        assert!(error.to_string().contains("all 3 batches are held by the caller"), "{error}");
    }
    kept.remove(1);
    let rest: Vec<u64> = loader.map(|filled| filled.unwrap().cursor.step).collect();
    assert_eq!(rest, [3, 4, 0, 1, 2, 3, 4], "the rest of two epochs of five");
}

/// 0.1 % of 40 samples is none, and yet the hint to skip can be followed.
#[test]
fn any_share_allows_a_bad_sample_and_none_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 40, &[17]);
    let skip = |share| LoaderOptions {
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: share,
        ..options(&set, 8)
    };
    assert_eq!(read(&set, skip(0.001)).len(), 10, "one an epoch, two epochs");
    let mut loader = Loader::start(Arc::clone(&set), skip(0.0)).unwrap();
    let error = loader.find_map(Result::err).expect("none is allowed");
    assert!(matches!(error, PipelineError::TooManyBad { bad: 1, budget: 0, .. }), "{error}");
    let budgets = [(800, 0.001), (1999, 0.001), (2000, 0.001), (800, 0.0), (800, 1.0), (0, 0.5)];
    let budgets = budgets.map(|(samples, share)| bad_budget(samples, share));
    assert_eq!(budgets, [1, 1, 2, 0, 800, 1]);
}

/// What ends a run is in no batch, so the error has it: all bad samples can be looked up.
#[test]
fn every_bad_sample_up_to_the_end_is_handed_over() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 40, &(0..40).step_by(2).collect::<Vec<u32>>());
    for (share, run, over) in [(0.15, 100, true), (1.0, 3, false)] {
        let options = LoaderOptions {
            on_bad_sample: OnBadSample::Skip,
            bad_share_max: share,
            bad_run_max: run,
            ..options(&set, 8)
        };
        let (mut named, mut error) = (Vec::new(), None);
        for batch in Loader::start(Arc::clone(&set), options).unwrap() {
            match batch {
                Ok(batch) => named.extend(batch.bad.iter().map(|bad| bad.sample)),
                Err(end) => error = Some(end),
            }
        }
        let error = error.expect("half of them are bad");
        assert_eq!(matches!(error, PipelineError::TooManyBad { .. }), over, "{error}");
        named.extend(error.bad().iter().map(|bad| bad.sample));
        assert!(error.bad().iter().all(|bad| bad.substitute.is_some()));
        let last = error.bad().last().expect("the one that was too much");
        assert!(error.to_string().contains(&format!("{:?}", last.key)), "{error}");
        if over {
            assert_eq!(named.len(), 7, "six are allowed, the seventh ends it");
        }
    }
    let mut fail = Loader::start(Arc::clone(&set), options(&set, 8)).unwrap();
    assert_eq!(fail.find_map(Result::err).expect("bad").bad().len(), 1);
}

/// A set of 1,000 samples of which ten are damaged, each in its own way.
fn one_percent_damaged(folder: &Path) -> Arc<ShardSet> {
    let whole = jpeg(1);
    let cut = whole[..whole.len() / 2].to_vec();
    let mut no_table = whole.clone();
    let table = whole.windows(2).position(|pair| pair == [0xFF, 0xDB]).unwrap();
    no_table[table + 1] = 0xE9;
    let mut no_size = whole.clone();
    let frame = whole.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    no_size[frame + 5..frame + 9].fill(0);
    let mut vast = no_size.clone();
    vast[frame + 5..frame + 9].fill(0xFF);
    let kinds = [
        Vec::new(),
        b"<html>".to_vec(),
        cut,
        no_table,
        no_size,
        vast,
        vec![0; 5000],
        vec![0xFF; 5000],
        whole[..20].to_vec(),
        b"\x89PNG\r\n\x1a\n".to_vec(),
    ];
    for (number, start) in (0..1000).step_by(100).enumerate() {
        let mut shard = ShardWriter::create(folder, &format!("{number:06}.tar")).unwrap();
        for i in start..start + 100 {
            let damaged = i % 100 == 37;
            let bytes = if damaged { kinds[number].clone() } else { jpeg(i) };
            shard.append(&format!("s{i:05}.jpg"), &bytes).unwrap();
        }
        shard.finish().unwrap().seal().unwrap();
    }
    Arc::new(ShardSet::open(&[folder.to_str().unwrap().to_string()]).unwrap())
}

#[test]
fn a_set_with_1_percent_damaged_in_10_ways_runs_to_its_end_under_2_percent_and_stops_under_a_tenth()
{
    let folder = tempfile::tempdir().unwrap();
    let set = one_percent_damaged(folder.path());
    let skip = |workers| LoaderOptions {
        workers,
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 0.02,
        ..options(&set, 20)
    };
    let whole = read(&set, skip(1));
    assert_eq!(whole.len(), 100, "two epochs of fifty batches");
    let damaged: HashSet<u64> = (0..10).map(|number| number * 100 + 37).collect();
    for (cursor, ids, sections) in &whole {
        assert_eq!(ids.len(), 20, "{cursor:?} is full");
        assert!(ids.iter().all(|id| !damaged.contains(id)), "{cursor:?}: {ids:?}");
        let groups = recipe().sections();
        let bytes = [0, 1].map(|group| 20 * groups[group].bytes());
        let found: Vec<usize> = sections.iter().map(Vec::len).collect();
        assert_eq!(found, [bytes[0], bytes[0], bytes[1], bytes[1]]);
    }
    let mut cases = 0;
    for workers in [1, 2] {
        assert!(read(&set, skip(workers)) == whole, "{workers} workers");
        for step in [17, 50, 77] {
            let start = Cursor { epoch: step as u32 / 50, step: step as u64 % 50 };
            let rest = read(&set, LoaderOptions { start, ..skip(workers) });
            assert!(rest == whole[step..], "resumed at step {step} with {workers} workers");
            cases += 1;
            if workers == 1 {
                continue;
            }
            let ranks: Vec<Vec<Bytes>> = (0..2)
                .map(|rank| read(&set, LoaderOptions { start, rank: (rank, 2), ..skip(workers) }))
                .collect();
            for (at, (cursor, ids, sections)) in whole[step..].iter().enumerate() {
                let parts: Vec<&Bytes> = ranks.iter().map(|rank| &rank[at]).collect();
                assert!(parts.iter().all(|part| part.0 == *cursor));
                let joined: Vec<u64> = parts.iter().flat_map(|part| part.1.clone()).collect();
                assert_eq!(joined, *ids, "{cursor:?} on two ranks");
                for (section, whole) in sections.iter().enumerate() {
                    let joined: Vec<u8> =
                        parts.iter().flat_map(|part| part.2[section].clone()).collect();
                    assert!(joined == *whole, "{cursor:?} on two ranks, section {section}");
                }
            }
            cases += 1;
        }
    }
    println!("{cases} resumes, 3 of them on two ranks, gave the same samples and bytes");

    let default = LoaderOptions { bad_share_max: 0.001, ..skip(2) };
    assert_eq!(LoaderOptions::train(recipe(), default.order.clone(), 7, 2).bad_share_max, 0.001);
    let mut loader = Loader::start(Arc::clone(&set), default).unwrap();
    let error = loader.find_map(Result::err).expect("ten of a thousand are above 0.1 %");
    let stops = matches!(error, PipelineError::TooManyBad { bad: 2, budget: 1, samples: 1000, .. });
    assert!(stops, "{error}");
}

#[test]
fn a_run_of_bad_samples_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let bad: Vec<u32> = (0..30).collect();
    let set = shards(folder.path(), 40, &bad);
    let options = LoaderOptions {
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 1.0,
        bad_run_max: 3,
        ..options(&set, 8)
    };
    let mut loader = Loader::start(set, options).unwrap();
    let error = loader.find_map(Result::err).expect("three quarters are bad");
    assert!(matches!(error, PipelineError::BadRun { run: 3, .. }), "{error}");
}

#[test]
fn jpeg_bytes_are_slices_of_the_map() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 25, &[]);
    for id in 0..set.len() {
        let sample = set.sample(id).unwrap();
        let map = sample.map_range();
        let bytes = sample.jpeg().as_ptr_range();
        assert!(map.contains(&bytes.start) && bytes.end <= map.end, "sample {id} was copied");
    }
}

#[test]
fn counters_tell_every_sample_and_byte() {
    let folder = tempfile::tempdir().unwrap();
    let set = shards(folder.path(), 40, &[]);
    let mut loader = Loader::start(Arc::clone(&set), options(&set, 8)).unwrap();
    for filled in loader.by_ref() {
        filled.unwrap();
    }
    let stats = loader.stats();
    let bytes: u64 = (0..40).map(|id| set.sample(id).unwrap().jpeg().len() as u64).sum();
    assert_eq!((stats.samples, stats.bytes), (80, 2 * bytes));
    assert!(stats.nanos.iter().sum::<u64>() > 0);
    const { assert!(TASKS_MAX >= 8) };
}

/// Pictures far larger than their views: one worker and four decode the same share of them, and
/// switched off it is the whole picture's views to the byte.
#[test]
fn reduced_pictures_do_not_depend_on_the_workers_and_can_be_switched_off() {
    let folder = tempfile::tempdir().unwrap();
    let mut shard = ShardWriter::create(folder.path(), "000000.tar").unwrap();
    let smooth = |x: u32, y: u32, i: u32| {
        let wave = |a: f64, b: f64| 127.0 + 90.0 * (f64::from(x) * a + f64::from(y) * b).sin();
        image::Rgb(
            [wave(0.05, 0.02), wave(0.01, 0.07), wave(0.03, 0.03 * f64::from(i))].map(|v| v as u8),
        )
    };
    for i in 0..12 {
        let picture = image::RgbImage::from_fn(700 + i, 500, |x, y| smooth(x, y, i));
        let mut bytes = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90);
        picture.write_with_encoder(encoder).unwrap();
        shard.append(&format!("s{i:05}.jpg"), &bytes).unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    let set = Arc::new(ShardSet::open(&[folder.path().display().to_string()]).unwrap());
    let one = read(&set, LoaderOptions { workers: 1, ..options(&set, 4) });
    assert!(one == read(&set, LoaderOptions { workers: 4, ..options(&set, 4) }));
    let whole = read(&set, LoaderOptions { reduce: false, ..options(&set, 4) });
    let mut changed = 0;
    for ((_, _, views), (_, _, whole)) in one.iter().zip(&whole) {
        for (a, b) in views.iter().zip(whole) {
            let off: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            assert!(off <= a.len() as u64, "{off} of {}", a.len());
            changed += u64::from(a != b);
        }
    }
    assert!(changed > 0, "no picture was reduced");
    let (mut decoder, mut image, mut renderer) = (Decoder::new(), Image::new(), Renderer::new());
    let (cursor, samples, views) = &whole[0];
    for (slot, id) in samples.iter().enumerate() {
        decoder.decode(set.sample(*id).unwrap().jpeg(), &mut image).unwrap();
        let plan = recipe().draw(image.width, image.height, 7, cursor.epoch, *id);
        let mut crop = vec![0; plan.views[0].bytes()];
        renderer.view(&image, &plan.views[0], &mut crop);
        assert!(views[0][slot * crop.len()..][..crop.len()] == crop[..]);
    }
}
