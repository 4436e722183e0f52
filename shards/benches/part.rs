//! What it saves to decode only what the views look at, and what it changes:
//! `taskset -c 1 cargo bench -p detco-shards --bench part`.
//!
//! Reads the files of DETCO_TEST_IMAGES, or makes its own. Photos of 12 and 48 million pixels are
//! made of them: enlarged twice, which is about as sharp as a camera's pixels are, laid out side by
//! side, and coded as cameras do (4:2:0, quality 90). The ways take turns for every plan. Times are the
//! CPU's; a figure is the median over plans and rounds, ratios are of the sums over all of them.
//!
//! Errors are levels of 255 between a view of the whole picture and the same view of one that was
//! decoded at a share of its size, before colour and blur, by how many pixels a pixel of the view
//! is made of.

#[path = "../tests/support/images.rs"]
mod images;

use std::hint::black_box;

use detco_shards::decode::{Decoder, Frame, Image, Part, Rect, probe};
use detco_shards::stats::Mark;
use detco_shards::views::{Recipe, Renderer, SamplePlan, ViewPlan, needed};

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let only = |what: &str| {
        let named = std::env::args().skip(1).any(|argument| !argument.starts_with("--"));
        !named || std::env::args().any(|argument| argument == what)
    };
    let (rounds, count) = if measured { (5, 400) } else { (1, 2) };
    let files = images::jpegs(count);
    println!("{}", Decoder::new().name());
    let mut bench = Bench::default();
    if only("files") {
        for (task, recipe) in tasks() {
            bench.compare(&format!("{} files, {task}", files.len()), &files, &recipe, rounds);
        }
    }
    let sizes: &[(u32, u32)] = if measured { &[(4000, 3000), (8000, 6000)] } else { &[(600, 400)] };
    for &(width, height) in sizes {
        let photos: Vec<_> = (0..3).map(|at| photo(&files, (width, height), 2, at)).collect();
        let bytes = photos.iter().map(Vec::len).sum::<usize>() as f64 / photos.len() as f64 / 1e6;
        let name = format!("photos of {width}x{height}, {bytes:.1} MB");
        for (task, recipe) in tasks() {
            if only("photos") {
                let files: Vec<_> =
                    photos.iter().cycle().take(if measured { 15 } else { 1 }).cloned().collect();
                bench.compare(&format!("{name}, {task}"), &files, &recipe, 1);
            }
        }
    }
    if only("errors") {
        let size = if measured { (4000, 3000) } else { (600, 400) };
        for (name, enlarged) in [("enlarged twice", 2), ("as they are", 1)] {
            let photos: Vec<_> = (0..3).map(|at| photo(&files, size, enlarged, at)).collect();
            println!("errors, pictures {name}:");
            errors(&photos, if measured { 224 } else { 24 });
            drawn(&photos, if measured { 224 } else { 24 });
        }
    }
}

