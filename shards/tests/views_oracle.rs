//! Views against Pillow and torchvision: the same plan, rendered by both.

mod support;

use detco_shards::decode::{Decoder, Image};
use detco_shards::views::{Filter, Op, Recipe, Rect, Renderer, ViewPlan};
use serde_json::{Value, json};
use std::path::Path;

/// Renders plans into files for the oracle.
struct Cases<'a> {
    folder: &'a Path,
    renderer: Renderer,
    plans: Vec<Value>,
    names: Vec<String>,
}

impl<'a> Cases<'a> {
    fn new(folder: &'a Path) -> Self {
        Cases { folder, renderer: Renderer::new(), plans: Vec::new(), names: Vec::new() }
    }

    fn push(&mut self, name: &str, image: (&str, &Image), plan: &ViewPlan) {
        let mut out = vec![0; plan.bytes()];
        self.renderer.view(image.1, plan, &mut out);
        let file = format!("{}.out", self.plans.len());
        std::fs::write(self.folder.join(&file), &out).unwrap();
        std::fs::write(self.folder.join(image.0), &image.1.pixels).unwrap();
        let (width, height) = (image.1.width, image.1.height);
        self.plans.push(json!({
            "image": image.0, "width": width, "height": height, "plan": plan, "out": file,
        }));
        self.names.push(name.to_owned());
    }

    /// (name, mean, worst, share) of every case.
    fn compare(self) -> Vec<(String, f64, u64, f64)> {
        std::fs::write(self.folder.join("plans.json"), serde_json::to_vec(&self.plans).unwrap())
            .unwrap();
        let lines = support::oracle("views.py", &[self.folder.as_os_str()]);
        let errors: Vec<_> = lines
            .lines()
            .zip(self.names)
            .map(|(line, name)| {
                let error: Value = serde_json::from_str(line).unwrap();
                let number = |key: &str| error[key].as_f64().unwrap();
                (name, number("mean"), number("worst") as u64, number("share"))
            })
            .collect();
        assert_eq!(errors.len(), self.plans.len(), "one line a case");
        errors
    }
}

fn whole(image: &Image, size: u32, ops: Vec<Op>) -> ViewPlan {
    let crop = Rect { left: 0, top: 0, width: image.width, height: image.height };
    ViewPlan { size, crop, ops, ..ViewPlan::default() }
}

/// Every operation by itself, on an image that is not resized, so that nothing else can differ.
#[test]
fn each_operation_is_pillows() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases = Cases::new(folder.path());
    let images = [
        ("photo", support::images::textured(96, 96, 1)),
        ("noise", support::images::noise(96, 96, 2)),
    ];
    let mut ops = vec![Op::Gray];
    for factor in [0.0, 0.61, 0.9999, 1.0, 1.0001, 1.4, 2.0] {
        ops.extend([Op::Brightness(factor), Op::Contrast(factor), Op::Saturation(factor)]);
    }
    for i in 0..=20 {
        ops.push(Op::Hue((i as f32 - 10.0) * 0.05));
        ops.push(Op::Blur(0.1 + i as f32 * 0.095));
    }
    ops.extend([Op::Blur(0.0), Op::Blur(3.3), Op::Blur(11.0), Op::Hue(0.0123), Op::Hue(-0.0987)]);
    ops.extend([Op::AutoContrast, Op::Equalize, Op::Invert]);
    ops.extend((1..=8).map(Op::Posterize));
    ops.extend([0, 1, 100, 255, 256].map(Op::Solarize));
    ops.extend([0, 55, 110, 200].map(Op::SolarizeAdd));
    ops.push(Op::Flip);
    ops.extend([0.1, 0.61, 1.0, 1.9].map(Op::Sharpness));
    for bicubic in [false, true] {
        for matrix in [
            [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            [1.0, 0.29, 0.0, 0.0, 1.0, 0.0],
            [1.0, 0.0, 0.0, -0.3, 1.0, 0.0],
            [1.0, 0.0, 43.2, 0.0, 1.0, 0.0],
            [1.0, 0.0, 0.0, 0.0, 1.0, -41.7],
            [0.9, -0.4, 24.0, 0.4, 0.9, -14.4],
        ] {
            ops.push(Op::Affine { matrix, bicubic });
        }
    }
    for (name, image) in &images {
        for op in &ops {
            cases.push(&format!("{name} {op:?}"), (name, image), &whole(image, 96, vec![*op]));
        }
        let flip = ViewPlan { flip: true, ..whole(image, 96, vec![]) };
        cases.push(&format!("{name} flip"), (name, image), &flip);
    }
    for (name, mean, worst, share) in cases.compare() {
        assert_eq!(worst, 0, "{name}: mean {mean}, worst {worst}, {share} of the bytes differ");
    }
}

