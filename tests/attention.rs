//! Attention maps against NumPy, resized pictures against Pillow, and `detco eval attention` from files to a grid.
#![cfg(feature = "train")]

mod export_oracle;
#[expect(dead_code, reason = "no images are packed here")]
mod support;

use std::path::Path;

use detco::eval::attention::{Method, attention, resized};
use detco::model::Draws;
use detco_shards::decode::{Decoder, Image};
use detco_shards::views::Renderer;
use export_oracle::run;
use serde_json::Value;
use support::{detco, detco_fails, detco_ok, path};
use tch::{Kind, Tensor};

const METHODS: [(&str, Method); 3] =
    [("mean", Method::Mean), ("sum-squares", Method::SumSquares), ("eigen", Method::Eigen)];

#[test]
fn maps_and_figures_are_numpys() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("in"), folder.path().join("out"));
    // As after a ReLU; more places than channels and fewer.
    for (case, shape) in [[4, 40, 7, 9], [4, 200, 5, 4]].into_iter().enumerate() {
        let maps = Draws::new(4, "maps", case as u64).normal(&shape, 1.0).relu();
        let boxes = [
            [[10.0, 20.0, 40.0, 50.5], [60.0, 0.0, 30.0, 20.0]],
            [[0.0, 0.0, 100.0, 75.0], [3.0, 3.0, 5.0, 5.0]],
            [[-5.0, -5.0, 20.0, 20.0], [90.0, 60.0, 40.0, 40.0]],
            [[33.3, 44.4, 11.1, 22.2], [33.0, 44.0, 11.0, 22.0]],
        ];
        let flat: Vec<f64> = boxes.as_flattened().as_flattened().to_vec();
        let tensors = [
            ("maps", maps.shallow_clone()),
            ("size", Tensor::from_slice(&[75_i64, 100])),
            ("boxes", Tensor::from_slice(&flat).view([4, 2, 4])),
        ];
        Tensor::write_safetensors(&tensors, &file).unwrap();
        run("attention.py", &[&file, &out]);
        let theirs = Tensor::read_safetensors(&out).unwrap();
        let of = |name: &str| &theirs.iter().find(|(found, _)| found == name).unwrap().1;
        for (name, method) in METHODS {
            let figures = of(&format!("{name}.figures"));
            for (at, boxes) in (0..).zip(&boxes) {
                let found = attention(&maps.select(0, at), method, [100, 75]).unwrap();
                let theirs = of(name).select(0, at).flatten(0, -1);
                let off =
                    (Tensor::from_slice(&found.values) - theirs).abs().max().double_value(&[]);
                assert!(off < 1e-5, "{name}, map {at}: {off:e} apart");
                let ours = found.in_boxes(boxes).unwrap();
                let ours = [ours.energy, ours.area, f64::from(u8::from(ours.pointed)), ours.iou];
                let theirs = Vec::<f64>::try_from(figures.select(0, at)).unwrap();
                for (ours, theirs) in ours.iter().zip(theirs) {
                    assert!((ours - theirs).abs() < 1e-5, "{name}, {at}: {ours}, NumPy {theirs}");
                }
            }
        }
    }
}

#[test]
fn a_constant_map_is_nothing_to_look_at() {
    let map = Tensor::full([3, 2, 2], 0.7, (Kind::Float, tch::Device::Cpu));
    for (_, method) in METHODS {
        let found = attention(&map, method, [8, 8]).unwrap();
        assert!(found.is_constant && found.values.iter().all(|value| *value == 0.0));
        assert_eq!(found.in_boxes(&[[0.0, 0.0, 4.0, 4.0]]), None);
    }
    let map = Draws::new(1, "map", 0).normal(&[3, 2, 2], 1.0);
    assert_eq!(attention(&map, Method::Mean, [8, 8]).unwrap().in_boxes(&[]), None);
}

/// A picture of a bright ring on stripes.
fn picture(file: &Path, width: u32, height: u32) {
    let image = image::RgbImage::from_fn(width, height, |x, y| {
        let away = f64::from(x).hypot(f64::from(y)) as u32;
        let stripes = ((x / 5 + y / 9) % 3 * 60) as u8;
        image::Rgb([stripes, (away % 256) as u8, if away % 90 < 30 { 250 } else { 20 }])
    });
    image.save(file).unwrap();
}

#[test]
fn pictures_are_resized_as_pillow_does_it() {
    let folder = tempfile::tempdir().unwrap();
    for (number, (width, height)) in
        [(200, 130), (61, 190), (300, 40), (64, 64)].into_iter().enumerate()
    {
        let file = folder.path().join(format!("{number}.png"));
        picture(&file, width, height);
        let mut image = Image::new();
        Decoder::new().decode(&std::fs::read(&file).unwrap(), &mut image).unwrap();
        let ours = resized(&image, 48, &mut Renderer::new()).unwrap();
        let out = folder.path().join("out");
        run("attention.py", &[&"resize", &file, &"48", &out]);
        let theirs = Tensor::read_safetensors(&out).unwrap().remove(0).1;
        assert_eq!(theirs.size(), [i64::from(ours.height), i64::from(ours.width), 3]);
        assert_eq!(
            Vec::<u8>::try_from(theirs.flatten(0, -1)).unwrap(),
            ours.pixels,
            "{width} x {height}"
        );
    }
    let file = folder.path().join("long.png");
    picture(&file, 900, 2);
    let mut image = Image::new();
    Decoder::new().decode(&std::fs::read(&file).unwrap(), &mut image).unwrap();
    assert!(resized(&image, 48, &mut Renderer::new()).is_none(), "21,600 pixels");
}

