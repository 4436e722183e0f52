//! `detco eval attention`.

use std::path::PathBuf;

use super::backbone::BackboneArgs;

/// Attention maps: a grid of pictures that shows where the maps of backbones are large.
///
/// Each row is a picture: as it is, then for each backbone and stage the picture times the map, black where the map
/// is low. A map is the mean over channels (or see --method), scaled to 0 to 1 by its own extremes and enlarged
/// bilinearly; nothing is tuned to a picture or backbone. With boxes, figures stand beside the pictures: the share of
/// the map in boxes over their share of the area (1 is chance), whether the maximum lies in a box, and the best
/// overlap of a box with where the map is above its mean.
///
/// The definition is ours: how the paper's figure was made is not public.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct AttentionArgs {
    /// Whose backbone.
    #[command(flatten)]
    pub backbone: BackboneArgs,

    /// Pictures: JPEG or PNG files.
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<PathBuf>,

    /// PNG file to write.
    #[arg(short, long, value_name = "FILE", default_value = "attention.png")]
    pub out: PathBuf,

    /// More runs or weights files to compare with, each in columns of its own.
    #[arg(long, value_name = "RUN", num_args = 1..)]
    pub with: Vec<PathBuf>,

    /// Stages whose maps are shown: 2 to 5.
    #[arg(
        long, value_name = "N,…", value_delimiter = ',', default_value = "5",
        value_parser = clap::value_parser!(u8).range(2..=5)
    )]
    pub levels: Vec<u8>,

    /// How the channels of a map become one number a place.
    #[arg(long, value_name = "METHOD", default_value = "mean")]
    pub method: Method,

    /// Short side that pictures are resized to, in pixels.
    #[arg(long, value_name = "PIXELS", default_value_t = 224, value_parser = clap::value_parser!(u32).range(32..=1024))]
    pub size: u32,

    /// How maps are shown.
    #[arg(long, value_name = "LOOK", default_value = "masked")]
    pub look: Shown,

    /// Boxes from a folder of PASCAL VOC: Annotations/NAME.xml for the picture NAME.jpg.
    #[arg(long, value_name = "DIR", conflicts_with = "coco")]
    pub voc: Option<PathBuf>,

    /// Boxes from a file of COCO annotations, by file_name.
    #[arg(long, value_name = "JSON")]
    pub coco: Option<PathBuf>,

    /// Print the figures as JSON.
    #[arg(long)]
    pub json: bool,
}

/// How the channels of a map become one number a place.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Their mean.
    Mean,
    /// The sum of their squares.
    Sumsq,
    /// The projection on the map's first right singular vector (Eigen-CAM).
    Eigen,
}

/// How maps are shown.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The picture times the map.
    Masked,
    /// Colours over the picture, from blue to red.
    Colour,
}