/// Every hue and saturation there is: the whole cube of colours in steps of 3, turned.
#[test]
fn hue_of_every_color_is_pillows() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases = Cases::new(folder.path());
    for (start, turns) in [(0, 0.1f32), (1, -0.1), (2, 0.4)] {
        let steps: Vec<u8> = (start..=255).step_by(3).map(|v| v as u8).collect();
        let n = steps.len();
        let side = ((n * n * n) as f64).sqrt().ceil() as usize;
        let pixels =
            (0..side * side).flat_map(|i| [steps[i % n], steps[i / n % n], steps[i / n / n % n]]);
        let image = Image { width: side as u32, height: side as u32, pixels: pixels.collect() };
        let name = format!("cube{start}");
        cases.push(&name, (&name, &image), &whole(&image, side as u32, vec![Op::Hue(turns)]));
    }
    for (name, mean, worst, share) in cases.compare() {
        assert_eq!(worst, 0, "{name}: mean {mean}, worst {worst}, {share} of the bytes differ");
    }
}

/// Resizing alone: down, up, odd sizes, one side kept, crops at the edges. Pixels outside the box
/// must not be looked at, so the box lies in noise.
#[test]
fn resized_crops_are_pillows() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases = Cases::new(folder.path());
    let image = support::images::noise(401, 293, 3);
    let photo = support::images::textured(401, 293, 4);
    for (left, top, width, height, size) in [
        (0, 0, 401, 293, 224),
        (1, 2, 399, 290, 224),
        (100, 100, 30, 40, 224),
        (371, 253, 30, 40, 96),
        (10, 20, 224, 224, 224),
        (10, 20, 224, 100, 224),
        (10, 20, 100, 224, 224),
        (0, 0, 1, 1, 17),
        (400, 292, 1, 1, 5),
        (5, 5, 390, 3, 64),
        (7, 7, 300, 280, 255),
        (7, 7, 300, 280, 1),
    ] {
        for (name, image) in [("noise", &image), ("photo", &photo)] {
            let crop = Rect { left, top, width, height };
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let plan = ViewPlan { size, crop, filter, ..ViewPlan::default() };
                let case = format!("{name} {crop:?} to {size}, {filter:?}");
                cases.push(&case, (name, image), &plan);
            }
        }
    }
    for (name, mean, worst, share) in cases.compare() {
        println!("{name}: mean {mean}, worst {worst}, share {share}");
        assert_eq!(worst, 0, "{name}: mean {mean}, worst {worst}, share {share}");
    }
}

/// Drawn plans of all recipes, end to end, on generated images and on those of DETCO_TEST_IMAGES.
#[test]
fn drawn_views_are_torchvisions() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases = Cases::new(folder.path());
    let mut images: Vec<(String, Image)> =
        [(500, 375), (375, 500), (256, 256), (64, 40), (901, 77)]
            .iter()
            .zip(10..)
            .map(|(&(width, height), seed)| {
                (format!("gen{seed}"), support::images::textured(width, height, seed))
            })
            .collect();
    images.extend(real_images(24));
    for (sample, (name, image)) in images.iter().enumerate() {
        for preset in Recipe::presets() {
            let recipe = Recipe::preset(preset).unwrap();
            let plan = recipe.draw(image.width, image.height, 5, 3, sample as u64);
            for view in &plan.views {
                cases.push(&format!("{preset} {name} {view:?}"), (name, image), view);
            }
        }
    }
    let errors = cases.compare();
    assert!(errors.len() > 100, "{} views", errors.len());
    for (name, mean, worst, share) in errors {
        assert_eq!(worst, 0, "{name}: mean {mean}, {share} of the bytes differ");
    }
}

/// Up to `count` images of the folder DETCO_TEST_IMAGES; none where it is not set.
fn real_images(count: usize) -> Vec<(String, Image)> {
    let mut decoder = Decoder::new();
    let files = support::images::real_files();
    let every = (files.len() / count).max(1);
    files
        .iter()
        .step_by(every)
        .take(count)
        .enumerate()
        .map(|(i, path)| {
            let mut image = Image::new();
            decoder.decode(&std::fs::read(path).unwrap(), &mut image).unwrap();
            (format!("real{i}"), image)
        })
        .collect()
}
