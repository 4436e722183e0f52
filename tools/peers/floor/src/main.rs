//! What a task cannot do without: decoding, and the resizes of its views, by the fastest code to be had
//! for each, from memory to memory. `cargo xtask peers` measures it beside the loaders.
//!
//! ```text
//! detco-peers-floor --task T3 --workers 1 --seconds 8 --files LIST
//! ```
//!
//! T1 decodes, T2 adds one crop resized to 224, T3 two crops to 224 and two to 255. Prints one JSON
//! object: `{"images_per_s": ..., "images": ..., "seconds": ...}`.

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

/// At most so many of the files, evenly spaced, are held in memory.
const FILES_MAX: usize = 4000;
const WARM: Duration = Duration::from_secs(1);
/// Side of a view, and the least share of the picture's area that it shows.
type View = (u32, f64);
const GLOBAL: View = (224, 0.2);
const LOCAL: View = (255, 0.6);
const RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run() {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String, Failure> {
    let (mut task, mut files, mut workers, mut seconds) = (None, None, 1usize, 8.0f64);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--task" => task = Some(views(&value)?),
            "--files" => files = Some(value),
            "--workers" => workers = value.parse()?,
            "--seconds" => seconds = value.parse()?,
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    let views = task.ok_or("--task is needed")?;
    let jpegs = load(&files.ok_or("--files is needed")?)?;
    let (images, seconds) = rate(&jpegs, views, workers, Duration::try_from_secs_f64(seconds)?);
    let rate = images as f64 / seconds;
    Ok(format!("{{\"images_per_s\": {rate}, \"images\": {images}, \"seconds\": {seconds}}}"))
}

fn views(task: &str) -> Result<&'static [View], Failure> {
    match task {
        "T1" => Ok(&[]),
        "T2" => Ok(&[GLOBAL]),
        "T3" => Ok(&[GLOBAL, GLOBAL, LOCAL, LOCAL]),
        _ => Err(format!("--task {task}: T1, T2 or T3").into()),
    }
}

/// The listed pictures' bytes; those that the decoder refuses (CMYK) are left out and counted.
fn load(list: &str) -> Result<Vec<Vec<u8>>, Failure> {
    let list = std::fs::read_to_string(list).map_err(|error| format!("{list}: {error}"))?;
    let names: Vec<&str> = list.lines().collect();
    let every = names.len().div_ceil(FILES_MAX).max(1);
    let (mut decoder, mut pixels) = (Decoder::new()?, Vec::new());
    let (mut jpegs, mut refused) = (Vec::new(), 0);
    for name in names.iter().step_by(every) {
        let jpeg = std::fs::read(name).map_err(|error| format!("{name}: {error}"))?;
        match decoder.decode(&jpeg, &mut pixels) {
            Ok(_) => jpegs.push(jpeg),
            Err(_) => refused += 1,
        }
    }
    if refused > 0 {
        eprintln!("{refused} of {} pictures cannot be decoded to RGB", refused + jpegs.len());
    }
    if jpegs.is_empty() {
        return Err("no picture can be decoded".into());
    }
    Ok(jpegs)
}

/// Images and seconds of a window that opens after `WARM`, over all threads.
fn rate(jpegs: &[Vec<u8>], views: &[View], workers: usize, window: Duration) -> (u64, f64) {
    let (next, done, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let mut worker = Worker::new(views);
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    worker.one(&jpegs[at as usize % jpegs.len()], at);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(WARM);
        let (started, before) = (Instant::now(), done.load(Ordering::Relaxed));
        std::thread::sleep(window);
        let (seconds, after) = (started.elapsed().as_secs_f64(), done.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        (after - before, seconds)
    })
}

/// What a thread uses again for every picture.
struct Worker {
    decoder: Decoder,
    pixels: Vec<u8>,
    resizer: Resizer,
    views: Vec<(Image<'static>, f64)>,
}

impl Worker {
    fn new(views: &[View]) -> Worker {
        let image = |&(side, least): &View| (Image::new(side, side, PixelType::U8x3), least);
        Worker {
            decoder: Decoder::new().expect("a decoder was made before, to load the pictures"),
            pixels: Vec::new(),
            resizer: Resizer::new(),
            views: views.iter().map(image).collect(),
        }
    }

