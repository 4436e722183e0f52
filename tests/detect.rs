//! `detco eval detect` and `detco data composites`, through the program.
#![cfg(feature = "train")]

#[path = "support/photographs.rs"]
mod photographs;
#[expect(dead_code, reason = "shards of its own are packed here")]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use detco::config::Config;
use detco::model::Model;
use photographs::{boxed, photographs};
use serde_json::Value;
use support::{DETCO, detco_fails, detco_ok, images, path};
use tch::{Device, Tensor};

/// Shards of objects and of photos, and a backbone as a weights file.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        for (name, classes, each) in [("objects", 3, 20), ("photos", 2, 8)] {
            let from = folder.path().join(format!("{name}-images"));
            images(&from, classes, each);
            detco_ok(&["pack", path(&from), path(&folder.path().join(name))]);
        }
        // Not one of the seeds of the random initialisations: a reading that is known is not measured again.
        let sets = ["model.width=8", "seed=70"].map(str::to_owned);
        let config = Config::load("moco-v2-small", &sets).unwrap();
        let model = Model::bare(&config, Device::Cpu).unwrap();
        let tensors: Vec<(String, Tensor)> = model
            .query
            .backbone_tensors()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.contiguous()))
            .collect();
        Tensor::write_safetensors(&tensors, folder.path().join("backbone.safetensors")).unwrap();
        Fixture { folder }
    }

    fn at(&self, name: &str) -> String {
        path(&self.folder.path().join(name)).to_owned()
    }

    /// Arguments for a measurement of seconds.
    fn args(&self, keep: &str, more: &[&str]) -> Vec<String> {
        let (backbone, objects, photos) =
            (self.at("backbone.safetensors"), self.at("objects"), self.at("photos"));
        let keep = self.at(keep);
        let args = [
            "eval",
            "detect",
            &backbone,
            "--composites",
            "--objects",
            &objects,
            "--photos",
            &photos,
            "--size",
            "64",
            "--scenes",
            "40",
            "--test-scenes",
            "20",
            "--steps",
            "12",
            "--width",
            "16",
            "--seeds",
            "2",
            "--keep",
            &keep,
        ];
        args.iter().chain(more).map(ToString::to_string).collect()
    }
}

