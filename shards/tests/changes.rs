//! Shards that are shortened, removed, replaced or rewritten while they are mapped: errors, never
//! the end of the process.

#![expect(unsafe_code, reason = "tests of a signal handler need signals")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use detco_shards::decode::{Decoder, Image};
use detco_shards::format::manifest::Part;
use detco_shards::format::writer::ShardWriter;
use detco_shards::format::{ChangeFault, ShardError, verify};
use detco_shards::order::Order;
use detco_shards::pack;
use detco_shards::pipeline::{Loader, LoaderOptions, OnBadSample, PipelineError, SampleError};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;

#[path = "support/images.rs"]
mod images;

const SAMPLES: u32 = 12;

/// A picture of its own for each number, of several pages.
fn jpeg(number: u32) -> Vec<u8> {
    let Image { width, height, pixels } = images::textured(160, 120, u64::from(number));
    let mut bytes = Vec::new();
    jpeg_encoder::Encoder::new(&mut bytes, 90)
        .encode(&pixels, width as u16, height as u16, jpeg_encoder::ColorType::Rgb)
        .unwrap();
    bytes
}

/// A shard of such pictures, and its path.
fn shard(folder: &Path, name: &str, first: u32) -> PathBuf {
    let mut shard = ShardWriter::create(folder, name).unwrap();
    for number in first..first + SAMPLES {
        shard.append(&format!("{number:03}.jpg"), &jpeg(number)).unwrap();
        shard.append(&format!("{number:03}.cls"), b"3").unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    folder.join(name)
}

fn open(path: &Path) -> Result<ShardSet, ShardError> {
    ShardSet::open(&[path.display().to_string()])
}

/// Reads a sample as the loader does.
fn read(set: &ShardSet, id: u64, image: &mut Image) -> Result<(), SampleError> {
    let sample = set.sample(id)?;
    if let Err(error) = Decoder::new().decode(sample.jpeg(), image) {
        set.check_file(&sample)?;
        return Err(error.into());
    }
    Ok(set.check(&sample)?)
}

fn is_changed(error: &SampleError) -> bool {
    matches!(error, SampleError::Shard(ShardError::Changed { .. }))
}

#[test]
fn a_shard_cut_at_78_places_while_mapped_gives_errors_and_no_signal() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "000000.tar", 0);
    let whole = std::fs::read(&path).unwrap();
    let mut image = Image::new();
    let set = open(&path).unwrap();
    let pictures: Vec<Image> = (0..set.len())
        .map(|id| {
            read(&set, id, &mut image).unwrap();
            image.clone()
        })
        .collect();
    drop(set);
    let (mut cases, mut errors, mut right) = (0, 0, 0);
    for indexed in [true, false] {
        if !indexed {
            std::fs::remove_file(path.with_extension("idx")).unwrap();
        }
        let places = (0..13).flat_map(|part| {
            let at = whole.len() * part / 13 / 4096 * 4096;
            [at, at + 1, at + 2048]
        });
        for cut in places {
            std::fs::write(&path, &whole).unwrap();
            let set = open(&path).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(cut as u64).unwrap();
            let mut failed = 0;
            for id in 0..set.len() {
                match read(&set, id, &mut image) {
                    Ok(()) => {
                        assert_eq!(image, pictures[id as usize], "cut at {cut}, sample {id}");
                        right += 1;
                    }
                    Err(error) => {
                        assert!(is_changed(&error), "cut at {cut}, sample {id}: {error}");
                        let text = error.to_string();
                        let sizes = format!("it had {} bytes when it was opened", whole.len());
                        assert!(text.contains("000000.tar") && text.contains(&sizes), "{text}");
                        assert!(text.contains(&format!("has {cut} now")), "{text}");
                        failed += 1;
                    }
                }
            }
            assert!(failed > 0, "cut at {cut}: nothing was noticed");
            errors += failed;
            cases += 1;
        }
    }
    assert_eq!(cases, 78);
    println!("{cases} cuts: {errors} samples refused, {right} read as before the cut");
    assert!(right > 100, "samples in front of the cut stay readable until the cut is met");
}

fn options(set: &ShardSet) -> LoaderOptions {
    let order = Order::shuffled(set.len(), 6, 7).unwrap();
    let recipe = Recipe::detco().with_size(32);
    LoaderOptions { workers: 2, batches_ahead: 1, ..LoaderOptions::train(recipe, order, 7, 8) }
}

