//! What reading costs beside decoding: `taskset -c 1 cargo bench -p detco-shards --bench read`.
//!
//! Three tables. What an image costs to reach from the page cache, by the map and by copying; what
//! memory a pipeline's look-ahead holds either way; and how long decoding waits for a cold disk, with
//! and without read-ahead (`posix_fadvise` drops the shards from the page cache; a file system in
//! memory keeps them). Uses DETCO_TEST_IMAGES, or makes its own images. The folder is TMPDIR's.

#[path = "../tests/support/images.rs"]
mod images;

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use detco_shards::decode::{Decoder, Image};
use detco_shards::format::map::Map;
use detco_shards::format::tar::Walker;
use detco_shards::format::writer::ShardWriter;
use detco_shards::order::{Cursor, Order};
use detco_shards::pipeline::{Loader, LoaderOptions, TASKS_MAX};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;

const SAMPLES_OF_A_SHARD: usize = 200;
const CACHE_LINE: usize = 64;

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (samples, rounds) = if measured { (800, 5) } else { (4, 1) };
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = write_shards(folder.path(), samples);
    println!("{samples} images of {:.0} kB", bytes as f64 / samples as f64 / 1e3);
    // First, while this process has freed nothing that it could use again.
    memory(folder.path());
    warm(folder.path(), samples, rounds);
    cold(folder.path(), rounds);
}

/// Writes shards and returns the bytes of their images.
fn write_shards(folder: &Path, samples: usize) -> usize {
    let jpegs = images::jpegs(samples);
    let mut bytes = 0;
    for shard in 0..samples.div_ceil(SAMPLES_OF_A_SHARD) {
        let name = format!("{shard:06}.tar");
        let mut writer = ShardWriter::create(folder, &name).expect("a shard");
        let first = shard * SAMPLES_OF_A_SHARD;
        for sample in first..samples.min(first + SAMPLES_OF_A_SHARD) {
            let jpeg = &jpegs[sample % jpegs.len()];
            writer.append(&format!("{sample:08}.jpg"), jpeg).expect("a member");
            writer.append(&format!("{sample:08}.cls"), b"7").expect("a member");
            bytes += jpeg.len();
        }
        writer.finish().expect("a file").seal().expect("a shard");
    }
    bytes
}

fn tars(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a list");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut tars: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "tar")).collect();
    tars.sort();
    tars
}

fn open(folder: &Path) -> ShardSet {
    ShardSet::open(&[folder.to_str().expect("text").to_owned()]).expect("the set opens")
}

/// Reads a byte of every cache line, as a decoder does at least.
fn touch(bytes: &[u8]) -> u64 {
    bytes.iter().step_by(CACHE_LINE).map(|&byte| u64::from(byte)).sum()
}

/// The images of a shard in memory, found by walking its headers.
fn walk(shard: &[u8], mut image: impl FnMut(&[u8])) {
    for member in Walker::new(shard) {
        let member = member.expect("a member");
        if member.name.ends_with(b".jpg") {
            image(member.payload);
        }
    }
}