fn strings(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

#[test]
fn a_measurement_is_repeatable_and_finite() {
    let fixture = Fixture::new();
    let detections = fixture.at("found.json");
    let args = fixture
        .args("a", &["--workers", "1", "--json", "--each-level", "--detections", &detections]);
    let first: Value = serde_json::from_str(&detco_ok(&strings(&args))).unwrap();
    assert_eq!(first["protocol"], "detect-composites-frozen");
    let readings = first["readings"].as_array().unwrap();
    let of = |name: &str| readings.iter().find(|one| one["name"] == name).unwrap();
    for name in ["all/AP50", "all/AP", "res2/AP50", "res5/agnostic-AP50"] {
        let samples = of(name)["samples"].as_array().unwrap();
        assert_eq!(samples.len(), 2, "{name}");
        let mean = samples.iter().map(|one| one.as_f64().unwrap()).sum::<f64>() / 2.0;
        let value = of(name)["value"].as_f64().unwrap();
        assert!((value - mean).abs() < 1e-9 && (0.0..=100.0).contains(&value), "{name} {value}");
    }
    let random = first["random_inits"].as_array().unwrap();
    assert!(random.iter().any(|one| one["name"] == "all/AP50"));
    assert!(random.iter().all(|one| one["samples"].as_array().unwrap().len() == 5));
    // The detections are those of the first seed.
    let truth = fixture.at("found.truth.json");
    let ap: Value =
        serde_json::from_str(&detco_ok(&["eval", "ap", &detections, "--truth", &truth, "--json"]))
            .unwrap();
    let (theirs, ours) =
        (ap["ap50"].as_f64().unwrap(), of("all/AP50")["samples"][0].as_f64().unwrap());
    assert!((theirs - ours).abs() < 1e-9, "{theirs} {ours}");

    // Other numbers of threads, and other files to keep: the same to the last digit.
    let args = fixture.args("b", &["--workers", "3", "--json", "--each-level"]);
    let mut alone = Command::new(DETCO);
    let alone = alone.args(&args).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stderr));
    let second: Value = serde_json::from_slice(&alone.stdout).unwrap();
    assert_eq!(first, second);
    // A lost reading is measured again and is what it was.
    let kept = |name: &str| {
        let files = std::fs::read_dir(fixture.at(name)).unwrap();
        let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        files
    };
    // Five groups of levels: two seeds, and five initialisations.
    let files = kept("b");
    assert_eq!(files.len(), 5 * (2 + 5));
    std::fs::remove_file(&files[0]).unwrap();
    std::fs::write(&files[1], "{").unwrap();
    let third: Value = serde_json::from_str(&detco_ok(&strings(&args))).unwrap();
    assert_eq!(first, third);
    assert_eq!(kept("b"), files);
    // Statistics computed anew come beside what was measured before.
    let args = fixture.args("b", &["--json", "--each-level", "--recompute-bn"]);
    let both: Value = serde_json::from_str(&detco_ok(&strings(&args))).unwrap();
    let all = both["readings"].as_array().unwrap();
    assert_eq!((all[..readings.len()].to_vec(), all.len()), (readings.clone(), 2 * readings.len()));
    let again = &all[readings.len()];
    assert_eq!(again["name"], format!("recomputed-bn/{}", readings[0]["name"].as_str().unwrap()));
    assert_eq!((&both["recomputed_bn_scenes"], &both["sha256"]), (&40.into(), &first["sha256"]));
    assert_eq!(kept("b").len(), 5 * (2 + 5 + 2));
    let text = detco_ok(&strings(&fixture.args("b", &["--each-level"])));
    assert!(text.contains("AP50") && text.contains("5 random inits"), "{text}");

    // Shuffled boxes are another measurement.
    let args = fixture.args("b", &["--json", "--shuffled-boxes"]);
    let control: Value = serde_json::from_str(&detco_ok(&strings(&args))).unwrap();
    assert_eq!(control["settings"]["shuffled_boxes"], true);
    assert_eq!(kept("b").len(), 5 * (2 + 5 + 2) + 2 + 5);
}

