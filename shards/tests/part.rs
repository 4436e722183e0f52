//! Pictures decoded as far as the views need them: the same pixels inside the box, the same views of
//! a reduced picture within a level, and nothing worse of damaged files.

#[path = "support/images.rs"]
mod images;

use detco_shards::decode::{Decoder, Frame, Image, Part, Rect, probe};
use detco_shards::views::{Crop, Op, REDUCTIONS, Recipe, Renderer, SamplePlan, ViewPlan, needed};
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use proptest::prelude::*;

/// A small generator of its own.
struct Dice(u64);

impl Dice {
    fn below(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0x1405_7B7E_F767_814F);
        ((self.0 >> 33) % u64::from(below)) as u32
    }

    /// A box of any size, often at an edge.
    fn rect(&mut self, width: u32, height: u32) -> Rect {
        let mut side = |length: u32| {
            let from = if self.below(4) == 0 { 0 } else { self.below(length) };
            let rest = length - from;
            (from, if self.below(4) == 0 { rest } else { 1 + self.below(rest) })
        };
        let ((left, width), (top, height)) = (side(width), side(height));
        Rect { left, top, width, height }
    }
}

const SAMPLINGS: [(&str, SamplingFactor); 6] = [
    ("4:4:4", SamplingFactor::F_1_1),
    ("4:2:2", SamplingFactor::F_2_1),
    ("4:4:0", SamplingFactor::F_1_2),
    ("4:2:0", SamplingFactor::F_2_2),
    ("4:1:1", SamplingFactor::F_4_1),
    ("4:1:0", SamplingFactor::F_4_2),
];

fn encode(image: &Image, sampling: SamplingFactor, progressive: bool, restart: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, 90);
    encoder.set_sampling_factor(sampling);
    encoder.set_progressive(progressive);
    encoder.set_restart_interval(restart);
    let (width, height) = (image.width as u16, image.height as u16);
    encoder.encode(&image.pixels, width, height, ColorType::Rgb).unwrap();
    bytes
}

/// Every kind of JPEG, at sizes that end inside a block and outside.
fn kinds(sizes: &[(u32, u32)]) -> Vec<(String, Vec<u8>)> {
    let mut kinds = Vec::new();
    for &(width, height) in sizes {
        let picture = images::textured(width, height, 8);
        for (name, sampling) in SAMPLINGS {
            for (progressive, restart) in [(false, 0), (false, 3), (true, 0)] {
                let name = format!("{width}x{height} {name} {progressive} {restart}");
                kinds.push((name, encode(&picture, sampling, progressive, restart)));
            }
        }
        for (name, color, step) in [("gray", ColorType::Luma, 1), ("cmyk", ColorType::Cmyk, 4)] {
            let mut bytes = Vec::new();
            let pixels = picture.pixels.chunks(3).flat_map(|p| [p[0], p[1], p[2], 99]);
            let pixels: Vec<u8> = match step {
                1 => picture.pixels.iter().step_by(3).copied().collect(),
                _ => pixels.collect(),
            };
            let encoder = Encoder::new(&mut bytes, 80);
            encoder.encode(&pixels, width as u16, height as u16, color).unwrap();
            kinds.push((format!("{width}x{height} {name}"), bytes));
        }
    }
    kinds
}

/// The pixels of a box of the picture as a frame has them: those of every cell that it touches.
fn cut(frame: Frame<'_>, area: Rect) -> Vec<u8> {
    let Part { area: all, reduction } = frame.part;
    assert!(all.contains(&area), "{area:?} of {all:?}");
    let span = |from: u32, length: u32, origin: u32| {
        let first = (from - origin) / reduction;
        first as usize..((from + length - origin).div_ceil(reduction)) as usize
    };
    let columns = span(area.left, area.width, all.left);
    let stride = frame.image.width as usize * 3;
    span(area.top, area.height, all.top)
        .flat_map(|y| &frame.image.pixels[y * stride..][columns.start * 3..columns.end * 3])
        .copied()
        .collect()
}

