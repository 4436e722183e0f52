//! Composite scenes: small labelled pictures pasted on photos, among pastes that are no objects.
//!
//! A [`Layout`] is drawn from (seed, split, index) alone and painted by a pure function of it, so that scenes need
//! no files: any machine and any number of threads make the same bytes. Targets of training and of test scenes are
//! different pictures, on different photos.

use detco_shards::decode::{Image, Rect};
use detco_shards::views::{Filter, Renderer};
use serde_json::json;

use super::SceneError;
use super::layout::{Cut, Layout, OBJECT, Paste, Rules, Stock, What};
use super::pictures::Pictures;
use super::sources::{Object, Scene, Source, Split, Tools};

/// Every so many photos one is for test scenes: 600 and 200 of 800.
const PHOTO_SPLIT: usize = 4;
/// Every so many objects one is for test scenes, where no others are given for them.
const OBJECT_SPLIT: usize = 5;
/// Photos that are held at most, evenly spaced over their shards: 300 MB for scenes of 128 pixels.
pub const PHOTOS_MAX: u64 = 2000;
/// Objects that are held at most: 184 MB.
pub const OBJECTS_MAX: u64 = 60_000;

/// Composite scenes of two splits.
#[derive(Clone, Debug)]
pub struct Composites {
    rules: Rules,
    seed: u64,
    objects: [Pictures; 2],
    photos: [Pictures; 2],
    classes: Vec<(i64, String)>,
}

impl Composites {
    /// Takes objects of [`OBJECT`] pixels with classes, which are positions in `names`, and photos of
    /// [`Rules::photo`] pixels. Without `test_objects` every fifth object is one of test scenes, and every fourth photo
    /// always is.
    ///
    /// # Errors
    /// When a split has no object or no photo, or a class has no name.
    pub fn new(
        rules: Rules,
        seed: u64,
        objects: Pictures,
        test_objects: Option<Pictures>,
        photos: &Pictures,
        names: Vec<String>,
    ) -> Result<Composites, SceneError> {
        let objects = match test_objects {
            Some(test) => [objects, test],
            None => objects.split(OBJECT_SPLIT),
        };
        let photos = photos.split(PHOTO_SPLIT);
        for (what, parts, least) in
            [("objects", &objects, OBJECT_SPLIT), ("photos", &photos, PHOTO_SPLIT)]
        {
            let [train, test] = [parts[0].len(), parts[1].len()];
            if train == 0 || test == 0 {
                return Err(SceneError::TooFew { what, train, test, least });
            }
        }
        let classes = objects.iter().flat_map(|part| &part.classes);
        if let Some(class) = classes.max().filter(|class| **class as usize >= names.len()) {
            return Err(SceneError::Unnamed { class: *class, names: names.len() });
        }
        let classes = (1..).zip(names).collect();
        Ok(Composites { rules, seed, objects, photos, classes })
    }

    /// What is drawn of a scene.
    pub fn layout(&self, split: Split, index: usize) -> Layout {
        let part = split.part();
        let stock = Stock { objects: self.objects[part].len(), photos: self.photos[part].len() };
        Layout::draw(&self.rules, stock, (self.seed, split.name()), index as u64)
    }

    /// Paints a scene: `out` is `[size, size, 3]`.
    ///
    /// # Panics
    /// Where `out` has another length, or the layout is not of this split.
    pub fn paint(&self, split: Split, layout: &Layout, tools: &mut Tools, out: &mut [u8]) {
        let (objects, photos) = (&self.objects[split.part()], &self.photos[split.part()]);
        let size = self.rules.size;
        let Tools { renderer, image, small, canvas, .. } = tools;
        resized(renderer, photos, &layout.background, layout.reduced, image, small);
        out_of(renderer, small, [size; 2], out);
        canvas.clear();
        canvas.extend(out.iter().map(|byte| f32::from(*byte)));
        for paste in &layout.pastes {
            match &paste.what {
                What::Object(object) => take(objects, *object, small),
                What::Shuffled(object, order) => {
                    take(objects, *object, image);
                    shuffle(&image.pixels, order, small);
                }
                What::Patch(cut) => resized(renderer, photos, cut, OBJECT, image, small),
            }
            if paste.flip {
                mirror(small);
            }
            let [left, top, right, bottom] = paste.corners;
            let sides = [right - left, bottom - top];
            image.pixels.resize(3 * (sides[0] * sides[1]) as usize, 0);
            out_of(renderer, small, sides, &mut image.pixels);
            blend(canvas, size, paste, &image.pixels);
        }
        for (to, value) in out.iter_mut().zip(&*canvas) {
            *to = (value + 0.5).clamp(0.0, 255.0) as u8;
        }
    }
}