/// Two shards, of which the second is cut after the first batch has come.
fn cut_while_loading(
    folder: &Path,
    options: impl Fn(&ShardSet) -> LoaderOptions,
) -> Vec<Result<Vec<u64>, PipelineError>> {
    shard(folder, "000000.tar", 0);
    let second = shard(folder, "000001.tar", SAMPLES);
    let set = Arc::new(open(folder).unwrap());
    let mut loader = Loader::start(Arc::clone(&set), options(&set)).unwrap();
    let mut seen = vec![loader.next().unwrap().map(|filled| filled.samples.clone())];
    File::options().write(true).open(&second).unwrap().set_len(5000).unwrap();
    seen.extend(loader.map(|filled| filled.map(|filled| filled.samples.clone())));
    seen
}

#[test]
fn a_loader_ends_with_an_error_when_a_shard_is_cut_under_it() {
    let folder = tempfile::tempdir().unwrap();
    let seen = cut_while_loading(folder.path(), options);
    let Some(Err(PipelineError::Bad(bad))) = seen.last() else { panic!("{:?}", seen.last()) };
    assert!(is_changed(&bad.error), "{}", bad.error);
    assert!(bad.shard.ends_with("000001.tar") && !bad.key.is_empty());
    println!("{}", seen.last().unwrap().as_ref().unwrap_err());
}

#[test]
fn a_loader_with_a_budget_goes_on_without_the_cut_shard() {
    let folder = tempfile::tempdir().unwrap();
    let skip = |set: &ShardSet| LoaderOptions {
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 1.0,
        ..options(set)
    };
    let seen = cut_while_loading(folder.path(), skip);
    assert_eq!(seen.len(), 8 * 4, "eight epochs of four batches");
    let last: Vec<u64> =
        seen.iter().rev().take(8).flat_map(|ids| ids.as_ref().unwrap().clone()).collect();
    assert_eq!(last.len(), 48, "every batch is full");
    assert!(last.iter().all(|id| *id < u64::from(SAMPLES)), "samples of the cut shard: {last:?}");

    let folder = tempfile::tempdir().unwrap();
    let default =
        |set: &ShardSet| LoaderOptions { on_bad_sample: OnBadSample::Skip, ..options(set) };
    let seen = cut_while_loading(folder.path(), default);
    let error = seen.last().unwrap().as_ref().expect_err("half of the data is gone");
    assert!(matches!(error, PipelineError::TooManyBad { .. }), "{error}");
    assert!(error.to_string().contains("000001.tar: changed while it was being read"), "{error}");
}

#[test]
fn a_removed_or_replaced_shard_is_read_to_its_end() {
    for replace in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = shard(folder.path(), "000000.tar", 0);
        let set = open(&path).unwrap();
        if replace {
            let other = tempfile::tempdir().unwrap();
            let new = shard(other.path(), "000000.tar", 500);
            std::fs::rename(new, &path).unwrap();
        } else {
            std::fs::remove_file(&path).unwrap();
        }
        let mut image = Image::new();
        for id in 0..set.len() {
            read(&set, id, &mut image).unwrap();
            assert_eq!(set.sample(id).unwrap().jpeg(), jpeg(id as u32));
        }
        let options = options(&set);
        let loader = Loader::start(Arc::new(set), options).unwrap();
        assert_eq!(loader.filter(Result::is_ok).count(), 16, "eight epochs of two batches");
        if replace {
            // The index beside it still describes the old one.
            let error = open(&path).expect_err("a stale index");
            assert!(matches!(error, ShardError::StaleIndex { .. }), "{error}");
        } else {
            assert!(matches!(open(&path), Err(ShardError::Spec { .. })));
        }
    }
}

#[test]
fn what_is_rewritten_in_place_is_noticed_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "000000.tar", 0);
    let whole = std::fs::read(&path).unwrap();
    let (mut image, mut noticed) = (Image::new(), BTreeMap::new());
    let mut rewrite = |what, at: u64, bytes: &[u8]| {
        std::fs::write(&path, &whole).unwrap();
        let set = open(&path).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20)); // file times are coarse
        File::options().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
        let error = read(&set, 3, &mut image).err();
        let clean = verify::folder(folder.path(), 1, &0.into()).unwrap().faults.is_empty();
        noticed.insert(what, (error, clean));
    };
    std::fs::write(&path, &whole).unwrap();
    let set = open(&path).unwrap();
    let sample = set.sample(3).unwrap();
    let (at, size) = (sample.offset, sample.jpeg().len());
    drop(set);
    rewrite("header", at - 512, &[0xaa; 512]);
    rewrite("start", at, &[0; 64]);
    rewrite("end", at + size as u64 - 600, &[0; 600]);
    // Another number in a table of quantization: another picture, and no less valid.
    let table = whole[at as usize..].windows(2).position(|pair| pair == [0xFF, 0xDB]).unwrap();
    rewrite("table", at + table as u64 + 5, &[9]);
    for what in ["header", "start", "end"] {
        let (error, _) = &noticed[what];
        let written = matches!(
            error,
            Some(SampleError::Shard(ShardError::Changed { fault: ChangeFault::Written, .. }))
        );
        assert!(written, "{what}: {error:?}");
    }
    assert!(noticed["table"].0.is_none(), "a valid image of the same size is read as it is");
    // Without a manifest there is no digest to hold the shard against.
    assert!(noticed["table"].1 && !noticed["header"].1);
}