/// Decodes random boxes of a file at a reduction, and holds their pixels against those of all of it.
fn hold_boxes(name: &str, bytes: &[u8], reduction: u32, count: u32) {
    let header = probe(bytes).unwrap();
    let whole = Part { reduction, ..Part::whole(header.width, header.height) };
    let (mut decoder, mut all, mut image) = (Decoder::new(), Image::new(), Image::new());
    let all_part = decoder.decode_part(bytes, &header, whole, &mut all).unwrap();
    let all = Frame { image: &all, part: all_part };
    let mut dice = Dice(u64::from(reduction));
    for _ in 0..count {
        let area = dice.rect(header.width, header.height);
        let part = decoder.decode_part(bytes, &header, Part { area, reduction }, &mut image);
        let part = part.unwrap_or_else(|e| panic!("{name}: {area:?} at 1/{reduction}: {e}"));
        assert_eq!(part.reduction, all_part.reduction, "{name}");
        assert!(part.area.left % part.reduction == 0 && part.area.top % part.reduction == 0);
        let size = [part.area.width, part.area.height].map(|side| side.div_ceil(part.reduction));
        assert_eq!([image.width, image.height], size, "{name}: {part:?}");
        assert_eq!(image.pixels.len() as u32, size[0] * size[1] * 3, "{name}: {part:?}");
        let same = cut(Frame { image: &image, part }, area) == cut(all, area);
        assert!(same, "{name}: {area:?} at 1/{reduction}, decoded {part:?}");
    }
}

#[test]
fn inside_any_box_the_pixels_are_those_of_the_whole() {
    let kinds = kinds(&[(1, 1), (5, 7), (17, 33), (64, 64), (131, 77), (240, 170)]);
    for (name, bytes) in &kinds {
        for reduction in [1, 2, 4] {
            hold_boxes(name, bytes, reduction, 60);
        }
    }
}

/// The files of DETCO_TEST_IMAGES, if it is set.
#[test]
fn inside_any_box_of_a_real_file_the_pixels_are_those_of_the_whole() {
    let mut files = 0;
    for path in images::real_files() {
        let bytes = std::fs::read(&path).unwrap();
        let Ok(header) = probe(&bytes) else { continue };
        // A few are of tens of megapixels.
        if header.width * header.height < 4_000_000 {
            hold_boxes(&path.display().to_string(), &bytes, 1, 6);
            hold_boxes(&path.display().to_string(), &bytes, 2, 2);
            hold_boxes(&path.display().to_string(), &bytes, 4, 2);
            files += 1;
        }
    }
    println!("{files} files, ten boxes each");
}

#[test]
fn only_what_is_needed_is_decoded() {
    let bytes = encode(&images::textured(640, 480, 1), SamplingFactor::F_2_2, false, 0);
    let header = probe(&bytes).unwrap();
    let area = Rect { left: 300, top: 200, width: 100, height: 90 };
    let mut image = Image::new();
    // Columns from the beginning of a unit of 16 on, with four or more for the interpolation of chroma
    // on each side, and rows down to the box's last.
    for (reduction, size) in [(1, [116, 290]), (2, [60, 145]), (4, [36, 73])] {
        let wanted = Part { area, reduction };
        let part = Decoder::new().decode_part(&bytes, &header, wanted, &mut image).unwrap();
        assert_eq!([image.width, image.height], size, "{part:?}");
        let left = if reduction == 4 { 272 } else { 288 };
        assert_eq!((part.area.left, part.area.top, part.reduction), (left, 0, reduction));
    }
}

fn views(plan: &SamplePlan) -> impl Iterator<Item = &ViewPlan> {
    plan.views.iter()
}

/// All views of a plan.
fn render(renderer: &mut Renderer, frame: Frame<'_>, plan: &SamplePlan) -> Vec<Vec<u8>> {
    let mut outs = Vec::new();
    for view in &plan.views {
        let mut out = vec![0; view.bytes()];
        renderer.view(frame, view, &mut out);
        outs.push(out);
    }
    outs
}

/// Mean and largest distance.
fn distance(a: &[u8], b: &[u8]) -> (f64, u8) {
    let off = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    (off.clone().map(f64::from).sum::<f64>() / a.len() as f64, off.max().unwrap_or(0))
}

#[test]
fn views_of_a_box_are_those_of_the_whole_to_the_byte() {
    let bytes = encode(&images::textured(500, 375, 3), SamplingFactor::F_2_2, false, 0);
    let header = probe(&bytes).unwrap();
    let (mut decoder, mut renderer) = (Decoder::new(), Renderer::new());
    let (mut all, mut image) = (Image::new(), Image::new());
    decoder.decode(&bytes, &mut all).unwrap();
    let mut supervised = Recipe::supervised(48);
    supervised.groups[0].crop = Crop::random([0.01, 0.3]);
    let squash = Recipe::squash(64, 48);
    for recipe in [Recipe::detco().with_size(48), supervised, squash] {
        for sample in 0..100 {
            let plan = recipe.draw(header.width, header.height, 7, 0, sample);
            let part = needed(views(&plan), 1).unwrap();
            let part = decoder.decode_part(&bytes, &header, part, &mut image).unwrap();
            let frame = Frame { image: &image, part };
            let same = render(&mut renderer, frame, &plan)
                == render(&mut renderer, Frame::from(&all), &plan);
            assert!(same, "{plan:?}");
        }
    }
}