/// Ways to every image from the page cache, each touched once, in us an image.
fn warm(folder: &Path, samples: usize, rounds: usize) {
    let tars = tars(folder);
    let set = open(folder);
    let expected: u64 =
        (0..set.len()).map(|id| touch(set.sample(id).expect("a sample").jpeg())).sum();
    println!("\nwarm: us an image, median of {rounds} (least, largest)");
    let time = |what: &str, expected: u64, run: &mut dyn FnMut() -> u64| {
        let mut times: Vec<f64> = (0..rounds)
            .map(|_| {
                let start = Instant::now();
                assert_eq!(black_box(run()), expected, "{what}");
                start.elapsed().as_secs_f64() * 1e6 / samples as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let (median, largest) = (times[rounds / 2], times[rounds - 1]);
        println!("  {what:<52} {median:7.2} ({:.2}, {largest:.2})", times[0]);
    };

    time("map, walk the headers, images not touched", samples as u64, &mut || {
        let mut count = 0;
        for tar in &tars {
            walk(Map::open(tar).expect("a map").bytes(), |_| count += 1);
        }
        count
    });
    time("map, walk the headers", expected, &mut || {
        let mut sum = 0;
        for tar in &tars {
            walk(Map::open(tar).expect("a map").bytes(), |image| sum += touch(image));
        }
        sum
    });
    let mut buffer = Vec::new();
    time("read(2) whole shards into a buffer, walk the headers", expected, &mut || {
        let mut sum = 0;
        for tar in &tars {
            buffer.clear();
            let mut file = File::open(tar).expect("a file");
            std::io::Read::read_to_end(&mut file, &mut buffer).expect("reads");
            walk(&buffer, |image| sum += touch(image));
        }
        sum
    });
    time("map, opened before, by the index", expected, &mut || {
        (0..set.len()).map(|id| touch(set.sample(id).expect("a sample").jpeg())).sum()
    });
    time("read(2), opened before, by the index", expected, &mut || {
        let read = |id| touch(copy(&set, id, &tars, &mut buffer));
        (0..set.len()).map(read).sum()
    });
    let names: Vec<String> = tars.iter().map(|tar| tar.display().to_string()).collect();
    time("crate webdataset, samples not decoded", expected, &mut || {
        let data = webdataset::WebDataset::builder_from(&names).build().expect("builds");
        let image = |sample: webdataset::Sample| match sample.get("jpg").expect("a field") {
            webdataset::Value::Bytes(bytes) => touch(bytes),
            other => panic!("{other:?}"),
        };
        data.iter().map(|sample| image(sample.expect("a sample"))).sum()
    });
}

/// An image's bytes read into a buffer: the alternative to a map.
fn copy<'b>(set: &ShardSet, id: u64, tars: &[PathBuf], buffer: &'b mut Vec<u8>) -> &'b [u8] {
    let (_, _, offset) = set.place(id).expect("a sample");
    let size = set.image_size(id).expect("a sample") as usize;
    if buffer.len() < size {
        buffer.resize(size, 0);
    }
    let file = File::open(&tars[set.shard_of(id)]).expect("a file");
    file.read_exact_at(&mut buffer[..size], offset).expect("reads");
    &buffer[..size]
}

/// What a look-ahead of `TASKS_MAX` images holds, as slices of the map and as copies.
fn memory(folder: &Path) {
    let set = open(folder);
    let ahead = set.len().min(TASKS_MAX as u64);
    println!("\n{ahead} images in hand: memory of this process's own, mapped page cache, in MB");
    let grown = |what: &str, hold: &mut dyn FnMut()| {
        let before = resident();
        hold();
        match before.zip(resident()) {
            Some((before, after)) => {
                let mb = |from: u64, to: u64| to.saturating_sub(from) as f64 * 1.024e-3;
                let (own, mapped) = (mb(before.0, after.0), mb(before.1, after.1));
                println!("  {what:<52} {own:7.1} {mapped:7.1}");
            }
            None => println!("  {what:<52} not told by this system"),
        }
    };
    let (tars, mut sums, mut copies) = (tars(folder), (0, 0), Vec::new());
    grown("copies", &mut || {
        for id in 0..ahead {
            let mut buffer = Vec::new();
            sums.0 += touch(copy(&set, id, &tars, &mut buffer));
            copies.push(buffer);
        }
    });
    grown("slices of the map", &mut || {
        for id in 0..ahead {
            sums.1 += touch(set.sample(id).expect("a sample").jpeg());
        }
    });
    assert_eq!(sums.0, sums.1);
}

/// Resident memory in KiB: this process's own, and mapped from the page cache.
fn resident() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some((field("RssAnon:")?, field("RssFile:")?))
}

/// What a stretch of work cost.
struct Cost {
    seconds: f64,
    cpu: f64,
    major_faults: u64,
}