    fn one(&mut self, jpeg: &[u8], seed: u64) {
        let decoded = self.decoder.decode(jpeg, &mut self.pixels);
        let (width, height) = decoded.expect("this picture was decoded when it was loaded");
        let pixels = &self.pixels[..width as usize * height as usize * 3];
        black_box(pixels[0]);
        let mut random = Random(seed);
        for (view, least) in &mut self.views {
            let from = ImageRef::new(width, height, pixels, PixelType::U8x3);
            let from = from.expect("the pixels have the size that was just decoded");
            let [left, top, w, h] = random.crop(f64::from(width), f64::from(height), *least);
            let options = ResizeOptions::new()
                .crop(left, top, w, h)
                .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
                .use_alpha(false);
            let done = self.resizer.resize(&from, view, &options);
            done.expect("the crop lies inside the picture");
            black_box(view.buffer()[0]);
        }
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    /// Uniform in `low..high`.
    fn between(&mut self, low: f64, high: f64) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        low + (high - low) * (z >> 11) as f64 / (1u64 << 53) as f64
    }

    /// torchvision's RandomResizedCrop box `[left, top, width, height]`, but for its last resort,
    /// which is the whole picture here.
    fn crop(&mut self, width: f64, height: f64, least: f64) -> [f64; 4] {
        for _ in 0..10 {
            let area = width * height * self.between(least, 1.0);
            let ratio = self.between(RATIO[0].ln(), RATIO[1].ln()).exp();
            let (w, h) = ((area * ratio).sqrt().round(), (area / ratio).sqrt().round());
            if w >= 1.0 && h >= 1.0 && w <= width && h <= height {
                let left = self.between(0.0, width - w + 1.0).floor();
                let top = self.between(0.0, height - h + 1.0).floor();
                return [left, top, w, h];
            }
        }
        [0.0, 0.0, width, height]
    }
}

/// libjpeg-turbo.
#[cfg(feature = "turbojpeg")]
struct Decoder(turbojpeg::Decompressor);

#[cfg(feature = "turbojpeg")]
impl Decoder {
    fn new() -> Result<Decoder, Failure> {
        Ok(Decoder(turbojpeg::Decompressor::new()?))
    }

    /// Decodes to RGB at the front of `pixels`, which grows as needed; returns width and height.
    fn decode(&mut self, jpeg: &[u8], pixels: &mut Vec<u8>) -> Result<(u32, u32), Failure> {
        let header = self.0.read_header(jpeg)?;
        let (width, height) = (header.width, header.height);
        let bytes = width * height * 3;
        if pixels.len() < bytes {
            pixels.resize(bytes, 0);
        }
        let format = turbojpeg::PixelFormat::RGB;
        let pixels = &mut pixels[..bytes];
        let image = turbojpeg::Image { pixels, width, pitch: width * 3, height, format };
        self.0.decompress(jpeg, image)?;
        Ok((u32::try_from(width)?, u32::try_from(height)?))
    }
}

/// zune-jpeg.
#[cfg(not(feature = "turbojpeg"))]
struct Decoder;

#[cfg(not(feature = "turbojpeg"))]
impl Decoder {
    fn new() -> Result<Decoder, Failure> {
        Ok(Decoder)
    }

    /// Decodes to RGB at the front of `pixels`, which grows as needed; returns width and height.
    fn decode(&mut self, jpeg: &[u8], pixels: &mut Vec<u8>) -> Result<(u32, u32), Failure> {
        use zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};
        let options = DecoderOptions::default().jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(jpeg), options);
        decoder.decode_headers()?;
        let (width, height) = decoder.dimensions().ok_or("no size")?;
        let bytes = width * height * 3;
        if pixels.len() < bytes {
            pixels.resize(bytes, 0);
        }
        decoder.decode_into(&mut pixels[..bytes])?;
        Ok((u32::try_from(width)?, u32::try_from(height)?))
    }
}
