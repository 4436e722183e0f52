//! Photographs with boxes, as COCO and as VOC have them.

use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use serde_json::json;

/// A picture of 40 x 20 pixels with a white box on black, `[left, top, right, bottom]`.
pub(crate) fn boxed(file: &Path, corners: [u32; 4]) {
    let [left, top, right, bottom] = corners;
    let picture = RgbImage::from_fn(40, 20, |x, y| {
        let inside = (left..right).contains(&x) && (top..bottom).contains(&y);
        Rgb([if inside { 255 } else { 0 }; 3])
    });
    picture.save(file).unwrap();
}

/// Ten pictures with a box each, as COCO and as VOC have them.
pub(crate) fn photographs(folder: &Path) -> (PathBuf, PathBuf) {
    let (coco, voc) = (folder.join("coco"), folder.join("VOC2007"));
    let folders =
        [&coco, &voc.join("JPEGImages"), &voc.join("Annotations"), &voc.join("ImageSets/Main")];
    folders.iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
    let (mut images, mut annotations, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..10_u32 {
        let corners = [2 + 2 * n, 4, 14 + 2 * n, 12];
        let name = format!("{:06}", n + 1);
        boxed(&coco.join(format!("{name}.png")), corners);
        std::fs::copy(coco.join(format!("{name}.png")), voc.join(format!("JPEGImages/{name}.jpg")))
            .unwrap();
        let id = 100 + n;
        images.push(json!({ "id": id, "file_name": format!("{name}.png") }));
        let [left, top, right, bottom] = corners;
        let bbox = [left, top, right - left, bottom - top];
        annotations.push(json!({ "id": n + 1, "image_id": id, "category_id": 7, "bbox": bbox }));
        let object = |name: &str, difficult: u8, [a, b, c, d]: [u32; 4]| {
            // Pixels count from 1, both ends included.
            format!(
                "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{}</xmin>\
                 <ymin>{}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>",
                a + 1,
                b + 1
            )
        };
        let objects = [object("dog", 0, corners), object("cat", 1, [0, 0, 3, 3])].concat();
        let text = format!("<annotation><folder>VOC2007</folder>{objects}</annotation>");
        std::fs::write(voc.join(format!("Annotations/{name}.xml")), text).unwrap();
        names.push(name);
    }
    annotations.push(
        json!({ "id": 99, "image_id": 100, "category_id": 7, "bbox": [0, 0, 40, 20], "iscrowd": 1 }),
    );
    let all = json!({
        "images": images, "annotations": annotations,
        "categories": [{ "id": 7, "name": "dog" }, { "id": 3, "name": "cat" }],
    });
    std::fs::write(folder.join("coco.json"), all.to_string()).unwrap();
    std::fs::write(voc.join("ImageSets/Main/trainval.txt"), names[..6].join("\n")).unwrap();
    std::fs::write(voc.join("ImageSets/Main/test.txt"), names[6..].join("\n")).unwrap();
    (coco, voc)
}
