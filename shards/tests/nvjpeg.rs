//! nvJPEG of `cargo xtask setup`: it is found at run time, and nothing needs it to start.

#![cfg(feature = "nvjpeg")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use detco_shards::cuda::Search;
use detco_shards::decode::nvjpeg::{Nvjpeg, live_handles};
use detco_shards::decode::{Decoder, Image};
use detco_shards::device::{
    Counts, Cuda, DeviceLoader, DeviceOptions, GpuError, Number, Setup, Share,
};
use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions, OnBadSample, Views};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;

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
    Setup::new(libtorch.as_deref(), cache.to_path_buf(), Number::F32)
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
            decoder.decode(set.sample(*id).unwrap().jpeg(), &mut expected).unwrap();
            difference.add(&batch.frame(slot).unwrap().expect("decoded"), &expected);
        }
    }
    assert!(device.next().is_none());
    (difference, device.counts(), device.refusal())
}

/// The one test that needs a GPU. Without one it shows that opening says what is missing.
#[test]
fn a_gpu_decodes_what_the_cpu_decodes_or_is_said_to_be_missing() {
    let folder = tempfile::tempdir().unwrap();
    match Cuda::open(&setup(folder.path())) {
        Ok(_) => {}
        Err(GpuError::Cuda(error)) => {
            let text = error.to_string();
            assert!(text.contains("CUDA"), "{text}");
            return println!("no GPU here: {text}");
        }
        Err(error) => panic!("{error}"),
    }
    let data = tempfile::tempdir().unwrap();
    let set = shard(data.path());
    for share in [0.0, 0.5, 1.0] {
        for views in [Views::Decode, Views::Train(Recipe::detco())] {
            let cuda = Cuda::open(&setup(folder.path())).unwrap();
            let engines = cuda.hardware().map_err(ToString::to_string);
            let (difference, counts, refusal) = compare(&set, cuda, views, share);
            println!(
                "share {share}, engines {engines:?}: mean {:.4}, largest {}, {counts:?}, {refusal:?}",
                difference.mean(),
                difference.largest
            );
            assert!(difference.mean() <= 1.0, "{difference:?}");
            assert!(counts.single > 0 && counts.cpu > 0, "{counts:?}, {refusal:?}");
            if engines.is_ok() && share == 1.0 {
                assert!(counts.batched > 0 && counts.refused == 0, "{counts:?}, {refusal:?}");
            }
        }
    }
    assert!(live_handles().iter().all(|(_, live)| *live == 0), "{:?}", live_handles());
}
