//! nvJPEG of `cargo xtask setup`: it is found at run time, and nothing needs it to start. Then the
//! device pipeline on a GPU; where there is none, on the twins of driver and nvJPEG in host memory.

#![cfg(feature = "nvjpeg")]
#![expect(unsafe_code, reason = "reads the views where the pipeline leaves them")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use detco_shards::cuda::{Device, DeviceSlice, PinnedBuffer, Search, Stream};
use detco_shards::decode::nvjpeg::{Nvjpeg, live_handles};
use detco_shards::decode::{Components, Decoder, Image, probe};
use detco_shards::device::{
    Counts, Cuda, Decode, Decoding, DeviceBatch, DeviceLoader, DeviceOptions, GpuError, Number,
    Pointers, Setup, Share, Way,
};
use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions, OnBadSample, Views};
use detco_shards::stream::ShardSet;
use detco_shards::views::{MEAN, Recipe, STD};
use detco_twin::driver;

#[path = "support/images.rs"]
mod images;

/// The crate `nvjpeg-sys` asks for `-lnvjpeg`; this binary has it among its dependencies and uses
/// nvJPEG, and starts without: the system's loader lists what it would load.
#[test]
fn this_binary_starts_without_nvjpeg_and_finds_it_when_asked() {
    let binary = std::env::current_exe().unwrap();
    let output = Command::new(binary).env("LD_TRACE_LOADED_OBJECTS", "1").output().unwrap();
    let text = String::from_utf8(output.stdout).expect("text");
    let needed = || text.lines().filter_map(|line| line.split_whitespace().next());
    assert!(needed().any(|library| library.starts_with("libc.")), "{text}");
    let foreign = ["nvjpeg", "cuda", "nvrtc"];
    let found = needed().find(|library| foreign.iter().any(|name| library.contains(name)));
    assert_eq!(found, None, "needed at start-up");

    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    let nvjpeg = Nvjpeg::open(&Search::beside_libtorch(&libtorch))
        .unwrap_or_else(|error| panic!("{error}: run `cargo xtask setup`"));
    assert_eq!(nvjpeg.version()[0], 13);
}

fn setup(cache: &Path) -> Setup {
    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from);
    let mut setup = Setup::new(libtorch.as_deref(), cache.to_path_buf(), Number::F32);
    if driver::is_here() {
        driver::decode_with(decode_for_the_twin);
        setup.folders.insert(0, driver::folder().to_path_buf());
    }
    setup
}

/// What nvJPEG's twin decodes with: our own decoder. Like the hardware engine its batches take only
/// baseline pictures in colour; and some it refuses without a reason.
///
/// # Safety
/// As [`driver::Decode`] says.
unsafe extern "C" fn decode_for_the_twin(
    jpeg: *const u8,
    length: usize,
    size: *mut [u32; 2],
    kind: *mut c_int,
    pixels: *mut u8,
) -> c_int {
    thread_local! {
        static DECODER: RefCell<(Decoder, Image)> = RefCell::new((Decoder::new(), Image::new()));
    }
    // SAFETY: the caller's promise.
    let jpeg = unsafe { std::slice::from_raw_parts(jpeg, length) };
    let Ok(header) = probe(jpeg) else { return 1 };
    let batches = !header.progressive && header.components != Components::Gray;
    let refused = header.width % 13 == 0;
    // SAFETY: the caller's promise.
    unsafe { size.write([header.width, header.height]) };
    // SAFETY: as above.
    unsafe { kind.write(if refused { 2 } else { c_int::from(!batches) }) };
    if pixels.is_null() {
        return 0;
    }
    DECODER.with_borrow_mut(|(decoder, image)| {
        if decoder.decode(jpeg, image).is_err() {
            return 1;
        }
        let bytes = image.pixels.len();
        assert_eq!(bytes, header.width as usize * header.height as usize * 3);
        // SAFETY: the caller has room for a picture of the header's size.
        unsafe { pixels.copy_from_nonoverlapping(image.pixels.as_ptr(), bytes) };
        0
    })
}

