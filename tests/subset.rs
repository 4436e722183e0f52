//! `detco data subset`: files of COCO annotations whose images, entries and digests are checked one by one.

#[expect(dead_code, reason = "no images are packed here")]
mod support;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};
use support::{detco_fails, detco_ok, path};

/// 400 images with ids that are no places, of which every fifth has no annotation and two have a crowd alone.
fn annotations() -> String {
    let id = |i: u32| (i * 7919) % 100_003 + 1;
    let images: Vec<String> = (0..400)
        .map(|i| {
            format!("{{\"file_name\": \"{:012}.jpg\",  \"id\": {}, \"width\":640}}", id(i), id(i))
        })
        .collect();
    let mut objects = Vec::new();
    for i in (0..400).filter(|i| i % 5 != 0) {
        let crowd = u8::from(i == 1 || i == 2);
        for copy in 0..=(if crowd == 1 { 0 } else { i % 3 }) {
            let number = objects.len();
            objects.push(format!(
                "{{\"id\": {number}, \"image_id\": {}, \"category_id\": 1, \"bbox\": [1.50, {copy}, 3, 4e0], \
                 \"iscrowd\": {crowd}}}",
                id(i)
            ));
        }
    }
    format!(
        "{{\"info\": {{\"year\": 2017}}, \"images\": [{}], \"annotations\": [{}],\n \"categories\": [{{\"id\": 1, \
         \"name\": \"caf\\u00e9\"}}]}}",
        images.join(", "),
        objects.join(", ")
    )
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn ids(of: &Value, list: &str, key: &str) -> Vec<i64> {
    of[list].as_array().unwrap().iter().map(|one| one[key].as_i64().unwrap()).collect()
}

#[test]
fn subsets_are_whole_files_by_image() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("instances.json");
    let text = annotations();
    std::fs::write(&file, &text).unwrap();
    let out = folder.path().join("subsets");
    let said = detco_ok(&["data", "subset", path(&file), "-o", path(&out), "--seeds", "3"]);
    assert!(
        said.contains("12 subsets of 400 images (82 images without annotations among them)"),
        "{said}"
    );
    let manifest = json(&out.join("manifest.json"));
    assert_eq!(manifest["drawn_from"], "all-images");
    assert_eq!(manifest["source"]["sha256"], hex(text.as_bytes()));
    assert_eq!(manifest["source"]["images_without_annotations"], 82);
    let all: Value = serde_json::from_str(&text).unwrap();
    let mut seen: HashMap<u64, Vec<BTreeSet<i64>>> = HashMap::new();
    let subsets = manifest["subsets"].as_array().unwrap();
    assert_eq!(subsets.len(), 12);
    for subset in subsets {
        let file = out.join(subset["file"].as_str().unwrap());
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(subset["sha256"], hex(&bytes));
        let of = json(&file);
        assert_eq!((&of["info"], &of["categories"]), (&all["info"], &all["categories"]));
        let images = ids(&of, "images", "id");
        let kept: BTreeSet<i64> = images.iter().copied().collect();
        let percent = subset["percent"].as_f64().unwrap();
        assert_eq!(
            (kept.len(), images.len()),
            ((4.0 * percent) as usize, (4.0 * percent) as usize)
        );
        // All annotations of these images, and no others, in order.
        let theirs = |of: &Value| -> Vec<Value> {
            let all = of["annotations"].as_array().unwrap();
            let mine = |one: &&Value| kept.contains(&one["image_id"].as_i64().unwrap());
            all.iter().filter(mine).cloned().collect()
        };
        assert_eq!(of["annotations"].as_array().unwrap(), &theirs(&all));
        assert_eq!(subset["annotations"].as_u64().unwrap() as usize, theirs(&all).len());
        let text = String::from_utf8(bytes).unwrap();
        assert!(
            text.contains(".jpg\",  \"id\"") && text.contains("caf\\u00e9"),
            "not byte for byte"
        );
        seen.entry(subset["seed"].as_u64().unwrap()).or_default().push(kept);
    }
    for sets in seen.values() {
        assert!(sets.windows(2).all(|pair| pair[0].is_subset(&pair[1])), "smaller ones are parts");
    }
    assert!(seen[&0] != seen[&1] && seen[&1] != seen[&2]);

    // Another order of the same images gives the same draw.
    let mut turned = all.clone();
    turned["images"].as_array_mut().unwrap().reverse();
    let file = folder.path().join("turned.json");
    std::fs::write(&file, turned.to_string()).unwrap();
    let other = folder.path().join("other");
    detco_ok(&[
        "data",
        "subset",
        path(&file),
        "-o",
        path(&other),
        "--seeds",
        "1",
        "--percent",
        "5",
    ]);
    let drawn: BTreeSet<i64> =
        ids(&json(&other.join("turned.5pct.seed0.json")), "images", "id").into_iter().collect();
    assert_eq!(drawn, seen[&0][2]);

    // Without images that have no annotation: 320 have one, two of them a crowd alone.
    let args =
        ["data", "subset", path(&file), "-o", path(&other), "--seeds", "1", "--annotated-only"];
    let said = detco_ok(&args);
    assert!(
        said.contains("4 subsets of 318 images (82 images without annotations left out)"),
        "{said}"
    );
    let manifest = json(&other.join("manifest.json"));
    assert_eq!(manifest["drawn_from"], "annotated-images");
    let subsets = manifest["subsets"].as_array().unwrap();
    assert!(subsets.iter().all(|one| one["images_without_annotations"] == 0), "{manifest}");
    let sizes: Vec<u64> = subsets.iter().map(|one| one["images"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [3, 6, 15, 31]);
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn files_that_are_no_annotations_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.json");
    let fails = |text: &str, more: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let out = folder.path().join("out");
        let args = ["data", "subset", path(&file), "-o", path(&out)];
        detco_fails(&[&args[..], more].concat(), 1)
    };
    let error = fails("[]", &[]);
    assert!(error.contains("a.json: ") && error.contains("expected COCO annotations"), "{error}");
    assert!(fails("{\"images\": []", &[]).contains("line 1 column"));
    assert!(fails("{\"images\": []}", &[]).contains("there is no list annotations"));
    let error = fails("{\"images\": [{\"id\": 1}, {\"id\": \"2\"}], \"annotations\": []}", &[]);
    assert!(error.contains("images 1: invalid type"), "{error}");
    let error = fails("{\"images\": [{\"id\": 1}, {\"id\": 1}], \"annotations\": []}", &[]);
    assert!(error.contains("images 1: the id 1 is listed twice"), "{error}");
    let error = fails("{\"images\": [{\"id\": 1}], \"annotations\": [{\"image_id\": 2}]}", &[]);
    assert!(error.contains("annotations 0: image_id 2 is not among the images"), "{error}");
    let error = fails("{\"images\": [{\"id\": 1}], \"annotations\": []}", &[]);
    assert!(error.contains("1 % of 1 images are none"), "{error}");
    let error = fails(
        "{\"images\": [{\"id\": 1}], \"annotations\": []}",
        &["--percent", "100", "--annotated-only"],
    );
    assert!(error.contains("100 % of 0 images are none"), "{error}");
    assert!(!folder.path().join("out").exists(), "nothing is written of what fails");
    let args = ["data", "subset", path(&file), "-o", path(folder.path()), "--percent", "0"];
    assert!(detco_fails(&args, 2).contains("expected a number above 0 and up to 100"));
}