/// Colour and blur included, every view is within a level on average. No arithmetic gives that bound, since
/// a smaller inverse transform is another low-pass than the filter over all pixels: it is the tolerance
/// that views have against Pillow. Single bytes may be far off, as where the hue of a nearly gray pixel
/// turns. Of a generated picture with fine texture and noise, and of those of DETCO_TEST_IMAGES.
#[test]
fn views_of_reduced_pictures_are_within_a_level() {
    let mut files: Vec<Vec<u8>> = SAMPLINGS[..5]
        .iter()
        .map(|(_, sampling)| encode(&images::textured(1200, 900, 5), *sampling, false, 0))
        .collect();
    let real = images::real_files().into_iter().step_by(8);
    files.extend(real.map(|path| std::fs::read(path).unwrap()));
    let (mut decoder, mut renderer) = (Decoder::new(), Renderer::new());
    let (mut all, mut image) = (Image::new(), Image::new());
    let mut worst = [(0.0f64, 0, 0); 5];
    // Views so small that files of ImageNet's size are reduced for them.
    for (number, file) in files.iter().enumerate() {
        let header = probe(file).unwrap();
        decoder.decode(file, &mut all).unwrap();
        for (sample, size) in [(0, 24), (1, 48), (2, 24), (3, 64)] {
            let recipe = Recipe::detco().with_size(size);
            let at = number as u64 * 4 + sample;
            let plan = recipe.draw(header.width, header.height, 7, 0, at);
            let part = needed(views(&plan), 4).unwrap();
            let part = decoder.decode_part(file, &header, part, &mut image).unwrap();
            let got = render(&mut renderer, Frame { image: &image, part }, &plan);
            let want = render(&mut renderer, Frame::from(&all), &plan);
            for (got, want) in got.iter().zip(&want) {
                let (mean, largest) = distance(got, want);
                assert!(mean <= 1.0, "file {number}, {part:?}: mean {mean}, largest {largest}");
                let seen = &mut worst[part.reduction as usize];
                *seen = (seen.0.max(mean), seen.1.max(largest), seen.2 + 1);
            }
        }
    }
    for reduction in [1, 2, 4] {
        let (mean, largest, views) = worst[reduction];
        println!("1/{reduction}: {views} views, worst mean {mean:.3}, largest {largest}");
    }
    assert_eq!((worst[1].0, worst[1].1), (0.0, 0));
    assert!(worst[2].2 > 0 && worst[4].2 > 0, "nothing was reduced: {worst:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_needed_holds_every_crop_and_leaves_enough(
        crops in prop::collection::vec((0u32..5000, 0u32..5000, 1u32..5000, 1u32..5000), 1..5),
        size in 1u32..300,
        most in prop::sample::select(vec![1u32, 2, 4]),
    ) {
        let plans: Vec<_> = crops.iter().map(|&(left, top, width, height)| {
            let crop = Rect { left, top, width, height };
            ViewPlan { size, crop, ..ViewPlan::default() }
        }).collect();
        let Part { area, reduction } = needed(&plans, most).unwrap();
        let short = plans.iter().map(|plan| plan.crop.width.min(plan.crop.height)).min().unwrap();
        prop_assert!(plans.iter().all(|plan| area.contains(&plan.crop)));
        prop_assert!(reduction <= most);
        for (allowed, ratio) in REDUCTIONS {
            // As far as it can be, and no further.
            prop_assert_eq!(reduction >= allowed, most >= allowed && short >= size * ratio);
        }
        // Nor larger than the crops.
        let right = plans.iter().map(|plan| plan.crop.left + plan.crop.width).max().unwrap();
        let bottom = plans.iter().map(|plan| plan.crop.top + plan.crop.height).max().unwrap();
        prop_assert_eq!([area.left + area.width, area.top + area.height], [right, bottom]);
    }

    /// Of a picture that is flat within each cell nothing is lost: what differs is rounding. And
    /// vector instructions see what plain loops see.
    #[test]
    fn a_reduced_picture_of_flat_cells_has_the_views_of_the_whole(
        cells in (1u32..60, 1u32..60),
        bits in 1u32..3,
        corner in (0u32..9, 0u32..9),
        size in 1u32..70,
        seed: u64,
    ) {
        hold_flat_cells(cells, bits, corner, size, seed);
    }
}

