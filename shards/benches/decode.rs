//! Decoding speed of one thread: `taskset -c 1 cargo bench -p detco-shards --bench decode`.
//!
//! Reads the files of DETCO_TEST_IMAGES, or makes its own. Each file's time is the least of all rounds,
//! which other programs on the machine disturb least.

#[path = "../tests/support/images.rs"]
mod images;

use std::hint::black_box;
use std::time::{Duration, Instant};

use detco_shards::decode::{Decoder, Image};

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (rounds, count) = if measured { (7, 800) } else { (1, 2) };
    let files = images::jpegs(count);
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let mut least = vec![Duration::MAX; files.len()];
    let mut pixels = 0;
    for round in 0..rounds {
        for (i, file) in files.iter().enumerate() {
            let start = Instant::now();
            decoder.decode(black_box(file), &mut image).expect("the files of a benchmark decode");
            least[i] = start.elapsed().min(least[i]);
            if round == 0 {
                pixels += u64::from(image.width) * u64::from(image.height);
            }
        }
    }
    let bytes: usize = files.iter().map(Vec::len).sum();
    let seconds = least.iter().sum::<Duration>().as_secs_f64();
    println!(
        "{}: {} images, {:.1} images/s, {:.1} MB/s, {:.1} megapixels/s",
        decoder.name(),
        files.len(),
        files.len() as f64 / seconds,
        bytes as f64 / seconds / 1e6,
        pixels as f64 / seconds / 1e6,
    );
}