/// Fine-tuned, a copy of the backbone is trained, of each seed anew; the file stays as it is.
#[test]
fn a_fine_tuned_backbone_is_another_measurement() {
    let fixture = Fixture::new();
    let file = || std::fs::read(fixture.at("backbone.safetensors")).unwrap();
    let before = file();
    let run = |more: &[&str]| -> Value {
        let more = [&["--json", "--percent", "25,100"][..], more].concat();
        serde_json::from_str(&detco_ok(&strings(&fixture.args("keep", &more)))).unwrap()
    };
    let (frozen, tuned) = (run(&[]), run(&["--fine-tune"]));
    assert_eq!(tuned["protocol"], "detect-composites-fine-tuned");
    assert_eq!(tuned["settings"]["training"]["backbone_lr"], 3e-4);
    assert_eq!(tuned["sha256"], frozen["sha256"]);
    let names = |of: &Value| -> Vec<String> {
        let readings = of["readings"].as_array().unwrap();
        readings.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    assert!(names(&tuned).contains(&"all@25%/AP50".to_owned()));
    assert_eq!(names(&tuned), names(&frozen));
    assert!(tuned["readings"] != frozen["readings"]);
    assert_eq!(run(&["--fine-tune"]), tuned);
    assert!(file() == before);
}

#[test]
fn photographs_are_measured_too() {
    let fixture = Fixture::new();
    let (images, voc) = photographs(fixture.folder.path());
    let (backbone, keep) = (fixture.at("backbone.safetensors"), fixture.at("keep"));
    let (file, images, voc) =
        (fixture.at("coco.json"), path(&images).to_owned(), path(&voc).to_owned());
    let small =
        ["--size", "64", "--steps", "6", "--width", "8", "--seeds", "1", "--keep", &keep, "--json"];
    for (source, protocol) in
        [(vec!["--coco", &file, &images], "coco"), (vec!["--voc", &voc], "voc")]
    {
        let args = [&["eval", "detect", &backbone][..], &source, &small].concat();
        let said: Value = serde_json::from_str(&detco_ok(&args)).unwrap();
        assert_eq!(said["protocol"], format!("detect-{protocol}-frozen"));
        assert_eq!(said["readings"][0]["name"], "all/AP50");
    }
}

#[test]
fn wrong_arguments_are_named() {
    let fixture = Fixture::new();
    let (backbone, objects, photos) =
        (fixture.at("backbone.safetensors"), fixture.at("objects"), fixture.at("photos"));
    let fails = |more: &[&str], code: i32| {
        detco_fails(&[&["eval", "detect", &backbone][..], more].concat(), code)
    };
    let error = fails(&[], 2);
    assert!(error.contains("--composites") && error.contains("--voc"), "{error}");
    let error = fails(&["--composites", "--objects", &objects], 2);
    assert!(error.contains("--photos"), "{error}");
    let both = ["--composites", "--objects", &objects, "--photos", &photos];
    let error = fails(&[&both[..], &["--size", "100"]].concat(), 2);
    assert!(error.contains("expected a multiple of 32 from 64 to 1024"), "{error}");
    let error = fails(&[&both[..], &["--percent", "0"]].concat(), 2);
    assert!(error.contains("expected a number above 0, at most 100"), "{error}");
    let error = fails(&[&both[..], &["--inits", "3"]].concat(), 2);
    assert!(error.contains("3 is not in 5..=1000"), "{error}");
    let error = fails(&["--voc", &photos, "--objects", &objects], 1);
    assert!(error.contains("--objects is for --composites"), "{error}");
    // What is of no use is refused, not left aside.
    for unused in [["--voc-splits", "trainval", "test"], ["--test-coco", "a.json", "a"]] {
        let error = fails(&[&both[..], &unused].concat(), 2);
        assert!(error.contains("cannot be used with"), "{error}");
    }
    let error = fails(&["--voc", &photos], 1);
    assert!(error.contains("ImageSets/Main/trainval.txt"), "{error}");
    let error = fails(&[&both[..], &["--detections", "nowhere/a.json"]].concat(), 1);
    assert!(error.contains("there is no folder nowhere"), "{error}");
    // Photos without classes are objects of no use.
    let flat = fixture.folder.path().join("flat");
    std::fs::create_dir(&flat).unwrap();
    for n in 0..6 {
        boxed(&flat.join(format!("{n}.png")), [1, 1, 5, 5]);
    }
    let shards = fixture.at("flat-shards");
    detco_ok(&["pack", path(&flat), &shards]);
    let error = fails(&["--composites", "--objects", &shards, "--photos", &photos], 1);
    assert!(error.contains("--objects: sample \"") && error.contains("has no class"), "{error}");
}

#[test]
fn unlabelled_scenes_are_shards() {
    let fixture = Fixture::new();
    let (objects, photos) = (fixture.at("objects"), fixture.at("photos"));
    let make = |out: &str, workers: &str| {
        let out = fixture.at(out);
        let args = [
            "data",
            "composites",
            "--objects",
            &objects,
            "--photos",
            &photos,
            "--count",
            "25",
            "-o",
            &out,
            "--size",
            "64",
            "--shard-size",
            "10",
            "--workers",
            workers,
        ];
        (detco_ok(&args), out)
    };
    let ((said, one), (_, three)) = (make("one", "1"), make("three", "3"));
    assert!(said.contains("25 scenes in 3 shards"), "{said}");
    for name in ["000000.tar", "000002.tar", "000001.idx", "manifest.json"] {
        let read = |folder: &str| std::fs::read(Path::new(folder).join(name)).unwrap();
        assert!(read(&one) == read(&three), "{name}");
    }
    detco_ok(&["verify", &one]);
    let error = detco_fails(
        &[
            "data",
            "composites",
            "--objects",
            &objects,
            "--photos",
            &photos,
            "--count",
            "1",
            "-o",
            &one,
        ],
        1,
    );
    assert!(error.contains("is not empty"), "{error}");
}