/// Holds the views of a picture of flat cells, and of the same picture a pixel a cell, against what
/// the filter can make of it; returns their largest distance.
fn hold_flat_cells(
    (columns, rows): (u32, u32),
    bits: u32,
    corner: (u32, u32),
    size: u32,
    seed: u64,
) -> u8 {
    let cell = 1 << bits;
    let mut dice = Dice(seed);
    let image = images::noise(columns, rows, seed % 1000);
    let (width, height) = (columns * cell, rows * cell);
    let large = |i: u32| {
        let (x, y) = (i % width / cell, i / width / cell);
        let at = ((y * columns + x) * 3) as usize;
        [image.pixels[at], image.pixels[at + 1], image.pixels[at + 2]]
    };
    let pixels = (0..width * height).flat_map(large).collect();
    let whole = Image { width, height, pixels };
    let inside = dice.rect(width, height);
    // The frame lies somewhere in a larger picture.
    let (left, top) = (corner.0 * cell, corner.1 * cell);
    let moved = Rect { left: left + inside.left, top: top + inside.top, ..inside };
    let part = Part { area: Rect { left, top, width, height }, reduction: cell };
    let frame = Frame { image: &image, part };
    let plan =
        |crop| ViewPlan { size, crop, ops: vec![Op::Brightness(1.0)], ..ViewPlan::default() };
    let mut outs = [(); 3].map(|()| vec![0; (size * size * 3) as usize]);
    Renderer::new().view(&whole, &plan(inside), &mut outs[0]);
    Renderer::new().view(frame, &plan(moved), &mut outs[1]);
    Renderer::plain().view(frame, &plan(moved), &mut outs[2]);
    assert!(outs[1] == outs[2]);
    for (at, [low, high]) in possible(&whole, inside, size).into_iter().enumerate() {
        let (of_whole, of_reduced) = (outs[0][at], outs[1][at]);
        let is_possible = |byte| (low..=high).contains(&byte);
        assert!(
            is_possible(of_whole) && is_possible(of_reduced),
            "byte {at}: {of_whole} and {of_reduced}, not {low} to {high}"
        );
        // Two in the rows, where all of them are ties, and with it the column.
        assert!(high - low <= 2, "byte {at}: {low} to {high}");
    }
    distance(&outs[0], &outs[1]).1
}

/// The triangle filter, as wide as the reduction, in `f64`: for each output the first pixel that it
/// covers and the weights from there on, whose sum is 1.
fn triangles(pixels: u32, outputs: u32) -> Vec<(usize, Vec<f64>)> {
    let scale = f64::from(pixels) / f64::from(outputs);
    let support = scale.max(1.0);
    let of_output = |output: u32| {
        let center = (f64::from(output) + 0.5) * scale;
        let at = |place: f64| place.floor().clamp(0.0, f64::from(pixels)) as usize;
        let (first, end) = (at(center - support + 0.5), at(center + support + 0.5));
        let distance = |pixel: usize| ((pixel as f64 - center + 0.5) / support).abs();
        let weights: Vec<f64> =
            (first..end).map(|pixel| (1.0 - distance(pixel)).max(0.0)).collect();
        let sum: f64 = weights.iter().sum();
        (first, weights.into_iter().map(|weight| weight / sum).collect())
    };
    (0..outputs).map(of_output).collect()
}

/// The least and the largest byte that a filter can make of bytes within these bounds. Each weight is
/// rounded to 22 bits, which a sum of so many of them feels; otherwise it is exact before it is rounded.
fn filtered(weights: &[f64], bytes: impl Iterator<Item = [u8; 2]>) -> [u8; 2] {
    let mut sums = [0.0; 2];
    for (weight, bounds) in weights.iter().zip(bytes) {
        for (sum, bound) in sums.iter_mut().zip(bounds) {
            *sum += weight * f64::from(bound);
        }
    }
    let slack = 255.0 * weights.len() as f64 * 0.5 / f64::from(1 << 22) + 1e-9;
    let byte = |sum: f64| (sum + 0.5).floor().clamp(0.0, 255.0) as u8;
    [byte(sums[0] - slack), byte(sums[1] + slack)]
}

