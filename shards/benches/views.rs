//! Speed of one thread from JPEG bytes to DetCo's four views:
//! `taskset -c 1 cargo bench -p detco-shards --bench views`.
//!
//! With `-- --plain` in plain loops instead of the CPU's vector instructions.
//!
//! The floor is what no recipe can avoid: decoding and four resizes. Each figure adds up the least time of
//! every image over all rounds; the mean over the rounds stands beside it, and the distance between the
//! two is what the machine's other guests took.

#[path = "../tests/support/images.rs"]
mod images;

use std::hint::black_box;
use std::time::{Duration, Instant};

use detco_shards::decode::{Decoder, Image};
use detco_shards::views::{Op, Recipe, Rect, Renderer, SamplePlan, Step, ViewPlan};

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (rounds, count) = if measured { (7, 400) } else { (1, 2) };
    let files = images::jpegs(count);
    let recipe = Recipe::detco();
    let bare = {
        let mut bare = recipe.clone();
        bare.groups[0].steps = vec![Step::Flip { p: 0.5 }].into();
        bare
    };
    let plain = std::env::args().any(|argument| argument == "--plain");
    let mut renderer = if plain { Renderer::plain() } else { Renderer::new() };
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let mut out = vec![0; recipe.bytes()];

    let names = ["decode", "4 resizes, cut, flip", "4 views"];
    let mut least = vec![[Duration::MAX; 3]; files.len()];
    let mut all = [Duration::ZERO; 3];
    for _ in 0..rounds {
        for (sample, (file, least)) in files.iter().zip(&mut least).enumerate() {
            let mut time = |what: usize, work: &mut dyn FnMut()| {
                let start = Instant::now();
                work();
                let took = start.elapsed();
                least[what] = took.min(least[what]);
                all[what] += took;
            };
            time(0, &mut || {
                decoder.decode(file, &mut image).expect("the files of a benchmark decode");
            });
            for (what, recipe) in [(1, &bare), (2, &recipe)] {
                time(what, &mut || {
                    let plan = recipe.draw(image.width, image.height, 1, 0, sample as u64);
                    render(&mut renderer, &image, &plan, &mut out);
                });
            }
        }
    }
    let seconds: [f64; 3] = std::array::from_fn(|what| {
        least.iter().map(|times| times[what]).sum::<Duration>().as_secs_f64()
    });
    let mean = all.map(|all| all.as_secs_f64() / f64::from(rounds));
    let each = |seconds: f64| seconds / files.len() as f64 * 1e6;
    for ((name, least), mean) in names.iter().zip(seconds).zip(mean) {
        println!("{name}: {:.0} us an image (mean {:.0})", each(least), each(mean));
    }
    let rate = |seconds: f64| files.len() as f64 / seconds;
    println!("floor (decode + 4 resizes): {:.1} images/s", rate(seconds[0] + seconds[1]));
    let (least, mean) = (rate(seconds[0] + seconds[2]), rate(mean[0] + mean[2]));
    println!("DetCo views: {least:.1} images/s on one core (mean {mean:.1})");

    if measured {
        large(&files[0], &recipe, &mut renderer, &mut out);
    }

    decoder.decode(&files[0], &mut image).expect("the files of a benchmark decode");
    let crop = Rect { left: 0, top: 0, width: image.width, height: image.height };
    let mut baseline = 0.0;
    for ops in [
        vec![],
        vec![Op::Brightness(1.2)],
        vec![Op::Contrast(1.2)],
        vec![Op::Saturation(1.2)],
        vec![Op::Hue(0.07)],
        vec![Op::Gray],
        vec![Op::Blur(0.7)],
        vec![Op::Blur(1.7)],
    ] {
        let plan = ViewPlan { size: 224, crop, ops, ..ViewPlan::default() };
        let mut least = f64::INFINITY;
        for _ in 0..rounds * 20 {
            let start = Instant::now();
            renderer.view(black_box(&image), &plan, &mut out[..plan.bytes()]);
            least = least.min(start.elapsed().as_secs_f64() * 1e6);
        }
        match plan.ops.first() {
            None => baseline = least,
            Some(op) => println!("{op:?}: {:.0} us a view of 224", least - baseline),
        }
    }
}

/// Photos of 12 and 48 million pixels: one of the files, enlarged.
fn large(file: &[u8], recipe: &Recipe, renderer: &mut Renderer, out: &mut [u8]) {
    let photo = images::rgb(file);
    for (width, height) in [(4000, 3000), (8000, 6000)] {
        let filter = image::imageops::FilterType::Triangle;
        let photo = image::imageops::resize(&photo, width, height, filter);
        let mut bytes = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90);
        photo.write_with_encoder(encoder).expect("memory takes all of it");
        let (mut decoder, mut image) = (Decoder::new(), Image::new());
        let mut least = [Duration::MAX; 2];
        for sample in 0..5 {
            let start = Instant::now();
            decoder.decode(&bytes, &mut image).expect("what was just encoded decodes");
            let decoded = Instant::now();
            render(renderer, &image, &recipe.draw(width, height, 1, 0, sample), out);
            least[0] = least[0].min(decoded - start);
            least[1] = least[1].min(decoded.elapsed());
        }
        let [decode, views] = least.map(|time| time.as_secs_f64() * 1e3);
        println!(
            "{width}x{height}: decode {decode:.0} ms, 4 views {views:.0} ms (the least of five plans)"
        );
    }
}

fn render(renderer: &mut Renderer, image: &Image, plan: &SamplePlan, out: &mut [u8]) {
    for view in &plan.views {
        renderer.view(image, view, &mut out[..view.bytes()]);
    }
    black_box(out);
}
