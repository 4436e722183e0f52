//! `detco views`: a contact sheet of what the model is shown.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use detco_shards::decode::{Decoder, Image};
use detco_shards::order::{Cursor, Order};
use detco_shards::views::{Group, Recipe, Rect, Renderer, SamplePlan};
use image::imageops::{self, FilterType};
use image::{ImageFormat, Rgb, RgbImage};
use serde::Serialize;

use crate::config::Config;
use crate::data;

/// Draw a contact sheet of what the model is shown
///
/// Each row is a sample, in the order of training: the original with the crop boxes of its views, then the
/// views in the recipe's order, with patches in the order they are given to the model. The bar above a view has
/// the colour of its box. These are the views of training with the same recipe, seed and epoch.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco views shards/train -o views.png
  detco views shards/train -o views.png --epoch 7 --seed 1
  detco views shards/train -o v1.png --recipe moco-v1-r50
  detco views shards/train -o own.png --recipe own.toml --set views.crops.size=160
  detco views shards/train --plans | jq .plan.views[0].ops        # the drawn numbers")]
pub struct Args {
    /// Folder of shards, .tar file, glob or brace list, or URLs of those
    #[arg(required = true)]
    data: Vec<String>,

    /// PNG file to write
    #[arg(short, long, value_name = "FILE", default_value = "views.png")]
    out: PathBuf,

    /// Number of rows
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=SAMPLES_MAX))]
    samples: u64,

    /// A built-in recipe by name, or a TOML file, for its views
    #[arg(long, value_name = "NAME|FILE", default_value = "detco-r50")]
    recipe: String,

    /// Override a key of the recipe
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,

    /// Seed of the run [default: the recipe's]
    #[arg(long)]
    seed: Option<u64>,

    /// Epoch, from 0
    #[arg(long, default_value_t = 0)]
    epoch: u32,

    /// Also print the drawn numbers, one JSON object per sample
    #[arg(long, visible_alias = "json")]
    plans: bool,
}

/// Rows of a sheet: about 900 MB of pixels at the paper's sizes.
const SAMPLES_MAX: u64 = 1000;
/// Bytes of a sheet's pixels; no viewer shows more.
const SHEET_MAX: u64 = 4 << 30;
/// Pixels between cells.
const GAP: u32 = 8;
/// Thickness of the boxes and of the bars above the views.
const LINE: u32 = 3;
/// A view smaller than this is enlarged by a whole factor: 32-pixel views cannot be judged at 1:1.
const LEGIBLE: u32 = 128;
const BACKGROUND: Rgb<u8> = Rgb([34, 34, 38]);
/// Colours of the views in turn: for DetCo the query's and the key's crop, then their patches.
const COLORS: [Rgb<u8>; 8] = [
    Rgb([255, 196, 0]),
    Rgb([0, 200, 255]),
    Rgb([255, 90, 90]),
    Rgb([110, 230, 110]),
    Rgb([200, 130, 255]),
    Rgb([255, 140, 60]),
    Rgb([90, 130, 255]),
    Rgb([235, 235, 235]),
];

/// A sample's drawn numbers, as `--plans` prints them.
#[derive(Serialize)]
struct Drawn<'a> {
    sample: u64,
    shard: &'a Path,
    key: &'a str,
    width: u32,
    height: u32,
    plan: &'a SamplePlan,
}

/// Runs `detco views`.
///
/// # Errors
/// Shards, recipe or an image that cannot be read, a sheet that cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let extension = args.out.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    if ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"].contains(&extension.as_str()) {
        bail!("{}: the sheet is a PNG: name it .png", args.out.display());
    }
    super::check_folder(&args.out)?;
    let config = Config::load(&args.recipe, &args.overrides)?;
    let (recipe, seed) = (&config.training_views(), args.seed.unwrap_or(config.seed));
    let set = data::open(&args.data, &config.data)?;
    let order = Order::shuffled(set.len(), 1, seed)?;
    let rows = args.samples.min(set.len());

    let mut sheet = Sheet::new(recipe, rows as u32)?;
    let (mut decoder, mut renderer, mut image) = (Decoder::new(), Renderer::new(), Image::new());
    let mut stdout = crate::console::stdout();
    for row in 0..rows {
        let id = order.sample(Cursor { epoch: args.epoch, step: row }, 0);
        let sample = set.sample(id)?;
        let shard = set.shards()[sample.shard].path();
        decoder.decode(sample.jpeg(), &mut image).with_context(|| {
            format!("{}: sample {} at byte {}", shard.display(), sample.key, sample.offset)
        })?;
        let (width, height) = (image.width, image.height);
        let plan = recipe.draw(width, height, seed, args.epoch, id);
        if args.plans {
            let drawn = Drawn { sample: id, shard, key: sample.key, width, height, plan: &plan };
            writeln!(stdout, "{}", serde_json::to_string(&drawn)?)?;
        }
        sheet.row(row as u32, &image, &plan, &mut renderer);
    }
    write_whole(&args.out, &sheet.pixels)?;
    if !args.plans {
        writeln!(
            stdout,
            "{}: {rows} of {} samples, epoch {}, seed {seed}, {}; decoded by {}",
            args.out.display(),
            set.len(),
            args.epoch,
            args.recipe,
            decoder.name()
        )?;
    }
    Ok(())
}

/// The picture and where its columns are.
struct Sheet {
    pixels: RgbImage,
    /// Side of a cell: that of the largest view, after `scale`.
    cell: u32,
    /// Whole factor that views are enlarged by.
    scale: u32,
}

/// Patches of a view that stand side by side: as many as there are rows of them.
fn across(images: usize) -> u32 {
    images.isqrt().max(1) as u32
}