#[test]
fn the_program_draws_the_same_grid_again_and_counts_in_boxes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let weights = at("resnet18.safetensors");
    run("svm.py", &[&"weights", &weights]);
    std::fs::create_dir(at("Annotations")).unwrap();
    let objects = |corners: [u32; 4]| {
        let [a, b, c, d] = corners;
        format!(
            "<annotation><object><name>dog</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>\
             <ymax>{d}</ymax></bndbox></object></annotation>"
        )
    };
    for (name, width, height) in [("one", 120, 90), ("two", 70, 140)] {
        picture(&at(&format!("{name}.jpg")), width, height);
        // The whole picture.
        let text = objects([1, 1, width, height]);
        std::fs::write(at("Annotations").join(format!("{name}.xml")), text).unwrap();
    }
    let (one, two, grid) = (at("one.jpg"), at("two.jpg"), at("grid.png"));
    let args = |more: &[&str]| -> Vec<String> {
        let fixed =
            ["eval", "attention", path(&weights), path(&one), path(&two), "--size", "64", "-o"];
        fixed.iter().chain(&[path(&grid)]).chain(more).map(|one| (*one).to_owned()).collect()
    };
    let call = |more: &[&str]| {
        let args = args(more);
        let text = detco_ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
        (text, std::fs::read(&grid).unwrap())
    };
    let fails = |more: &[&str], code: i32| {
        let args = args(more);
        detco_fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), code)
    };
    let (voc, levels) = (folder.path(), ["--levels", "3,4,5", "--with", path(&weights)]);
    let with_boxes = [&levels[..], &["--voc", path(voc)]].concat();
    let (text, first) = call(&with_boxes);
    assert_eq!(call(&with_boxes).1, first, "the same bytes again");
    assert!(
        text.contains("2 pictures, 6 columns") && text.contains("column 4: Res3 of "),
        "{text}"
    );
    // All of the picture: as much of the map as of the area, and the maximum is in it.
    assert!(text.contains("energy over area 1.00, maximum in a box 100 %"), "{text}");
    let image = image::load_from_memory(&first).unwrap().into_rgb8();
    assert_eq!(image.dimensions(), (6 + 7 * (85 + 6), 6 + 64 + 6 + 128 + 6));
    let masked = call(&[]).1;
    assert_ne!(call(&["--look", "colour"]).1, masked);
    assert_ne!(call(&["--method", "sumsq"]).1, masked);
    assert_ne!(call(&["--method", "eigen"]).1, masked);

    // The same boxes as COCO has them.
    let coco = at("boxes.json");
    let truth = serde_json::json!({
        "images": [{ "id": 1, "file_name": "one.jpg" }, { "id": 2, "file_name": "two.jpg" }],
        "categories": [{ "id": 1, "name": "dog" }],
        "annotations": [
            { "image_id": 1, "category_id": 1, "bbox": [0, 0, 60, 90] },
            { "image_id": 2, "category_id": 1, "bbox": [0, 0, 70, 140], "iscrowd": 1 },
        ],
    });
    std::fs::write(&coco, truth.to_string()).unwrap();
    let (text, _) = call(&["--coco", path(&coco), "--json"]);
    let report: Value = serde_json::from_str(&text).unwrap();
    let readings = report["readings"].as_array().unwrap();
    assert_eq!(readings.len(), 3, "{report}");
    assert_eq!(readings[0]["samples"].as_array().unwrap().len(), 1, "a crowd is no box");
    let error = fails(&["--voc", path(&at("nowhere"))], 1);
    assert!(error.contains("nowhere/Annotations/one.xml"), "{error}");
    std::fs::write(&coco, truth.to_string().replace("two.jpg", "three.jpg")).unwrap();
    let error = fails(&["--coco", path(&coco)], 1);
    assert!(error.contains("boxes.json: no image has the file_name two.jpg"), "{error}");
    std::fs::write(&two, b"no picture").unwrap();
    assert!(fails(&[], 1).contains("two.jpg"));

    // Black everywhere: nothing of a map is left but the network's own pattern at the borders, if any.
    image::RgbImage::new(64, 64).save(&two).unwrap();
    let output = detco(&[
        "eval",
        "attention",
        path(&weights),
        path(&two),
        "--size",
        "32",
        "-o",
        path(&grid),
    ]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    // Res5 of 32 pixels is one place: a map that is the same everywhere.
    assert!(said.contains("warning: ") && said.contains("is the same everywhere"), "{said}");
}
