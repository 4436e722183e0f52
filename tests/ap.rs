//! Average precision against pycocotools and against VOC's definition, on boxes with everything that can be odd
//! about them; and through the program.
#![cfg(feature = "train")]

#[expect(dead_code, reason = "no images are packed here")]
mod support;

use std::path::Path;
use std::process::Command;

use detco::eval::ap::{self, Detection, Object, Truth, Year};
use detco::model::Draws;
use serde_json::{Value, json};
use support::{detco_fails, detco_ok, path};

const CASES: u64 = 1000;

/// A case: few images and categories, boxes on a coarse grid and scores of a few values, so that overlaps and scores
/// are equal often; crowds, empty categories and images, at times more than a hundred detections.
fn case(number: u64) -> (Truth, Vec<Detection>) {
    let mut draw = Draws::new(1, "average precision", number);
    let mut below = |n: u64| draw.below(n) as usize;
    let (images, categories) = (1 + below(4), 1 + below(3));
    let crowded = below(10) == 0;
    let scale = [4.0, 12.0, 40.0][below(3)];
    let (mut objects, mut found) = (Vec::new(), Vec::new());
    for image in 0..images {
        for _ in 0..below(9) {
            let bounds = [below(8), below(8), 1 + below(6), 1 + below(6)].map(|n| n as f64 * scale);
            // A mask has less area than its box.
            let area = bounds[2] * bounds[3] * [1.0, 0.7, 0.25][below(3)];
            let (category, is_ignored) = (below(categories as u64), below(6) == 0);
            objects.push(Object { image, category, bounds, area, is_ignored });
        }
        for _ in 0..if crowded { 90 + below(60) } else { below(14) } {
            let mut bounds =
                [below(8), below(8), 1 + below(6), 1 + below(6)].map(|n| n as f64 * scale);
            if !objects.is_empty() && below(2) == 0 {
                // Near an object.
                let near: &Object = &objects[below(objects.len() as u64)];
                bounds = near.bounds;
                bounds[below(4)] += below(4) as f64 * scale / 4.0;
            }
            let score = 0.05 + 0.1 * below(10) as f64;
            found.push(Detection { image, category: below(categories as u64), bounds, score });
        }
    }
    let name =
        |kind: &str, n: usize| (1..).take(n).map(|i| format!("{kind}{i}")).collect::<Vec<_>>();
    let categories = (1..).zip(name("kind", categories)).collect();
    (Truth { images: name("", images), categories, objects }, found)
}

/// In COCO's form.
fn as_json(truth: &Truth, found: &[Detection]) -> (Value, Value) {
    let categories: Vec<Value> =
        truth.categories.iter().map(|(id, name)| json!({ "id": id, "name": name })).collect();
    let images: Vec<Value> = truth
        .images
        .iter()
        .map(|name| json!({ "id": name.parse::<i64>().unwrap(), "width": 640, "height": 480 }))
        .collect();
    let object = |(object, id): (&Object, i64)| {
        json!({
            "id": id, "image_id": object.image + 1, "category_id": object.category + 1,
            "bbox": object.bounds, "area": object.area, "iscrowd": u8::from(object.is_ignored),
        })
    };
    let objects: Vec<Value> = truth.objects.iter().zip(1..).map(object).collect();
    let one = |one: &Detection| {
        json!({
            "image_id": one.image + 1, "category_id": one.category + 1,
            "bbox": one.bounds, "score": one.score,
        })
    };
    let truth = json!({ "images": images, "categories": categories, "annotations": objects });
    (truth, found.iter().map(one).collect())
}

fn oracle(file: &Path) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join(".venv/bin/python");
    assert!(python.is_file(), "no Python at {}: run `cargo xtask setup`", python.display());
    let output =
        Command::new(python).arg(root.join("tools/oracle/ap.py")).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The twelve numbers, -1 in the place of none, as shares.
fn twelve(of: &ap::Coco) -> [f64; 12] {
    [
        of.ap,
        of.ap50,
        of.ap75,
        of.ap_small,
        of.ap_medium,
        of.ap_large,
        of.ar_1,
        of.ar_10,
        of.ar_100,
        of.ar_small,
        of.ar_medium,
        of.ar_large,
    ]
    .map(|number| number.map_or(-1.0, |number| number / 100.0))
}

#[test]
fn a_thousand_cases_have_pycocotools_and_vocs_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let cases: Vec<_> = (0..CASES).map(case).collect();
    let list: Vec<Value> = cases
        .iter()
        .map(|(truth, found)| {
            let (truth, found) = as_json(truth, found);
            json!({ "truth": truth, "found": found })
        })
        .collect();
    let file = folder.path().join("cases.json");
    std::fs::write(&file, serde_json::to_vec(&list).unwrap()).unwrap();
    let said = oracle(&file);
    assert_eq!(said.lines().count(), cases.len());
    let (mut compared, mut empty) = (0, 0);
    for (number, ((truth, found), line)) in cases.iter().zip(said.lines()).enumerate() {
        let theirs: Value = serde_json::from_str(line).unwrap();
        let ours = twelve(&ap::coco(truth, found));
        // pycocotools refuses a list without detections.
        if let Some(theirs) = theirs["coco"].as_array() {
            for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let theirs = theirs.as_f64().unwrap();
                let off = (ours - theirs).abs();
                assert!(off <= 1e-9, "case {number}, number {i}: {ours}, pycocotools {theirs}");
                compared += 1;
                empty += usize::from(theirs < 0.0);
            }
        }
        for (key, year) in [("voc07", Year::Voc07), ("voc10", Year::Voc10)] {
            let of = ap::voc(truth, found, year);
            for (ours, theirs) in [of.ap50, of.ap75].iter().zip(theirs[key].as_array().unwrap()) {
                let (ours, theirs) =
                    (ours.map_or(-1.0, |ours| ours / 100.0), theirs.as_f64().unwrap());
                assert!(
                    (ours - theirs).abs() <= 1e-9,
                    "case {number}, {key}: {ours}, not {theirs}"
                );
            }
        }
    }
    println!("{compared} numbers of pycocotools, {empty} of them of nothing to detect");
    assert!(compared > 11_000 && empty > 500 && empty < compared / 2);
}