#[test]
fn two_readers_survive_200_cuts() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "000000.tar", 0);
    let whole = std::fs::read(&path).unwrap();
    let (mut changed, mut fine) = (0, 0);
    for round in 0..200usize {
        std::fs::write(&path, &whole).unwrap();
        let set = open(&path).unwrap();
        // Every other round the cut comes when both have read half, on whatever machine.
        let (is_held, half) = (round % 2 == 1, Barrier::new(3));
        let results = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut image = Image::new();
                        let mut one = |id| {
                            if is_held && id == set.len() / 2 {
                                half.wait();
                                half.wait();
                            }
                            read(&set, id, &mut image)
                        };
                        (0..set.len()).map(&mut one).collect::<Vec<_>>()
                    })
                })
                .collect();
            let cut = whole.len() * (round % 40) / 40;
            if is_held {
                half.wait();
            } else {
                std::thread::sleep(std::time::Duration::from_micros(round as u64 * 37 % 4000));
            }
            File::options().write(true).open(&path).unwrap().set_len(cut as u64).unwrap();
            if is_held {
                half.wait();
            }
            readers.into_iter().flat_map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
        });
        for result in results {
            match result {
                Ok(()) => fine += 1,
                Err(error) if is_changed(&error) => changed += 1,
                Err(error) => panic!("round {round}: {error}"),
            }
        }
    }
    println!("200 cuts under two readers: {changed} samples refused, {fine} read");
    // In a hundred rounds two readers have read half, and in more than forty of them nothing of the other half
    // is left.
    let half = u64::from(SAMPLES) / 2;
    assert!(fine >= 200 * half && changed >= 80 * half, "{changed} refused, {fine} read");
}

/// Zeros end an archive: a shard that shrinks while it is opened must not look like a shorter one.
#[test]
fn a_shard_that_shrinks_while_it_is_opened_never_loses_samples_quietly_in_300_tries() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "000000.tar", 0);
    std::fs::remove_file(path.with_extension("idx")).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let stop = AtomicBool::new(false);
    let (mut opened, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&path).unwrap();
            let mut cut = 0;
            while !stop.load(Ordering::Relaxed) {
                cut = (cut + 7 * 4096) % whole.len();
                file.set_len(cut as u64).unwrap();
                file.write_all_at(&whole[cut..], cut as u64).unwrap();
                // Whole for about as long as it takes to open it.
                std::thread::sleep(std::time::Duration::from_micros(cut as u64 % 300));
            }
        });
        for _ in 0..300 {
            match open(&path) {
                Ok(set) => {
                    assert_eq!(set.len(), u64::from(SAMPLES));
                    opened += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("300 openings of a shard that shrinks: {opened} whole, {refused} refused");
}

/// Zeros must not be packed: a tar that shrinks while it is packed gives an error, or came too
/// late.
#[test]
fn a_tar_that_shrinks_while_it_is_packed_12_times_gives_an_error_and_no_shards_of_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let tar = shard(folder.path(), "source.tar", 0);
    let whole = std::fs::read(&tar).unwrap();
    let resize = Some(pack::Resize { short: 60, quality: 90 });
    let job = |out: &Path, on_error| pack::Job {
        source: tar.clone(),
        out: out.to_path_buf(),
        options: pack::Options { resize, on_error, ..pack::Options::default() },
        part: Part::WHOLE,
        workers: 1,
        resume: false,
    };
    let (mut refused, mut packed) = (0, 0);
    for round in 0..12 {
        std::fs::write(&tar, &whole).unwrap();
        let on_error = [pack::OnError::Fail, pack::OnError::Skip][round % 2];
        let out = folder.path().join(format!("out{round}"));
        let progress = pack::Progress::default();
        let result = std::thread::scope(|scope| {
            let running = scope.spawn(|| pack::run(&job(&out, on_error), &progress));
            while progress.images.load(Ordering::Relaxed) < 2 && !running.is_finished() {
                std::thread::yield_now();
            }
            // The last round cuts nothing.
            let cut = if round == 11 { whole.len() } else { 4096 };
            File::options().write(true).open(&tar).unwrap().set_len(cut as u64).unwrap();
            running.join().unwrap()
        });
        match result {
            Err(error) => {
                assert!(error.to_string().contains("changed while it was being read"), "{error}");
                assert!(!out.join("000000.tar").exists());
                refused += 1;
            }
            Ok(summary) => {
                assert_eq!((summary.samples, summary.skipped), (u64::from(SAMPLES), 0));
                packed += 1;
            }
        }
    }
    println!("12 tars packed: {refused} shrank and were refused, {packed} were whole to the end");
    assert!(refused > 0 && packed > 0, "{refused} refused, {packed} packed");
}

/// What a child process of these tests is to do, if this is one.
fn role() -> Option<String> {
    std::env::var_os("DETCO_SIGBUS_CHILD").and_then(|role| role.into_string().ok())
}

/// Runs the test `name` of this binary in a process of its own, which may end too soon to remove
/// what it has left in `folder`.
fn child(name: &str, role: &str, folder: &Path) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("DETCO_SIGBUS_CHILD", role)
        .env("TMPDIR", folder)
        .output()
        .unwrap()
}