impl Source for Composites {
    fn name(&self) -> &'static str {
        "composites"
    }

    fn size(&self) -> u32 {
        self.rules.size
    }

    fn classes(&self) -> &[(i64, String)] {
        &self.classes
    }

    fn most(&self, _: Split) -> usize {
        usize::MAX
    }

    fn scene(
        &self,
        split: Split,
        index: usize,
        tools: &mut Tools,
        out: &mut [u8],
    ) -> Result<Scene, SceneError> {
        let layout = self.layout(split, index);
        self.paint(split, &layout, tools, out);
        let objects = layout.pastes.iter().filter_map(|paste| {
            let What::Object(object) = paste.what else { return None };
            let class = self.objects[split.part()].classes.get(object).copied().unwrap_or(0);
            Some(Object::exact(class as usize, paste.corners))
        });
        Ok(Scene { name: (index + 1).to_string(), scale: 1.0, objects: objects.collect() })
    }

    fn describe(&self) -> serde_json::Map<String, serde_json::Value> {
        let both = |parts: &[Pictures; 2]| json!([parts[0].len(), parts[1].len()]);
        let crc = |parts: &[Pictures; 2]| {
            let crc = |part: &Pictures| format!("{:08x}", crc32c::crc32c(&part.pixels));
            json!([crc(&parts[0]), crc(&parts[1])])
        };
        let pairs = [
            ("scene_seed", json!(self.seed)),
            ("rules", json!(self.rules)),
            ("objects", both(&self.objects)),
            ("photos", both(&self.photos)),
            ("objects_crc32c", crc(&self.objects)),
            ("photos_crc32c", crc(&self.photos)),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Makes `small` a copy of a picture.
fn take(from: &Pictures, index: usize, small: &mut Image) {
    small.pixels.clear();
    small.pixels.extend_from_slice(from.get(index));
    (small.width, small.height) = (from.edge, from.edge);
}

/// Makes `small` the part of a photo, resized to a square of this edge.
fn resized(
    renderer: &mut Renderer,
    photos: &Pictures,
    cut: &Cut,
    edge: u32,
    image: &mut Image,
    small: &mut Image,
) {
    take(photos, cut.photo, image);
    let Cut { left, top, side, .. } = *cut;
    let area = Rect { left, top, width: side, height: side };
    small.pixels.resize(3 * (edge * edge) as usize, 0);
    (small.width, small.height) = (edge, edge);
    renderer.resize(image, area, Filter::Bilinear, [edge; 2], &mut small.pixels);
}

/// Resizes a whole picture.
fn out_of(renderer: &mut Renderer, image: &Image, sides: [u32; 2], out: &mut [u8]) {
    let whole = Rect { left: 0, top: 0, width: image.width, height: image.height };
    renderer.resize(image, whole, Filter::Bilinear, sides, out);
}

/// Makes `small` the object with its 4 x 4 blocks in another order: block `i` is the one of number `order[i]`.
fn shuffle(pixels: &[u8], order: &[i64], small: &mut Image) {
    let edge = OBJECT as usize;
    let block = edge / 4;
    small.pixels.resize(3 * edge * edge, 0);
    (small.width, small.height) = (OBJECT, OBJECT);
    for (to, from) in order.iter().enumerate() {
        let start = |number: usize| (number / 4 * block * edge + number % 4 * block) * 3;
        let (to, from) = (start(to), start(*from as usize));
        for row in 0..block {
            let at = row * edge * 3;
            small.pixels[to + at..][..3 * block].copy_from_slice(&pixels[from + at..][..3 * block]);
        }
    }
}

fn mirror(image: &mut Image) {
    for row in image.pixels.chunks_exact_mut(3 * image.width as usize) {
        row.as_chunks_mut::<3>().0.reverse();
    }
}

/// Lays a paste's pixels over the canvas `[size, size, 3]`, fading in over its seam: a pixel whose centre lies d from
/// the paste's edge counts d / seam, along either axis, and all beyond.
fn blend(canvas: &mut [f32], size: u32, paste: &Paste, pixels: &[u8]) {
    let [left, top, right, bottom] = paste.corners.map(|corner| corner as usize);
    let (width, height) = (right - left, bottom - top);
    let share = |at: usize, length: usize| {
        let inside = at.min(length - 1 - at) as f32 + 0.5;
        if paste.seam == 0 { 1.0 } else { (inside / paste.seam as f32).clamp(0.0, 1.0) }
    };
    for y in 0..height {
        let row = &mut canvas[((top + y) * size as usize + left) * 3..][..3 * width];
        let from = &pixels[y * width * 3..][..3 * width];
        let down = share(y, height);
        for (x, (to, from)) in
            row.as_chunks_mut::<3>().0.iter_mut().zip(from.as_chunks::<3>().0).enumerate()
        {
            let share = down * share(x, width);
            for (to, from) in to.iter_mut().zip(from) {
                *to = *to * (1.0 - share) + f32::from(*from) * share;
            }
        }
    }
}
