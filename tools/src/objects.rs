//! Draws the demo's data set: textured objects on cluttered backgrounds, as labelled JPEGs.
//!
//! A class is a shape with a texture, both upright but for a little. Colours (muted, so that texture
//! and not the ground tells pictures apart), light, size, turn, place and background are drawn
//! without looking at the class, so that nothing but shape and texture tells classes apart. Every
//! picture follows from `(seed, part, class, number)` alone: the same on any machine, with any
//! number of threads.

use std::f32::consts::{PI, TAU};
use std::io::BufWriter;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, RgbImage};

/// The classes: a name, a shape, a texture.
pub(crate) const CLASSES: [Class; 4] = [
    Class { name: "striped-disc", shape: Shape::Disc, texture: Texture::Stripes },
    Class { name: "dotted-square", shape: Shape::Square, texture: Texture::Dots },
    Class { name: "cracked-triangle", shape: Shape::Triangle, texture: Texture::Cracks },
    Class { name: "checked-star", shape: Shape::Star, texture: Texture::Checks },
];

/// What a class is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Class {
    /// Folder name.
    pub(crate) name: &'static str,
    shape: Shape,
    texture: Texture,
}

/// Outline of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Disc,
    Square,
    Triangle,
    Star,
    /// Clutter and occluders only: a class would be too easy to tell by its thin outline.
    Bar,
}

/// How an object's two colours are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Texture {
    Stripes,
    Checks,
    Dots,
    /// Borders of Voronoi cells.
    Cracks,
    /// Clutter and occluders only: soft noise.
    Cloud,
}