const EXAMPLES: &str = "\
Examples:
  detco eval attention runs/a photos/*.jpg -o grid.png
  detco eval attention runs/a photos/*.jpg --with resnet50.pth --levels 2,3,4,5 -o grid.png
  detco eval attention runs/a VOC2007/JPEGImages/00000[1-9].jpg --voc VOC2007 -o grid.png";

#[cfg(feature = "train")]
pub(super) use self::measured::run;

#[cfg(feature = "train")]
mod measured {
    use std::collections::HashMap;
    use std::io::Write as _;
    use std::path::{Path, PathBuf};

    use anyhow::{Context, bail};
    use detco_shards::decode::{Decoder, Image};
    use detco_shards::views::Renderer;
    use serde_json::{Value, json};

    use super::{AttentionArgs, Method, Shown};
    use crate::cli::eval::backbone::{Backbone, BackboneArgs};
    use crate::cli::eval::sheet::Sheet;
    use crate::console::plural;
    use crate::eval::ap::{self, Box4};
    use crate::eval::attention::{self, InBoxes, Resized, SIDE_MAX};
    use crate::eval::pictures;
    use crate::eval::report::{Reading, Report};

    /// Figures of one backbone and stage.
    struct Column {
        backbone: usize,
        level: u8,
        figures: Vec<(String, InBoxes)>,
    }

    pub(in crate::cli::eval) fn run(args: &AttentionArgs) -> anyhow::Result<()> {
        let extension = args.out.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        if ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"].contains(&extension.as_str()) {
            bail!("{}: the grid is a PNG: name it .png", args.out.display());
        }
        crate::cli::check_folder(&args.out)?;
        let boxes = Boxes::open(args)?;
        let pictures = resized(args)?;
        let mut backbones = vec![args.backbone.open()?];
        for run in &args.with {
            let of = BackboneArgs {
                run: run.clone(),
                checkpoint: "latest".to_owned(),
                init: false,
                init_prefix: None,
                key: false,
            };
            backbones.push(of.open().with_context(|| format!("--with {}", run.display()))?);
        }
        let mut levels = args.levels.clone();
        levels.sort_unstable();
        levels.dedup();
        let mut columns: Vec<Column> = (0..backbones.len())
            .flat_map(|backbone| levels.iter().map(move |level| (backbone, *level)))
            .map(|(backbone, level)| Column { backbone, level, figures: Vec::new() })
            .collect();
        let sizes: Vec<[u32; 2]> =
            pictures.iter().map(|(_, one, _)| [one.width, one.height]).collect();
        let mut sheet = Sheet::new(&sizes, 1 + columns.len())?;
        for (row, (path, picture, scale)) in pictures.iter().enumerate() {
            sheet.draw(row, 0, picture.width, &picture.pixels);
            let boxes = boxes.of(path, *scale)?;
            for (number, backbone) in backbones.iter().enumerate() {
                let maps = attention::maps(backbone.encoder(), picture)?;
                let mine = columns.iter_mut().enumerate().filter(|(_, one)| one.backbone == number);
                for (column, of) in mine {
                    let map = &maps[usize::from(of.level.clamp(2, 5)) - 2];
                    let size = [picture.width, picture.height];
                    let found = attention::attention(map, method(args.method), size)?;
                    if found.is_constant {
                        note!(
                            "warning: {}: Res{} of {} is the same everywhere: its map is 0",
                            path.display(),
                            of.level,
                            backbone.what
                        );
                    }
                    let pixels = shown(picture, &found.values, args.look);
                    sheet.draw(row, 1 + column, picture.width, &pixels);
                    let figures = found.in_boxes(&boxes);
                    of.figures.extend(figures.map(|of| (path.display().to_string(), of)));
                }
            }
        }
        sheet.write(&args.out)?;
        told(args, &backbones, &columns, pictures.len())
    }

    fn method(method: Method) -> attention::Method {
        match method {
            Method::Mean => attention::Method::Mean,
            Method::Sumsq => attention::Method::SumSquares,
            Method::Eigen => attention::Method::Eigen,
        }
    }

    /// Path, pixels, and by what a box grows.
    type Picture = (PathBuf, Resized, [f64; 2]);

    fn resized(args: &AttentionArgs) -> anyhow::Result<Vec<Picture>> {
        let (mut decoder, mut renderer, mut image) =
            (Decoder::new(), Renderer::new(), Image::new());
        let mut pictures = Vec::with_capacity(args.images.len());
        for path in &args.images {
            pictures::decode(&mut decoder, path, &mut image)?;
            let resized = attention::resized(&image, args.size, &mut renderer);
            let resized = resized.with_context(|| {
                let (width, height) = (image.width, image.height);
                format!(
                    "{}: {width} x {height} pixels are too long a picture: its long side would be above {SIDE_MAX} \
                     pixels",
                    path.display()
                )
            })?;
            let scale = [
                f64::from(resized.width) / f64::from(image.width),
                f64::from(resized.height) / f64::from(image.height),
            ];
            pictures.push((path.clone(), resized, scale));
        }
        Ok(pictures)
    }

    /// Where boxes come from.
    enum Boxes {
        None,
        Voc(PathBuf),
        Coco(PathBuf, HashMap<String, Vec<Box4>>),
    }

    impl Boxes {
        fn open(args: &AttentionArgs) -> anyhow::Result<Boxes> {
            Ok(match (&args.voc, &args.coco) {
                (Some(folder), _) => Boxes::Voc(folder.clone()),
                (None, Some(file)) => Boxes::Coco(file.clone(), ap::coco_boxes(file)?),
                (None, None) => Boxes::None,
            })
        }

        /// The boxes of a picture, scaled.
        fn of(&self, picture: &Path, [across, down]: [f64; 2]) -> anyhow::Result<Vec<Box4>> {
            let scaled =
                |[left, top, w, h]: Box4| [left * across, top * down, w * across, h * down];
            let boxes: Vec<Box4> = match self {
                Boxes::None => Vec::new(),
                Boxes::Voc(folder) => {
                    let stem = picture.file_stem().unwrap_or_default().to_string_lossy();
                    let file = folder.join("Annotations").join(format!("{stem}.xml"));
                    let objects = ap::voc_objects(&file)?.into_iter();
                    objects.map(|(_, one, _)| ap::voc_pixels(one)).collect()
                }
                Boxes::Coco(file, boxes) => {
                    let name = picture.file_name().unwrap_or_default().to_string_lossy();
                    let of = boxes.get(name.as_ref());
                    let of = of.with_context(|| {
                        format!("{}: no image has the file_name {name}", file.display())
                    })?;
                    of.clone()
                }
            };
            Ok(boxes.into_iter().map(scaled).collect())
        }
    }

    /// The pixels of a picture under a map.
    fn shown(picture: &Resized, map: &[f64], look: Shown) -> Vec<u8> {
        let pixels = picture.pixels.as_chunks::<3>().0.iter().zip(map);
        let shown = pixels.flat_map(|(pixel, value)| {
            let value = value.clamp(0.0, 1.0);
            let over = |at: usize| {
                let light = f64::from(pixel[at]);
                let shown = match look {
                    Shown::Masked => light * value,
                    Shown::Colour => 0.5 * light + 127.5 * colour(value)[at],
                };
                shown.round() as u8 // 0 to 255
            };
            [over(0), over(1), over(2)]
        });
        shown.collect()
    }

    /// From blue by green to red, as 0 to 1 each.
    fn colour(value: f64) -> [f64; 3] {
        let tent = |peak: f64| (1.5 - (4.0 * value - peak).abs()).clamp(0.0, 1.0);
        [tent(3.0), tent(2.0), tent(1.0)]
    }

    fn mean(of: &Column, figure: impl Fn(&InBoxes) -> f64) -> f64 {
        let all = of.figures.iter().map(|(_, one)| figure(one));
        all.sum::<f64>() / of.figures.len().max(1) as f64
    }

    fn told(
        args: &AttentionArgs,
        backbones: &[Backbone],
        columns: &[Column],
        pictures: usize,
    ) -> anyhow::Result<()> {
        let mut out = crate::console::stdout();
        if args.json {
            for report in reports(args, backbones, columns, pictures)? {
                writeln!(out, "{}", serde_json::to_string(&report)?)?;
            }
            return Ok(());
        }
        writeln!(
            out,
            "{}: {}, {}",
            args.out.display(),
            plural(pictures as u64, "picture"),
            plural(columns.len() as u64, "column")
        )?;
        for (number, of) in (1..).zip(columns) {
            let figures = match of.figures.len() {
                0 => String::new(),
                n => format!(
                    "  energy over area {:.2}, maximum in a box {:.0} %, best IoU {:.3}  ({} with boxes)",
                    mean(of, InBoxes::ratio),
                    100.0 * mean(of, |one| f64::from(u8::from(one.pointed))),
                    mean(of, |one| one.iou),
                    plural(n as u64, "picture")
                ),
            };
            let what = &backbones[of.backbone].what;
            writeln!(out, "  column {number}: Res{} of {what}{figures}", of.level)?;
        }
        Ok(())
    }

    /// One for each backbone.
    fn reports(
        args: &AttentionArgs,
        backbones: &[Backbone],
        columns: &[Column],
        pictures: usize,
    ) -> anyhow::Result<Vec<Report>> {
        let object = |value: Value| value.as_object().cloned().unwrap_or_default();
        let of = |(number, backbone): (usize, &Backbone)| {
            let mine = columns.iter().filter(|one| one.backbone == number);
            let readings = mine.flat_map(|of| {
                let reading = |name: &str, figure: fn(&InBoxes) -> f64| Reading {
                    name: format!("res{}/{name}", of.level),
                    value: 100.0 * mean(of, figure),
                    interval: None,
                    samples: of.figures.iter().map(|(_, one)| 100.0 * figure(one)).collect(),
                };
                let all = [
                    reading("energy over area", InBoxes::ratio),
                    reading("maximum in a box", |one| f64::from(u8::from(one.pointed))),
                    reading("best IoU", |one| one.iou),
                ];
                all.into_iter().filter(|reading| !reading.samples.is_empty())
            });
            anyhow::Ok(Report {
                protocol: "attention".to_owned(),
                weights: backbone.what.clone(),
                sha256: backbone.digest()?,
                settings: object(json!({ "method": method(args.method), "short_side": args.size })),
                data: object(json!({ "pictures": pictures })),
                readings: readings.collect(),
                more: object(json!({ "grid": args.out })),
            })
        };
        backbones.iter().enumerate().map(of).collect()
    }
}