/// Touches the second page of a file of one page, through a map that nobody watches.
fn touch_beyond_a_foreign_map(folder: &Path) {
    let path = folder.join("foreign");
    std::fs::write(&path, [1; 8192]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: the map is read through a raw pointer only, and what happens then is the test.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    file.set_len(4096).unwrap();
    let at = map.as_ptr().wrapping_add(5000);
    // SAFETY: inside the map, and bytes have no invalid values; that it cannot be read is the test.
    let byte = unsafe { at.read_volatile() };
    println!("read {byte}");
}

extern "C" fn earlier(_: std::ffi::c_int) {
    // SAFETY: _exit may be called in a signal handler.
    unsafe { libc::_exit(42) };
}

/// What the child prints that ignores SIGBUS, if it ends well.
fn ignoring_child(name: &str, folder: &Path) -> String {
    let output = child(name, "ignored", folder);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn four_signals_that_are_none_of_ours_go_where_they_went_before() {
    const NAME: &str = "four_signals_that_are_none_of_ours_go_where_they_went_before";
    let folder = tempfile::tempdir().unwrap();
    let Some(role) = role() else {
        let child = |role| child(NAME, role, folder.path()).status;
        let signal = |role| child(role).signal();
        assert_eq!(signal("foreign map"), Some(libc::SIGBUS));
        assert_eq!(signal("sent"), Some(libc::SIGBUS));
        assert_eq!(child("handler").code(), Some(42));
        let ignored = ignoring_child(NAME, folder.path());
        assert!(
            ignored.contains("both signals were ignored, and a cut shard is an error"),
            "{ignored}"
        );
        return;
    };
    if role == "ignored" {
        // SAFETY: no code of ours runs then.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_IGN) };
    }
    if role == "handler" {
        // SAFETY: `earlier` may run at any time.
        unsafe { libc::signal(libc::SIGBUS, earlier as extern "C" fn(_) as usize) };
    }
    // Opening a shard installs the handler, reading a cut one uses it.
    let path = shard(folder.path(), "000000.tar", 0);
    let set = open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert!(is_changed(&read(&set, 2, &mut Image::new()).unwrap_err()));
    if role == "ignored" {
        for name in ["000001.tar", "000002.tar"] {
            // SAFETY: raise has no preconditions.
            unsafe { libc::raise(libc::SIGBUS) };
            let path = shard(folder.path(), name, 0);
            let set = open(&path).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
            assert!(is_changed(&read(&set, 2, &mut Image::new()).unwrap_err()));
        }
        println!("both signals were ignored, and a cut shard is an error");
    } else if role == "sent" {
        // Rust's own handler, the one before ours, takes the first and steps back.
        for _ in 0..2 {
            // SAFETY: raise has no preconditions.
            unsafe { libc::raise(libc::SIGBUS) };
        }
    } else {
        touch_beyond_a_foreign_map(folder.path());
    }
    // Reached only where the signal was lost: the parent sees a success and fails.
}