/// Writes `train/<class>/NNNN.jpg` and `test/<class>/NNNN.jpg` below `folder`, `train` and `test`
/// images of each class.
pub(crate) fn write_set(folder: &Path, seed: u64, train: usize, test: usize) -> Result<()> {
    let mut jobs = Vec::new();
    for (part, (part_name, count)) in [("train", train), ("test", test)].into_iter().enumerate() {
        for (label, class) in CLASSES.iter().enumerate() {
            let to = folder.join(part_name).join(class.name);
            std::fs::create_dir_all(&to).with_context(|| format!("making {}", to.display()))?;
            let numbers = 0..count;
            jobs.extend(
                numbers.map(|number| (part, label, number, to.join(format!("{number:04}.jpg")))),
            );
        }
    }
    let next = AtomicUsize::new(0);
    let draw = || -> Result<()> {
        while let Some((part, label, number, path)) = jobs.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let picture = draw(seed, *part, *label, *number);
            picture.write(path).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(draw)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// One drawn picture and the JPEG quality it is to be saved with.
#[derive(Debug)]
struct Picture {
    pixels: RgbImage,
    quality: u8,
}

impl Picture {
    fn write(&self, path: &Path) -> Result<()> {
        let mut file = BufWriter::new(std::fs::File::create(path)?);
        let (width, height) = self.pixels.dimensions();
        let encoder = JpegEncoder::new_with_quality(&mut file, self.quality);
        encoder.write_image(self.pixels.as_raw(), width, height, ExtendedColorType::Rgb8)?;
        std::io::Write::flush(&mut file)?;
        Ok(())
    }
}

/// Draws picture `number` of class `label`; `part` keeps train and test apart.
fn draw(seed: u64, part: usize, label: usize, number: usize) -> Picture {
    let mut rng = Rng::at(&[seed, part as u64, label as u64, number as u64]);
    let (width, height) = (rng.whole(80, 112), rng.whole(80, 112));
    let short = width.min(height) as f32;

    let backdrop = Backdrop::draw(&mut rng);
    let clutter: Vec<Object> = (0..rng.whole(4, 9))
        .map(|_| Object::clutter(&mut rng, width as f32, height as f32, short * 0.05, short * 0.13))
        .collect();
    let object = Object::of_class(&mut rng, CLASSES[label], width as f32, height as f32, short);
    let occluder = rng.chance(0.4).then(|| {
        let mut cover = Object::clutter(&mut rng, 0.0, 0.0, short * 0.07, short * 0.12);
        let (angle, reach) = (rng.between(0.0, TAU), object.radius * rng.between(0.6, 1.0));
        cover.center = object.center + Point { x: angle.cos(), y: angle.sin() } * reach;
        cover
    });
    let light = Light::draw(&mut rng);
    let quality = rng.whole(75, 95) as u8;

    // Painted back to front; each layer covers by its share of the pixel, which smooths edges.
    let mut layers: Vec<&Object> = clutter.iter().collect();
    layers.push(&object);
    layers.extend(&occluder);
    let pixels = RgbImage::from_fn(width, height, |x, y| {
        let at = Point { x: x as f32 + 0.5, y: y as f32 + 0.5 };
        let mut color = backdrop.color(at, short);
        for layer in &layers {
            // A soft shadow falls away from the light and ties the object to its ground.
            let shade = layer.cover(at + light.toward * (layer.radius * 0.15), layer.radius * 0.2);
            color = color * (1.0 - 0.35 * shade);
            let cover = layer.cover(at, 1.0);
            if cover > 0.0 {
                color = color.mix(layer.color(at, &light), cover);
            }
        }
        let across = Point { x: at.x / width as f32 - 0.5, y: at.y / height as f32 - 0.5 };
        let gain = light.gain * (1.0 + light.falloff * across.dot(light.toward));
        let grain = light.grain * (lattice(light.seed, x as i32, y as i32) - 0.5);
        let value = |channel: f32, tint: f32| {
            let lit = (channel * gain * tint).clamp(0.0, 1.0).powf(light.gamma) + grain;
            (lit * 255.0).round().clamp(0.0, 255.0) as u8
        };
        image::Rgb([
            value(color.r, light.tint.r),
            value(color.g, light.tint.g),
            value(color.b, light.tint.b),
        ])
    });
    Picture { pixels, quality }
}

/// What lies behind everything: two colours blended by noise, streaks or a slope.
#[derive(Debug)]
struct Backdrop {
    colors: [Color; 2],
    kind: u32,
    turn: f32,
    /// Features across the short side.
    scale: f32,
    seed: u64,
}

impl Backdrop {
    fn draw(rng: &mut Rng) -> Backdrop {
        Backdrop {
            colors: [Color::draw(rng), Color::draw(rng)],
            kind: rng.whole(0, 2),
            turn: rng.between(0.0, TAU),
            scale: rng.between(2.0, 6.0),
            seed: rng.next(),
        }
    }

    fn color(&self, at: Point, short: f32) -> Color {
        let p = (at * (1.0 / short)).turned(self.turn);
        let noise = cloud(self.seed, p * self.scale);
        let share = match self.kind {
            0 => noise,
            1 => cloud(self.seed, Point { x: p.x * self.scale * 3.0, y: p.y * self.scale * 0.5 }),
            _ => (p.x * 0.8 + 0.5) * 0.6 + noise * 0.4,
        };
        self.colors[0].mix(self.colors[1], ((share - 0.5) * 1.6 + 0.5).clamp(0.0, 1.0))
    }
}

/// A textured thing somewhere in the picture.
#[derive(Debug)]
struct Object {
    shape: Shape,
    texture: Texture,
    center: Point,
    /// Of the circle around it, in pixels.
    radius: f32,
    turn: f32,
    texture_turn: f32,
    /// Texture periods across the radius.
    frequency: f32,
    colors: [Color; 2],
    seed: u64,
}

impl Object {
    fn of_class(rng: &mut Rng, class: Class, width: f32, height: f32, short: f32) -> Object {
        let radius = short * rng.between(0.30, 0.46);
        let (dark, bright) = Color::draw_pair(rng);
        // Wholly inside, or cut by the border by at most a seventh of its size.
        let room = radius * 0.85;
        Object {
            shape: class.shape,
            texture: class.texture,
            center: Point {
                x: rng.between(room, width - room),
                y: rng.between(room, height - room),
            },
            radius,
            turn: rng.between(-0.35, 0.35),
            texture_turn: rng.between(-0.25, 0.25),
            frequency: rng.between(2.4, 3.6),
            colors: if rng.chance(0.5) { [dark, bright] } else { [bright, dark] },
            seed: rng.next(),
        }
    }

    fn clutter(rng: &mut Rng, width: f32, height: f32, small: f32, large: f32) -> Object {
        const SHAPES: [Shape; 3] = [Shape::Disc, Shape::Square, Shape::Bar];
        Object {
            shape: SHAPES[rng.whole(0, 2) as usize],
            texture: Texture::Cloud,
            center: Point { x: rng.between(0.0, width), y: rng.between(0.0, height) },
            radius: rng.between(small, large),
            turn: rng.between(0.0, TAU),
            texture_turn: 0.0,
            frequency: rng.between(1.0, 2.0),
            colors: [Color::draw(rng), Color::draw(rng)],
            seed: rng.next(),
        }
    }

    /// The object's own frame: centre at 0, radius 1, turned upright.
    fn local(&self, at: Point) -> Point {
        ((at - self.center) * (1.0 / self.radius)).turned(-self.turn)
    }

    /// Share of the pixel at `at` that is covered; the edge is `softness` pixels wide.
    fn cover(&self, at: Point, softness: f32) -> f32 {
        if (at - self.center).length() > self.radius * 1.6 + softness {
            return 0.0; // farther than any outline reaches
        }
        let inside = -self.shape.distance(self.local(at)) * self.radius;
        (inside / softness + 0.5).clamp(0.0, 1.0)
    }

    fn color(&self, at: Point, light: &Light) -> Color {
        let p = self.local(at);
        let t = p.turned(self.texture_turn) * self.frequency;
        let share = self.texture.share(t, self.seed);
        let flat = self.colors[0].mix(self.colors[1], share);
        // Lit like a shallow dome: the side toward the light is brighter, with a dull highlight.
        let slope = (at - self.center) * (1.0 / self.radius);
        let facing = slope.dot(light.toward).clamp(-1.0, 1.0);
        let glint = (1.0 - (slope - light.toward * 0.45).length() * 2.5).max(0.0) * light.glint;
        flat * (0.8 + 0.3 * facing) + Color::gray(glint)
    }
}

impl Shape {
    /// Signed distance to the outline in the object's frame (radius 1): negative inside. Exact near
    /// the outline, which is where anti-aliasing needs it.
    fn distance(self, p: Point) -> f32 {
        match self {
            Shape::Disc => p.length() - 0.9,
            Shape::Square => p.x.abs().max(p.y.abs()) - 0.75,
            Shape::Bar => (p.x.abs() - 1.4).max(p.y.abs() - 0.35),
            Shape::Triangle => polygon(p, 3, 0.5),
            Shape::Star => {
                // One arm of five, mirrored: the line from a tip at radius 1 to a notch at 0.45.
                let sector = TAU / 5.0;
                let angle = p.x.atan2(-p.y);
                let angle = (angle - (angle / sector).round() * sector).abs();
                let q = Point { x: angle.sin(), y: angle.cos() } * p.length();
                let tip = Point { x: 0.0, y: 1.05 };
                let notch = Point { x: (PI / 5.0).sin(), y: (PI / 5.0).cos() } * 0.48;
                let along = notch - tip;
                let outward = Point { x: -along.y, y: along.x } * (1.0 / along.length());
                (q - tip).dot(outward)
            }
        }
    }
}

/// Signed distance to a regular polygon whose sides lie `inner` from the centre.
fn polygon(p: Point, sides: u32, inner: f32) -> f32 {
    let sector = TAU / sides as f32;
    (0..sides)
        .map(|side| side as f32 * sector)
        .fold(f32::MIN, |most, angle| most.max(p.x * angle.sin() + p.y * angle.cos() - inner))
}

impl Texture {
    /// Share of the second colour at `p`, one period a unit.
    fn share(self, p: Point, seed: u64) -> f32 {
        // Edges a tenth of a period wide: sharp, but without the stairs that JPEG would smear.
        let edge = |value: f32| (value * 5.0 + 0.5).clamp(0.0, 1.0);
        let wave = |x: f32| (x * TAU).sin() * 0.5;
        match self {
            Texture::Stripes => edge(wave(p.x)),
            Texture::Checks => edge(wave(p.x * 0.7) * wave(p.y * 0.7) * 2.0),
            Texture::Dots => {
                let cell = Point { x: p.x - p.x.floor() - 0.5, y: p.y - p.y.floor() - 0.5 };
                edge(0.32 - cell.length())
            }
            Texture::Cracks => {
                let (first, second) = nearest_two(seed, p);
                edge(0.18 - (second - first))
            }
            Texture::Cloud => cloud(seed, p * 2.0),
        }
    }
}

/// The light of a picture: direction, strength, tint, and the camera's grain.
#[derive(Debug)]
struct Light {
    /// Unit vector in the picture plane.
    toward: Point,
    gain: f32,
    falloff: f32,
    gamma: f32,
    glint: f32,
    grain: f32,
    tint: Color,
    seed: u64,
}

impl Light {
    fn draw(rng: &mut Rng) -> Light {
        let angle = rng.between(0.0, TAU);
        Light {
            toward: Point { x: angle.cos(), y: angle.sin() },
            gain: rng.between(0.85, 1.1),
            falloff: rng.between(0.0, 0.3),
            gamma: rng.between(0.8, 1.3),
            glint: rng.between(0.0, 0.35),
            grain: rng.between(0.0, 0.06),
            tint: Color {
                r: rng.between(0.88, 1.0),
                g: rng.between(0.88, 1.0),
                b: rng.between(0.88, 1.0),
            },
            seed: rng.next(),
        }
    }
}

/// Distances from `p` to the nearest and second nearest of one jittered point a cell.
fn nearest_two(seed: u64, p: Point) -> (f32, f32) {
    let (column, row) = (p.x.floor() as i32, p.y.floor() as i32);
    let mut best = (f32::MAX, f32::MAX);
    for y in row - 1..=row + 1 {
        for x in column - 1..=column + 1 {
            let spot = Point {
                x: x as f32 + lattice(seed, x, y),
                y: y as f32 + lattice(seed ^ 0x9e37, x, y),
            };
            let far = (p - spot).length();
            if far < best.0 {
                best = (far, best.0);
            } else if far < best.1 {
                best.1 = far;
            }
        }
    }
    best
}

/// Fractal value noise in 0..1: three octaves, each twice as fine and half as strong.
fn cloud(seed: u64, p: Point) -> f32 {
    let octave = |n: u64, scale: f32| value_noise(seed.wrapping_add(n), p * scale);
    (octave(0, 1.0) * 4.0 + octave(1, 2.0) * 2.0 + octave(2, 4.0)) / 7.0
}

fn value_noise(seed: u64, p: Point) -> f32 {
    let (x, y) = (p.x.floor(), p.y.floor());
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (u, v) = (smooth(p.x - x), smooth(p.y - y));
    let corner = |dx: i32, dy: i32| lattice(seed, x as i32 + dx, y as i32 + dy);
    let top = corner(0, 0) + (corner(1, 0) - corner(0, 0)) * u;
    let bottom = corner(0, 1) + (corner(1, 1) - corner(0, 1)) * u;
    top + (bottom - top) * v
}

/// A number in 0..1 for a grid point.
fn lattice(seed: u64, x: i32, y: i32) -> f32 {
    let point = (u64::from(x as u32) << 32) | u64::from(y as u32);
    unit(mix(seed ^ mix(point)))
}

/// SplitMix64 (Steele, Lea, Flood, 2014), as a stream and as a hash.
#[derive(Debug)]
struct Rng(u64);

impl Rng {
    /// Randomness has an address: the stream of this list of words.
    fn at(words: &[u64]) -> Rng {
        Rng(words.iter().fold(0, |state, word| mix(state ^ mix(*word))))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * unit(self.next())
    }

    /// Both ends included.
    fn whole(&mut self, low: u32, high: u32) -> u32 {
        let span = u64::from(high - low) + 1;
        low + (self.next() % span) as u32
    }

    fn chance(&mut self, share: f32) -> bool {
        unit(self.next()) < share
    }
}

fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The top 24 bits, which an f32 holds exactly, in 0..1.
fn unit(word: u64) -> f32 {
    (word >> 40) as f32 / (1u64 << 24) as f32
}

/// A place or a direction, in pixels or in units of the thing at hand.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    x: f32,
    y: f32,
}

impl Point {
    fn dot(self, other: Point) -> f32 {
        self.x * other.x + self.y * other.y
    }

    fn length(self) -> f32 {
        self.dot(self).sqrt()
    }

    fn turned(self, angle: f32) -> Point {
        let (sin, cos) = angle.sin_cos();
        Point { x: self.x * cos - self.y * sin, y: self.x * sin + self.y * cos }
    }
}

impl std::ops::Add for Point {
    type Output = Point;
    fn add(self, other: Point) -> Point {
        Point { x: self.x + other.x, y: self.y + other.y }
    }
}

impl std::ops::Sub for Point {
    type Output = Point;
    fn sub(self, other: Point) -> Point {
        Point { x: self.x - other.x, y: self.y - other.y }
    }
}

impl std::ops::Mul<f32> for Point {
    type Output = Point;
    fn mul(self, factor: f32) -> Point {
        Point { x: self.x * factor, y: self.y * factor }
    }
}

/// Linear red, green and blue, 0..1 on paper, more before the light is applied.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Color {
    r: f32,
    g: f32,
    b: f32,
}