#[test]
fn the_program_reads_cocos_files_and_says_what_is_wrong_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, value: &Value| {
        let file = folder.path().join(name);
        std::fs::write(&file, value.to_string()).unwrap();
        path(&file).to_owned()
    };
    let (truth, found) = case(3);
    let (there, said) = as_json(&truth, &found);
    let (there, said) = (file("truth.json", &there), file("found.json", &said));
    let printed = detco_ok(&["eval", "ap", &said, "--truth", &there, "--json"]);
    let printed: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(printed["ap"].as_f64(), ap::coco(&truth, &found).ap);
    assert_eq!(printed["categories"].as_array().unwrap().len(), truth.categories.len());
    let text = detco_ok(&["eval", "ap", &said, "--truth", &there]);
    assert!(text.starts_with("AP ") && text.contains("kind1"), "{text}");

    let foreign = json!([{ "image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1 }]);
    let error = detco_fails(&["eval", "ap", &file("a.json", &foreign), "--truth", &there], 1);
    assert!(
        error.contains("a.json: detection 0: image_id 77 is not an image of the truth"),
        "{error}"
    );
    let shape = json!([{ "image_id": 1, "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1 }]);
    let error = detco_fails(&["eval", "ap", &file("b.json", &shape), "--truth", &there], 1);
    assert!(
        error.contains("b.json: detection 0: expected bbox = [left, top, width, height]"),
        "{error}"
    );
    let error = detco_fails(&["eval", "ap", &there, "--truth", &there], 1);
    assert!(error.contains("expected COCO results: a list of objects with image_id"), "{error}");
    let error = detco_fails(&["eval", "ap", &said, "--truth", &there, "--metric", "voc07"], 1);
    assert!(error.contains("need a folder such as VOCdevkit/VOC2007"), "{error}");
}

#[test]
fn the_program_reads_vocs_folders() {
    let folder = tempfile::tempdir().unwrap();
    let voc = folder.path().join("VOC2007");
    for name in ["ImageSets/Main", "Annotations"] {
        std::fs::create_dir_all(voc.join(name)).unwrap();
    }
    std::fs::write(voc.join("ImageSets/Main/test.txt"), "000001\n000002\n").unwrap();
    let object = |name: &str, difficult: u8, corners: [u32; 4]| {
        let [a, b, c, d] = corners;
        format!(
            "<object><name>{name}</name><difficult>{difficult}</difficult>\
             <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>\
             <bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        )
    };
    let annotation = |name: &str, objects: &[String]| {
        let text = format!("<annotation><folder>VOC2007</folder>{}</annotation>", objects.concat());
        std::fs::write(voc.join("Annotations").join(format!("{name}.xml")), text).unwrap();
    };
    let dogs = [object("dog", 0, [10, 10, 50, 50]), object("dog", 1, [60, 60, 90, 90])];
    annotation("000001", &dogs);
    annotation("000002", &[object("dog", 0, [5, 5, 25, 45]), object("cat", 0, [30, 5, 60, 45])]);
    let found = folder.path().join("found");
    std::fs::create_dir(&found).unwrap();
    // Right, of a difficult object, the same object again, and one in an image of no split.
    let dog = "000001 0.9 10 10 50 50\n000001 0.8 60 60 90 90\n000001 0.7 11 10 50 50\n000009 0.6 1 1 2 2\n";
    std::fs::write(found.join("comp4_det_test_dog.txt"), dog).unwrap();
    let args = ["eval", "ap", path(&found), "--truth", path(&voc), "--json"];
    let printed: Value = serde_json::from_str(&detco_ok(&args)).unwrap();
    let of = |name: &str| {
        let all = printed["categories"].as_array().unwrap();
        all.iter().find(|one| one["name"] == name).unwrap()["ap50"].as_f64().unwrap()
    };
    // One of two dogs at a precision of 1: the points of recall 0 to 0.5 are six of eleven.
    assert!((of("dog") - 600.0 / 11.0).abs() < 1e-9 && of("cat") == 0.0, "{printed}");
    let ten = detco_ok(&[&args[..], &["--metric", "voc10"]].concat());
    assert!(ten.contains("\"ap50\":50.0"), "{ten}");

    std::fs::write(found.join("comp4_det_test_cat.txt"), "000002 0.5 1 2 three 4\n").unwrap();
    let error = detco_fails(&args, 1);
    assert!(
        error.contains("cat.txt: line 1: expected: image score xmin ymin xmax ymax"),
        "{error}"
    );
}