/// Name and recipe.
fn tasks() -> [(&'static str, Recipe); 2] {
    let supervised = Recipe::supervised(224);
    [("T2 (crop of 224, flip)", supervised), ("T3 (DetCo's four views)", Recipe::detco())]
}

/// A JPEG of this size, laid with files that are enlarged so many times.
fn photo(files: &[Vec<u8>], (width, height): (u32, u32), enlarged: u32, first: usize) -> Vec<u8> {
    let mut canvas = image::RgbImage::new(width, height);
    let mut tiles = files.iter().cycle().skip(first * 7).map(|file| {
        let tile = images::rgb(file);
        let (width, height) = (tile.width() * enlarged, tile.height() * enlarged);
        let filter = image::imageops::FilterType::Lanczos3;
        if enlarged == 1 { tile } else { image::imageops::resize(&tile, width, height, filter) }
    });
    let (mut x, mut y, mut row) = (0, 0, u32::MAX);
    while y < height {
        let tile = tiles.next().expect("an endless cycle");
        image::imageops::replace(&mut canvas, &tile, i64::from(x), i64::from(y));
        row = row.min(tile.height());
        x += tile.width();
        if x >= width {
            (x, y, row) = (0, y + row, u32::MAX);
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
    encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_2_2);
    encoder
        .encode(&canvas, width as u16, height as u16, jpeg_encoder::ColorType::Rgb)
        .expect("memory takes all of it");
    bytes
}

#[derive(Default)]
struct Bench {
    decoder: Decoder,
    renderer: Renderer,
    image: Image,
    out: Vec<u8>,
}

/// The ways a sample is made.
const WAYS: [&str; 3] = ["whole", "box", "box, reduced"];

impl Bench {
    fn compare(&mut self, name: &str, files: &[Vec<u8>], recipe: &Recipe, rounds: usize) {
        let mut times = [const { Vec::new() }; 3];
        let mut reductions = [0usize; 5];
        for round in 0..rounds {
            for (sample, file) in files.iter().enumerate() {
                let header = probe(file).expect("the files of a benchmark decode");
                let at = (round * files.len() + sample) as u64;
                let plan = recipe.draw(header.width, header.height, 1, 0, at);
                for turn in 0..3 {
                    let way = (turn + sample) % 3;
                    let part = match way {
                        0 => None,
                        1 => needed(&plan.views, 1),
                        _ => needed(&plan.views, 4),
                    };
                    let part = part.unwrap_or(Part::whole(header.width, header.height));
                    if way == 2 {
                        reductions[part.reduction as usize] += 1;
                    }
                    times[way].push(self.sample(file, part, &plan));
                }
            }
        }
        println!("{name}:");
        for (way, times_of) in WAYS.iter().zip(&times) {
            let [decode, views] =
                [0, 1].map(|what| median(times_of.iter().map(|t| t[what]).collect()));
            let each: Vec<f64> = times_of.iter().map(|t| t[0] + t[1]).collect();
            let whole: f64 = times[0].iter().map(|t| t[0] + t[1]).sum();
            let sum: f64 = each.iter().sum();
            let mean = sum / each.len() as f64;
            println!(
                "  {way}: decode {decode:.0} us, views {views:.0} us; together {:.0} us (mean {mean:.0}), \
                 {:.3} of whole",
                median(each),
                sum / whole
            );
        }
        println!("  reductions 1, 2, 4: {:?}", [1, 2, 4].map(|r| reductions[r]));
    }

    /// Microseconds to decode and to render.
    fn sample(&mut self, file: &[u8], part: Part, plan: &SamplePlan) -> [f64; 2] {
        let start = Mark::now().cpu;
        let header = probe(file).expect("the files of a benchmark decode");
        let part = self
            .decoder
            .decode_part(file, &header, part, &mut self.image)
            .expect("the files of a benchmark decode");
        let decoded = Mark::now().cpu;
        let frame = Frame { image: &self.image, part };
        for view in &plan.views {
            self.out.resize(view.bytes(), 0);
            self.renderer.view(frame, view, &mut self.out);
        }
        black_box(&self.out);
        [decoded - start, Mark::now().cpu - decoded].map(|nanos| nanos as f64 / 1e3)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// By reduction and ratio: the mean error, that of the worst view, the largest of a pixel.
fn errors(photos: &[Vec<u8>], size: u32) {
    let (mut decoder, mut renderer) = (Decoder::new(), Renderer::new());
    let mut images = Vec::new();
    for file in photos {
        let header = probe(file).expect("the files of a benchmark decode");
        let whole = Part::whole(header.width, header.height);
        images.push([1, 2, 4].map(|reduction| {
            let mut image = Image::new();
            let part = decoder
                .decode_part(file, &header, Part { reduction, ..whole }, &mut image)
                .expect("the files of a benchmark decode");
            (image, part)
        }));
    }
    for (at, reduction) in [2u32, 4].into_iter().enumerate() {
        for tenths in [10, 12, 15, 20, 25, 30, 40] {
            let side = size * reduction * tenths / 10;
            let (mut sum, mut worst_mean, mut worst, mut count) = (0.0, 0.0f64, 0, 0);
            for scales in &images {
                let (whole, _) = &scales[0];
                let (image, part) = &scales[at + 1];
                if side > whole.width.min(whole.height) {
                    continue;
                }
                for i in 0..20u32 {
                    let left = (i * 7919 + 13) % (whole.width - side + 1);
                    let top = (i * 104_729 + 7) % (whole.height - side + 1);
                    let crop = Rect { left, top, width: side, height: side };
                    let plan = ViewPlan { size, crop, ..ViewPlan::default() };
                    let mut outs = [(); 2].map(|()| vec![0; (size * size * 3) as usize]);
                    renderer.view(whole, &plan, &mut outs[0]);
                    renderer.view(Frame { image, part: *part }, &plan, &mut outs[1]);
                    let (mean, largest) = distance(&outs[0], &outs[1]);
                    worst = worst.max(largest);
                    (sum, worst_mean, count) = (sum + mean, worst_mean.max(mean), count + 1);
                }
            }
            if count > 0 {
                println!(
                    "  1/{reduction}, {:.1} pixels a pixel ({:.1} left): mean {:.3}, worst view {worst_mean:.3}, \
                     largest {worst}, {count} views",
                    f64::from(reduction * tenths) / 10.0,
                    f64::from(tenths) / 10.0,
                    sum / f64::from(count)
                );
            }
        }
    }
}

/// Errors of DetCo's own plans, colour and blur included, at the reductions that they allow.
fn drawn(photos: &[Vec<u8>], size: u32) {
    let recipe = Recipe::detco().with_size(size);
    let (mut decoder, mut renderer) = (Decoder::new(), Renderer::new());
    let (mut all, mut image) = (Image::new(), Image::new());
    for file in photos {
        let header = probe(file).expect("the files of a benchmark decode");
        decoder.decode(file, &mut all).expect("the files of a benchmark decode");
        let mut seen = [(0.0, 0.0f64, 0, 0); 5];
        for sample in 0..10 {
            let plan = recipe.draw(header.width, header.height, 1, 0, sample);
            let part = needed(&plan.views, u32::MAX).expect("there are views");
            let part = decoder
                .decode_part(file, &header, part, &mut image)
                .expect("the files of a benchmark decode");
            for view in &plan.views {
                let mut outs = [(); 2].map(|()| vec![0; view.bytes()]);
                renderer.view(&all, view, &mut outs[0]);
                renderer.view(Frame { image: &image, part }, view, &mut outs[1]);
                let (mean, worst) = distance(&outs[0], &outs[1]);
                let (sum, worst_mean, largest, count) = &mut seen[part.reduction as usize];
                *sum += mean;
                *worst_mean = worst_mean.max(mean);
                *largest = worst.max(*largest);
                *count += 1;
            }
        }
        for (reduction, (sum, worst_mean, largest, count)) in seen.into_iter().enumerate() {
            if count > 0 {
                println!(
                    "  DetCo's views, colour and blur, 1/{reduction}: mean {:.3}, worst view \
                     {worst_mean:.3}, largest {largest}, {count} views",
                    sum / f64::from(count)
                );
            }
        }
    }
}

/// Mean and largest distance.
fn distance(a: &[u8], b: &[u8]) -> (f64, u8) {
    let off = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    (off.clone().map(f64::from).sum::<f64>() / a.len() as f64, off.max().unwrap_or(0))
}