impl Color {
    fn gray(level: f32) -> Color {
        Color { r: level, g: level, b: level }
    }

    /// Any hue, muted, of middle brightness.
    fn draw(rng: &mut Rng) -> Color {
        let (hue, strength) = (rng.between(0.0, 1.0), rng.between(0.0, 0.25));
        Color::of(hue, strength, rng.between(0.35, 0.65))
    }

    /// Two muted colours of free hue, far enough apart in brightness for a texture to show in gray.
    fn draw_pair(rng: &mut Rng) -> (Color, Color) {
        let (low, high) = (rng.between(0.08, 0.2), rng.between(0.75, 0.95));
        let mut any = |value: f32| Color::of(rng.between(0.0, 1.0), rng.between(0.0, 0.25), value);
        (any(low), any(high))
    }

    fn of(hue: f32, strength: f32, value: f32) -> Color {
        let channel = |shift: f32| {
            let turn = ((hue + shift).fract() * 6.0 - 3.0).abs() - 1.0;
            value * (1.0 - strength * (1.0 - turn.clamp(0.0, 1.0)))
        };
        Color { r: channel(0.0), g: channel(2.0 / 3.0), b: channel(1.0 / 3.0) }
    }

    fn mix(self, other: Color, share: f32) -> Color {
        self * (1.0 - share) + other * share
    }
}