/// Decoding in the order of training, from a warm and from a cold page cache.
fn cold(folder: &Path, rounds: usize) {
    println!(
        "\ndecoding in shuffled order: images/s, ms of CPU, ms of waiting and major faults an image"
    );
    let mut pixels = Vec::new();
    for (what, drop, ahead) in [
        ("warm", false, None),
        ("cold, no read-ahead", true, None),
        ("cold, read-ahead of the dispatcher", true, Some(TASKS_MAX)),
    ] {
        let mut cost = || {
            prepare(folder, drop);
            let set = open(folder);
            measure(|| pixels.push(decode_all(&set, ahead)))
        };
        let samples = open(folder).len();
        say(what, samples, (0..rounds).map(|_| cost()).collect());
    }
    assert!(pixels.iter().all(|sum| *sum == pixels[0]), "cold and warm are the same pictures");
    for (what, drop) in [("the loader with DetCo's views, warm", false), ("the same, cold", true)] {
        let samples = open(folder).len();
        let cost = || {
            prepare(folder, drop);
            let set = Arc::new(open(folder));
            measure(|| assert_eq!(load_all(set), samples))
        };
        say(what, samples, (0..rounds).map(|_| cost()).collect());
    }
}

/// Reads the shards, or drops them from the page cache; no map of them may exist.
fn prepare(folder: &Path, drop: bool) {
    for tar in tars(folder) {
        if drop {
            let file = File::open(&tar).expect("a file");
            let dropped = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            dropped.expect("advice on a file is taken");
        } else {
            black_box(std::fs::read(&tar).expect("reads"));
        }
    }
}

/// Decodes every sample; with read-ahead, as many samples ahead as told.
fn decode_all(set: &ShardSet, ahead: Option<usize>) -> u64 {
    let order = Order::shuffled(set.len(), 1, 7).expect("an order");
    let ids: Vec<u64> =
        (0..set.len()).map(|step| order.sample(Cursor { epoch: 0, step }, 0)).collect();
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let mut sum = 0;
    let ask = |place: usize| {
        ids.get(place).map_or((), |id| {
            set.ready(*id, &|| false).expect("ready");
        })
    };
    (0..ahead.unwrap_or(0)).for_each(ask);
    for (place, id) in ids.iter().enumerate() {
        if let Some(ahead) = ahead {
            ask(place + ahead);
        }
        let sample = set.sample(*id).expect("a sample");
        decoder.decode(sample.jpeg(), &mut image).expect("the files of a benchmark decode");
        sum += touch(&image.pixels);
    }
    sum
}

/// One epoch through the whole pipeline with one worker; returns the samples that came.
fn load_all(set: Arc<ShardSet>) -> u64 {
    let order = Order::shuffled(set.len(), set.len().min(32), 7).expect("an order");
    let options =
        LoaderOptions { workers: 1, ..LoaderOptions::train(Recipe::detco(), order, 7, 1) };
    let loader = Loader::start(set, options).expect("the loader starts");
    loader.map(|batch| batch.expect("a batch").len() as u64).sum()
}

fn measure(work: impl FnOnce()) -> Cost {
    let (faults, cpu) = process();
    let start = Instant::now();
    work();
    let seconds = start.elapsed().as_secs_f64();
    let (faults_after, cpu_after) = process();
    Cost { seconds, cpu: cpu_after - cpu, major_faults: faults_after - faults }
}

/// Major faults and CPU seconds of this process so far; zeros where the system does not tell.
fn process() -> (u64, f64) {
    const TICKS: f64 = 100.0; // of USER_HZ a second, on every Linux
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let fields: Vec<u64> = fields.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
    // Field 3 of proc(5) is the first here: majflt is 12, utime 14, stime 15.
    match fields.get(9..13) {
        Some([major, _, user, system]) => (*major, (user + system) as f64 / TICKS),
        _ => (0, 0.0),
    }
}

/// Prints the run of median time.
fn say(what: &str, samples: u64, mut costs: Vec<Cost>) {
    costs.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
    let samples = samples as f64;
    let Cost { seconds, cpu, major_faults } = &costs[costs.len() / 2];
    println!(
        "  {what:<40} {:7.1} images/s {:7.3} {:7.3} {:7.2}",
        samples / seconds,
        cpu / samples * 1e3,
        (seconds - cpu).max(0.0) / samples * 1e3,
        *major_faults as f64 / samples,
    );
}