/// The least and the largest value of each byte of a view of a crop, whether it is made of pixels or of
/// cells: of both the filters' weights have the same sums, and are rounded differently. A sum that
/// is no tie gives one byte, so that bounds are apart only where a sum lies between two bytes.
fn possible(image: &Image, crop: Rect, size: u32) -> Vec<[u8; 2]> {
    let (across, down) = (triangles(crop.width, size), triangles(crop.height, size));
    let mut narrow = Vec::new();
    for y in crop.top..crop.top + crop.height {
        let row = &image.pixels[((y * image.width + crop.left) * 3) as usize..];
        for (first, weights) in &across {
            for channel in 0..3 {
                let bytes = row[first * 3 + channel..].iter().step_by(3);
                narrow.push(filtered(weights, bytes.map(|byte| [*byte; 2])));
            }
        }
    }
    let stride = across.len() * 3;
    let mut all = Vec::new();
    for (first, weights) in &down {
        for at in 0..stride {
            let column = narrow[first * stride + at..].iter().step_by(stride);
            all.push(filtered(weights, column.copied()));
        }
    }
    all
}

/// Two levels are possible, and no more. Here all three rows under a byte are ties, 185.5, 185.5 and
/// 70.5: the weights 0.1, 0.6 and 0.3 make them 185, 185 and 70, and the cells' 0.1 and 0.9, which are
/// rounded otherwise, 186, 186 and 71. The column is a tie as well: 0.9 * 185 + 0.1 * 70 = 173.5 falls to
/// 173, and 0.9 * 186 + 0.1 * 71 = 174.5 rises to 175.
#[test]
fn where_rows_and_column_are_ties_flat_cells_are_two_levels_off() {
    assert_eq!(hold_flat_cells((22, 28), 1, (0, 0), 20, 9_007_140_350_917_299_608), 2);
}

/// Without its end a file is refused, however little of it is asked for.
#[test]
fn truncated_anywhere_is_an_error_whatever_the_box() {
    let picture = images::textured(90, 70, 3);
    let area = Rect { left: 20, top: 0, width: 30, height: 9 };
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    for progressive in [false, true] {
        let bytes = encode(&picture, SamplingFactor::F_2_2, progressive, 0);
        for end in 0..bytes.len() - 4 {
            let cut = &bytes[..end];
            let Ok(header) = probe(cut) else { continue };
            for reduction in [1, 4] {
                let wanted = Part { area, reduction };
                let decoded = decoder.decode_part(cut, &header, wanted, &mut image);
                assert!(decoded.is_err(), "cut at {end} of {}", bytes.len());
            }
        }
    }
}

/// Bent anywhere, a file gives the part that is said or an error, and the next file is as ever.
#[test]
fn bent_4_000_times_parts_do_not_panic_nor_outlast_their_file() {
    let kinds = kinds(&[(90, 70)]);
    let (mut decoder, mut image, mut whole) = (Decoder::new(), Image::new(), Image::new());
    let (mut dice, mut decoded) = (Dice(1), 0);
    for case in 0..4000 {
        let (name, bytes) = &kinds[case % kinds.len()];
        let mut bent = bytes.clone();
        for _ in 0..=dice.below(3) {
            let len = bent.len() as u32;
            let at = if dice.below(2) == 0 { dice.below(len.min(700)) } else { dice.below(len) };
            bent[at as usize] ^= 1 << dice.below(8);
        }
        if let Ok(header) = probe(&bent) {
            let area = dice.rect(header.width, header.height);
            let wanted = Part { area, reduction: 1 << dice.below(3) };
            if let Ok(part) = decoder.decode_part(&bent, &header, wanted, &mut image) {
                decoded += 1;
                assert!(part.area.contains(&area), "{name}");
                assert_eq!(image.pixels.len() as u32, image.width * image.height * 3, "{name}");
            }
        }
        if case % 10 == 0 {
            let (_, next) = &kinds[case / 10 % kinds.len()];
            decoder.decode(next, &mut image).unwrap();
            Decoder::new().decode(next, &mut whole).unwrap();
            assert!(image == whole, "after a bent {name}");
        }
    }
    println!("{decoded} of 4,000 decoded");
    // A tenth: far fewer than are, and enough to say that not everything was refused.
    assert!(decoded > 400);
}