impl std::ops::Add for Color {
    type Output = Color;
    fn add(self, other: Color) -> Color {
        Color { r: self.r + other.r, g: self.g + other.g, b: self.b + other.b }
    }
}

impl std::ops::Mul<f32> for Color {
    type Output = Color;
    fn mul(self, factor: f32) -> Color {
        Color { r: self.r * factor, g: self.g * factor, b: self.b * factor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_follows_from_its_address() {
        let one = draw(7, 0, 3, 11);
        assert_eq!(one.pixels, draw(7, 0, 3, 11).pixels);
        for other in [draw(8, 0, 3, 11), draw(7, 1, 3, 11), draw(7, 0, 2, 11), draw(7, 0, 3, 12)] {
            assert_ne!(one.pixels, other.pixels);
        }
    }

    #[test]
    fn the_files_do_not_depend_on_who_drew_them() {
        let [a, b] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        write_set(a.path(), 1, 2, 1).unwrap();
        write_set(b.path(), 1, 2, 1).unwrap();
        for class in CLASSES {
            for name in ["train/CLASS/0001.jpg", "test/CLASS/0000.jpg"] {
                let name = name.replace("CLASS", class.name);
                let bytes = std::fs::read(a.path().join(&name)).unwrap();
                assert_eq!(bytes, std::fs::read(b.path().join(&name)).unwrap(), "{name}");
                let decoded = image::load_from_memory(&bytes).unwrap();
                let (width, height) = (decoded.width(), decoded.height());
                assert!((80..=112).contains(&width) && (80..=112).contains(&height));
            }
        }
    }

    #[test]
    fn shapes_are_told_by_their_outline() {
        let center = Point { x: 0.0, y: 0.0 };
        let far = Point { x: 1.3, y: 1.3 };
        for shape in [Shape::Disc, Shape::Square, Shape::Triangle, Shape::Star, Shape::Bar] {
            assert!(shape.distance(center) < 0.0 && shape.distance(far) > 0.0, "{shape:?}");
        }
        // A star has a notch where a disc has none.
        let notch = Point { x: (PI / 5.0).sin(), y: -(PI / 5.0).cos() } * 0.7;
        assert!(Shape::Star.distance(notch) > 0.0 && Shape::Disc.distance(notch) < 0.0);
    }

    #[test]
    fn classes_share_neither_shape_nor_texture() {
        for class in CLASSES {
            assert_eq!(CLASSES.iter().filter(|c| c.shape == class.shape).count(), 1);
            assert_eq!(CLASSES.iter().filter(|c| c.texture == class.texture).count(), 1);
        }
    }

    /// Classifying by the mean colour must do hardly better than the 25 % of guessing.
    #[test]
    fn colour_alone_does_not_tell_the_class() {
        let mean = |label: usize, number: usize| -> [f64; 3] {
            let pixels = draw(3, 0, label, number).pixels;
            let count = f64::from(pixels.width() * pixels.height());
            let mut sum = [0.0; 3];
            for pixel in pixels.pixels() {
                (0..3).for_each(|i| sum[i] += f64::from(pixel[i]) / count);
            }
            sum
        };
        let centers: Vec<[f64; 3]> = (0..CLASSES.len())
            .map(|label| {
                let all = (0..40).map(|number| mean(label, number));
                all.fold([0.0; 3], |sum, one| std::array::from_fn(|i| sum[i] + one[i] / 40.0))
            })
            .collect();
        let gap = |a: &[f64; 3], b: &[f64; 3]| (0..3).map(|i| (a[i] - b[i]).powi(2)).sum::<f64>();
        let mut right = 0;
        for label in 0..CLASSES.len() {
            for number in 40..80 {
                let color = mean(label, number);
                let nearest = (0..CLASSES.len())
                    .min_by(|a, b| gap(&centers[*a], &color).total_cmp(&gap(&centers[*b], &color)));
                right += usize::from(nearest == Some(label));
            }
        }
        let share = right as f64 / (40 * CLASSES.len()) as f64;
        assert!(share < 0.35, "mean colour alone gets {share:.3} right");
    }
}