/// Whether there is a GPU, or its twin. Where there is neither, `test` runs on the twin.
fn here_or_again(test: &str, folder: &Path) -> bool {
    match Cuda::open(&setup(folder)) {
        Ok(_) => true,
        Err(GpuError::Cuda(error)) => {
            let text = error.to_string();
            assert!(text.contains("CUDA"), "{text}");
            println!("no GPU here: {text}");
            driver::again(test);
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// nvJPEG's objects are counted for the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What must be so at the end of a test.
fn nothing_is_left() {
    assert!(live_handles().iter().all(|(_, live)| *live == 0), "{:?}", live_handles());
    if driver::is_here() {
        assert_eq!((driver::live(), driver::faults()), (driver::Live::default(), 0));
    }
}

/// A shard of textured pictures in every kind that nvJPEG is asked for and some that it is not, one
/// of them cut off; with the files below DETCO_TEST_IMAGES, where that is set.
fn shard(folder: &Path) -> Arc<ShardSet> {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
    let mut shard = ShardWriter::create(folder, "000000.tar").unwrap();
    for i in 0..64_u32 {
        let image = images::textured(200 + i * 7, 150 + i * 5, u64::from(i));
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, 90);
        let factors = [SamplingFactor::R_4_4_4, SamplingFactor::R_4_2_2, SamplingFactor::R_4_2_0];
        encoder.set_sampling_factor(match i % 8 {
            7 => SamplingFactor::R_4_1_1,
            kind => factors[kind as usize % 3],
        });
        encoder.set_progressive(i % 8 == 6);
        let [width, height] = [image.width, image.height].map(|side| side as u16);
        if i % 8 == 5 {
            let gray: Vec<u8> = image.pixels.chunks(3).map(|rgb| rgb[1]).collect();
            encoder.encode(&gray, width, height, ColorType::Luma).unwrap();
        } else {
            encoder.encode(&image.pixels, width, height, ColorType::Rgb).unwrap();
        }
        if i == 11 {
            bytes.truncate(bytes.len() / 2);
        }
        shard.append(&format!("s{i:05}.jpg"), &bytes).unwrap();
    }
    for (i, path) in images::real_files().iter().enumerate() {
        shard.append(&format!("t{i:05}.jpg"), &std::fs::read(path).unwrap()).unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    Arc::new(ShardSet::open(&[folder.to_str().unwrap().to_string()]).unwrap())
}

/// What one way of decoding gave, held against the CPU's decoder.
#[derive(Debug, Default)]
struct Difference {
    sum: u64,
    values: u64,
    /// Images that the twin's batch decoder takes.
    for_batches: u64,
    largest: u8,
}

impl Difference {
    fn add(&mut self, found: &Image, expected: &Image) {
        assert_eq!((found.width, found.height), (expected.width, expected.height));
        for (a, b) in found.pixels.iter().zip(&expected.pixels) {
            let difference = a.abs_diff(*b);
            self.sum += u64::from(difference);
            self.largest = self.largest.max(difference);
        }
        self.values += expected.pixels.len() as u64;
    }

    fn mean(&self) -> f64 {
        self.sum as f64 / self.values as f64
    }
}

/// How the GPU's pixels differ from the CPU's, who decoded, and what the GPU said of what it refused.
fn compare(
    set: &Arc<ShardSet>,
    cuda: Cuda,
    views: Views,
    share: f64,
) -> (Difference, Counts, Option<String>) {
    let order = Order::shuffled(set.len(), 16, 7).unwrap();
    let loader = LoaderOptions {
        views,
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 0.1,
        ..LoaderOptions::train(Recipe::detco(), order, 7, 1)
    };
    let host = Loader::start(Arc::clone(set), loader.clone()).unwrap();
    let options = DeviceOptions { loader, share: Share::Fixed(share) };
    let mut device = DeviceLoader::start(Arc::clone(set), cuda, options).unwrap();
    let (mut decoder, mut expected) = (Decoder::new(), Image::new());
    let mut difference = Difference::default();
    for host in host {
        let (host, batch) = (host.unwrap(), device.next().expect("as many").unwrap());
        assert_eq!((batch.cursor, &batch.samples), (host.cursor, &host.samples));
        assert_eq!(batch.bad.len(), host.bad.len());
        for (slot, id) in batch.samples.iter().enumerate() {
            let sample = set.sample(*id).unwrap();
            decoder.decode(sample.jpeg(), &mut expected).unwrap();
            let header = probe(sample.jpeg()).unwrap();
            let batch_way = Way::of(&header, sample.jpeg()) == Way::Batch;
            let taken = header.components != Components::Gray && !header.width.is_multiple_of(13);
            difference.for_batches += u64::from(batch_way && taken);
            difference.add(&batch.frame(slot).unwrap().expect("decoded"), &expected);
        }
    }
    assert!(device.next().is_none());
    (difference, device.counts(), device.refusal())
}

/// Few pixels, so that on the twin decoding takes longer than rendering, and rendering that does not
/// wait for it is too early.
fn small() -> Recipe {
    let mut recipe = Recipe::detco();
    recipe.group_mut("crops").unwrap().size = 16;
    let patches = recipe.group_mut("patches").unwrap();
    patches.size = 24;
    patches.grid.as_mut().unwrap().patch = 8;
    recipe
}

/// On the twin the pixels are the CPU's own; nvJPEG's may differ.
#[test]
fn a_gpu_decodes_what_the_cpu_decodes() {
    let folder = tempfile::tempdir().unwrap();
    if !here_or_again("a_gpu_decodes_what_the_cpu_decodes", folder.path()) {
        return;
    }
    let _alone = alone();
    let most = if driver::is_here() { 0.0 } else { 1.0 };
    let data = tempfile::tempdir().unwrap();
    let set = shard(data.path());
    for share in [0.0, 0.5, 1.0] {
        for views in [Views::Decode, Views::Recipe(small())] {
            let cuda = Cuda::open(&setup(folder.path())).unwrap();
            let engines = cuda.hardware().map_err(ToString::to_string);
            let (difference, counts, refusal) = compare(&set, cuda, views, share);
            println!(
                "share {share}, engines {engines:?}: mean {:.4}, largest {}, {counts:?}, {refusal:?}",
                difference.mean(),
                difference.largest
            );
            assert!(difference.mean() <= most, "{difference:?}");
            assert!(counts.single > 0 && counts.cpu > 0, "{counts:?}, {refusal:?}");
            if engines.is_ok() && share == 1.0 {
                assert!(counts.batched > 0 && counts.refused == 0, "{counts:?}, {refusal:?}");
                // Also each worker's first, in whose thread nothing has run yet.
                let all = difference.for_batches;
                assert!(!driver::is_here() || counts.batched == all, "{counts:?}, {all}");
            }
        }
    }
    nothing_is_left();
}

/// The views of a batch on their way to the host.
struct Coming {
    views: Vec<PinnedBuffer>,
    expected: Vec<Vec<u8>>,
}

impl Coming {
    /// Queues the copies as a trainer queues its step: behind the rendering, and before the batch's
    /// memory is used again.
    fn queue(batch: &DeviceBatch<Cuda>, at: &Pointers, stream: &Stream) -> Vec<PinnedBuffer> {
        let lens = at.layout().view_bytes().map(|bytes| at.layout().n() * bytes * 4);
        batch.wait_on(stream).unwrap();
        if driver::is_here() && batch.cursor.step % 4 == 1 {
            // A slow step: the pipeline has filled all of its batches meanwhile.
            driver::hold(stream.handle(), 400);
        }
        let copied = at.views().iter().zip(lens).map(|(address, len)| {
            // SAFETY: the batch's own memory, which is not used again before the stream is here.
            let slice = unsafe { DeviceSlice::from_raw(*address, len) };
            let mut pinned = PinnedBuffer::new(stream.device(), len).unwrap();
            pinned.download(0..len, slice, stream).unwrap();
            pinned
        });
        let copied = copied.collect();
        batch.release_on(stream).unwrap();
        copied
    }

    /// Mean and largest difference from the loader's bytes, in levels.
    fn arrive(self, sum: &mut f64, values: &mut f64, largest: &mut f64) {
        for (pinned, expected) in self.views.iter().zip(&self.expected) {
            let numbers = pinned.bytes().unwrap().chunks_exact(4);
            let numbers =
                numbers.map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
            for (at, (number, byte)) in numbers.zip(expected).enumerate() {
                let level = (number * STD[at % 3] + MEAN[at % 3]) * 255.0;
                let off = f64::from((level - f32::from(*byte)).abs());
                *sum += off;
                *values += 1.0;
                *largest = largest.max(off);
            }
        }
    }
}

/// Views as a trainer reads them: by a stream of its own, two batches late, while the pipeline goes
/// on. On the twin they are the loader's to a thousandth of a level (normalised and back); on a GPU
/// pictures differ by what nvJPEG decodes otherwise.
#[test]
fn a_trainer_reads_the_loaders_views_on_the_device() {
    let folder = tempfile::tempdir().unwrap();
    if !here_or_again("a_trainer_reads_the_loaders_views_on_the_device", folder.path()) {
        return;
    }
    let _alone = alone();
    let data = tempfile::tempdir().unwrap();
    let set = shard(data.path());
    let order = Order::shuffled(set.len(), 8, 7).unwrap();
    let loader = LoaderOptions {
        on_bad_sample: OnBadSample::Skip,
        bad_share_max: 0.1,
        reduce: false, // nvJPEG decodes all of a picture at full size
        ..LoaderOptions::train(small(), order, 7, 2)
    };
    for share in [0.0, 0.5, 1.0].map(Share::Fixed).into_iter().chain([Share::Measure]) {
        let device = Device::open(0).unwrap();
        let stream = Stream::new(&device).unwrap();
        let cuda = Cuda::open(&setup(folder.path())).unwrap();
        let options = DeviceOptions { loader: loader.clone(), share };
        let mut batches = DeviceLoader::start(Arc::clone(&set), cuda, options).unwrap();
        let (mut sum, mut values, mut largest) = (0.0, 0.0, 0.0);
        let mut coming = VecDeque::new();
        for host in Loader::start(Arc::clone(&set), loader.clone()).unwrap() {
            let (host, batch) = (host.unwrap(), batches.next().expect("as many").unwrap());
            assert_eq!((batch.cursor, &batch.samples), (host.cursor, &host.samples));
            let pointers = batch.pointers().expect("views");
            let views = Coming::queue(&batch, &pointers, &stream);
            let expected = [("crops", 0), ("crops", 1), ("patches", 0), ("patches", 1)];
            let expected = expected.map(|(group, view)| host.view(group, view).to_vec()).into();
            coming.push_back(Coming { views, expected });
            if coming.len() > 2 {
                let first = coming.pop_front().expect("three");
                first.arrive(&mut sum, &mut values, &mut largest);
            }
        }
        for late in coming {
            late.arrive(&mut sum, &mut values, &mut largest);
        }
        println!("mean {:.6}, largest {largest:.6}, {:?}", sum / values, batches.counts());
        assert!(values > 5e5 && sum / values < if driver::is_here() { 1e-4 } else { 1.5 });
        assert!(!driver::is_here() || largest < 1e-3, "{largest}");
    }
    nothing_is_left();
}

/// Each call of driver and nvJPEG may fail. Whichever it is, the run ends with an error or goes on
/// with the CPU; it does not hang, and nothing is used that was freed.
#[test]
fn any_call_may_fail_and_the_run_ends_on_the_twin() {
    let folder = tempfile::tempdir().unwrap();
    if !driver::is_here() {
        return driver::again("any_call_may_fail_and_the_run_ends_on_the_twin");
    }
    let data = tempfile::tempdir().unwrap();
    let set = shard(data.path());
    let run = || -> Result<(), String> {
        let cuda = Cuda::open(&setup(folder.path())).map_err(|error| error.to_string())?;
        let order = Order::shuffled(set.len(), 8, 7).unwrap();
        let loader = LoaderOptions {
            on_bad_sample: OnBadSample::Skip,
            bad_share_max: 0.1,
            ..LoaderOptions::train(small(), order, 7, 1)
        };
        let options = DeviceOptions { loader, share: Share::Fixed(0.5) };
        let batches = DeviceLoader::start(Arc::clone(&set), cuda, options);
        for batch in batches.map_err(|error| error.to_string())?.take(2) {
            batch.map_err(|error| error.to_string())?;
        }
        Ok(())
    };
    // What fails while the GPU is opened leaves the run to the CPU.
    driver::fail_at(0);
    drop(Cuda::open(&setup(folder.path())).unwrap());
    let opening = driver::calls();
    let mut cpu = 0;
    for at in 1..=opening {
        driver::fail_at(at);
        match Decode::Auto.resolve(&setup(folder.path()), &Views::Recipe(small())) {
            Ok(Decoding::Cpu { missing: Some(_) }) => cpu += 1,
            Ok(Decoding::Nvjpeg(_)) => {} // without the hardware engine, or a call that undoes
            other => panic!("call {at}: {other:?}"),
        }
    }
    println!("{opening} calls to open, {cpu} failures leave the run to the CPU");
    assert!(cpu > 20);
    driver::fail_at(0);
    run().unwrap();
    let calls = driver::calls();
    let (mut errors, mut survived) = (0, 0);
    for at in (1..=calls).step_by(usize::try_from(calls / 80).unwrap().max(1)) {
        driver::fail_at(at);
        match run() {
            Ok(()) => survived += 1,
            Err(text) => {
                assert!(text.contains("failed"), "call {at}: {text}");
                errors += 1;
            }
        }
    }
    println!("{calls} calls, {errors} failures ended the run, {survived} did not");
    assert!(errors > 10 && survived > 0);
    assert_eq!(driver::faults(), 0);
}