impl Sheet {
    fn new(recipe: &Recipe, rows: u32) -> anyhow::Result<Sheet> {
        let groups = || recipe.groups.iter().filter(|group| group.count > 0);
        let scale = LEGIBLE.div_ceil(groups().next().map_or(LEGIBLE, |group| group.size));
        let side = |group: &Group| {
            let (images, side) = group.images();
            side * scale * across(images) + GAP * (across(images) - 1)
        };
        let cell = groups().map(side).max().unwrap_or(LEGIBLE);
        let width = GAP + cell + cell / 3 + recipe.views() as u32 * (cell + GAP) + GAP;
        let height = GAP + rows * (LINE + cell + GAP);
        let bytes = u64::from(width) * u64::from(height) * 3; // below 2^64: at most 2^17 by 2^24 pixels
        let mut pixels = Vec::new();
        let room = usize::try_from(bytes).is_ok_and(|len| pixels.try_reserve_exact(len).is_ok());
        if !room || bytes > SHEET_MAX {
            bail!(
                "the sheet would have {width} x {height} pixels, {:.1} GB: lower --samples, or the sizes of the views",
                bytes as f64 / 1e9
            );
        }
        for _ in 0..bytes / 3 {
            pixels.extend(BACKGROUND.0);
        }
        let pixels =
            RgbImage::from_raw(width, height, pixels).context("the sheet's size is wrong")?;
        Ok(Sheet { pixels, cell, scale })
    }

    fn row(&mut self, row: u32, image: &Image, plan: &SamplePlan, renderer: &mut Renderer) {
        let top = GAP + row * (LINE + self.cell + GAP);
        self.original(top, image, plan);
        for (view, plan) in plan.views.iter().enumerate() {
            let mut pixels = vec![0; plan.bytes()];
            renderer.view(image, plan, &mut pixels);
            let (images, side) =
                plan.grid.as_ref().map_or((1, plan.size), |grid| (grid.order.len(), grid.patch));
            let left = self.bar(view, top);
            let step = side * self.scale + GAP;
            for (slot, pixels) in (0u32..).zip(pixels.chunks_exact(plan.bytes() / images)) {
                let [x, y] = [slot % across(images), slot / across(images)];
                self.paste(pixels, side, left + x * step, top + LINE + y * step);
            }
        }
    }

    /// The whole image, fitted into a cell of 4:3, with the boxes that the views are cut from.
    fn original(&mut self, top: u32, image: &Image, plan: &SamplePlan) {
        let (width, height) = (f64::from(image.width), f64::from(image.height));
        let room = (f64::from(self.cell + self.cell / 3), f64::from(self.cell));
        let factor = (room.0 / width).min(room.1 / height);
        let fitted = |length: f64| ((length * factor).round() as u32).max(1);
        let whole = RgbImage::from_raw(image.width, image.height, image.pixels.clone())
            .expect("an Image holds width * height * 3 bytes");
        let mut small =
            imageops::resize(&whole, fitted(width), fitted(height), FilterType::Triangle);
        for (view, color) in plan.views.iter().zip(COLORS.iter().cycle()) {
            // Of a picture that is resized first, the box lies in that.
            let resized = view.resized.map_or(1.0, |sides| width / f64::from(sides[0]));
            outline(&mut small, view.crop, factor * resized, *color);
        }
        imageops::replace(&mut self.pixels, &small, GAP.into(), (top + LINE).into());
    }

    /// Draws the bar above a view; returns the view's left edge.
    fn bar(&mut self, view: usize, top: u32) -> u32 {
        let left = 2 * GAP + self.cell + self.cell / 3 + view as u32 * (self.cell + GAP);
        fill(&mut self.pixels, [left, top, self.cell, LINE - 1], COLORS[view % COLORS.len()]);
        left
    }

    fn paste(&mut self, pixels: &[u8], side: u32, left: u32, top: u32) {
        let view = RgbImage::from_raw(side, side, pixels.to_vec())
            .expect("a view holds side * side * 3 bytes");
        let side = side * self.scale;
        let view = imageops::resize(&view, side, side, FilterType::Nearest);
        imageops::replace(&mut self.pixels, &view, left.into(), top.into());
    }
}

fn outline(on: &mut RgbImage, crop: Rect, factor: f64, color: Rgb<u8>) {
    let scaled = |length: u32| (f64::from(length) * factor).round() as u32;
    let (left, top) = (scaled(crop.left), scaled(crop.top));
    let (width, height) = (scaled(crop.width).max(LINE), scaled(crop.height).max(LINE));
    let (right, bottom) = (left + width - LINE.min(width), top + height - LINE.min(height));
    for side in [
        [left, top, width, LINE],
        [left, bottom, width, LINE],
        [left, top, LINE, height],
        [right, top, LINE, height],
    ] {
        fill(on, side, color);
    }
}

/// Fills the part of the box `[left, top, width, height]` that lies on the picture.
fn fill(on: &mut RgbImage, [left, top, width, height]: [u32; 4], color: Rgb<u8>) {
    for y in top..(top + height).min(on.height()) {
        for x in left..(left + width).min(on.width()) {
            on.put_pixel(x, y, color);
        }
    }
}

/// Writes a temporary file beside `path` and renames it, so that the sheet appears whole.
fn write_whole(path: &Path, sheet: &RgbImage) -> anyhow::Result<()> {
    let mut name = path.file_name().context("the sheet needs a file name")?.to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let written = sheet
        .save_with_format(&part, ImageFormat::Png)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(std::fs::rename(&part, path)?));
    written
        .inspect_err(|_| drop(std::fs::remove_file(&part))) // litter, if it is there at all
        .with_context(|| format!("cannot write {}", path.display()))
}
