//! Support vector machines against scikit-learn: the machine, its average precisions, and `detco eval svm` and
//! `detco eval lowshot` on a generated folder of PASCAL VOC, from pixels to figures.
#![cfg(feature = "train")]

mod export_oracle;
#[expect(dead_code, reason = "no images are packed here")]
mod support;

use std::path::{Path, PathBuf};

use detco::eval::svm::{Gram, minimise, precision};
use detco::model::Draws;
use export_oracle::run;
use serde_json::Value;
use support::{detco_fails, detco_ok, path};
use tch::{Kind, Tensor};

/// Rows `[n, d]` of unit length that tell `classes` apart badly, and targets `[n, classes]`.
fn generated(n: i64, d: i64, classes: i64) -> (Tensor, Tensor) {
    let draw = |name: &str, shape: &[i64]| Draws::new(7, name, 0).normal(shape, 1.0);
    let shows = draw("shows", &[n, classes]).gt(1.0).to_kind(Kind::Double);
    let centres = draw("centres", &[classes, d]).to_kind(Kind::Double) * 0.4;
    let rows = (draw("rows", &[n, d]).to_kind(Kind::Double) + shows.matmul(&centres)).relu();
    let length = rows.norm_scalaropt_dim(2.0, [1], true) + 1e-5;
    (rows / length, shows * 2.0 - 1.0)
}

fn numbers(of: &Tensor) -> Vec<f64> {
    Vec::try_from(of.contiguous().flatten(0, -1)).unwrap()
}

#[test]
fn machines_are_at_scikit_learns_minimum() {
    let folder = tempfile::tempdir().unwrap();
    let (all, targets) = generated(900, 256, 5);
    let costs = [0.01, 0.5, 10.0, 100.0];
    let (rows, test) = (all.narrow(0, 0, 600), all.narrow(0, 600, 300));
    let (targets, truth) = (targets.narrow(0, 0, 600), targets.narrow(0, 600, 300));
    let (file, out) = (folder.path().join("in"), folder.path().join("out"));
    let tensors = [
        ("rows", rows.contiguous()),
        ("targets", targets.contiguous()),
        ("test", test.contiguous()),
        ("costs", Tensor::from_slice(&costs)),
    ];
    Tensor::write_safetensors(&tensors, &file).unwrap();
    run("svm.py", &[&"machine", &file, &out]);
    let theirs = Tensor::read_safetensors(&out).unwrap();
    let of = |name: &str| &theirs.iter().find(|(found, _)| found == name).unwrap().1;

    let gram = Gram::of(&rows);
    let mut dual = None;
    let mut worst = [0.0_f64; 4];
    let map = |values: &Tensor| {
        let of_class = |class: i64| {
            let shows: Vec<bool> =
                numbers(&truth.select(1, class)).iter().map(|one| *one > 0.0).collect();
            precision::interpolated(&numbers(&values.select(1, class)), &shows).unwrap()
        };
        100.0 * (0..5).map(of_class).sum::<f64>() / 5.0
    };
    for (at, cost) in (0..).zip(costs) {
        let weights = (targets.gt(0.0).to_kind(Kind::Double) + 1.0) * cost;
        let fit = minimise(&gram, &targets, &weights, dual.as_ref()).unwrap();
        let ours = fit.decide(&rows, &test);
        for (place, name) in [(0, "exact"), (2, "published")] {
            let theirs = of(name).select(0, at).transpose(0, 1);
            let off = (&ours - &theirs).abs().amax([0], false) / theirs.abs().amax([0], false);
            worst[place] = worst[place].max(off.max().double_value(&[]));
            worst[place + 1] = worst[place + 1].max((map(&ours) - map(&theirs)).abs());
        }
        // From rows of all weights at once: those within the margin are the same.
        let alone = minimise(&gram, &targets, &weights, None).unwrap();
        let off = (&alone.decisions - &fit.decisions).abs().max().double_value(&[]);
        assert!(off < 1e-6, "from 0 and from a lower cost: {off:e} apart");
        dual = Some(fit.dual);
    }
    let [exact, exact_map, published, published_map] = worst;
    println!(
        "decision values, relative: {exact:.1e} and with the protocol's end {published:.1e}; mAP {exact_map:.4} and \
         {published_map:.4} points apart"
    );
    assert!(exact < 1e-5 && exact_map <= 0.01, "{exact:e}, {exact_map}");
    assert!(published < 5e-4 && published_map <= 0.05, "{published:e}, {published_map}");
}

#[test]
fn rows_without_weight_do_not_count() {
    let (rows, targets) = generated(90, 16, 2);
    let weights = targets.ones_like();
    weights.narrow(0, 60, 30).copy_(&weights.narrow(0, 60, 30).zeros_like());
    let all = minimise(&Gram::of(&rows), &targets, &weights, None).unwrap();
    let (rows, targets) = (rows.narrow(0, 0, 60), targets.narrow(0, 0, 60));
    let part = minimise(&Gram::of(&rows), &targets, &targets.ones_like(), None).unwrap();
    let off = (all.decisions.narrow(0, 0, 60) - part.decisions).abs().max().double_value(&[]);
    assert!(off < 1e-6, "{off:e}");
    let error = minimise(&Gram::of(&rows), &targets, &(&targets * f64::NAN), None).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    let error = minimise(&Gram::of(&rows), &weights, &weights, None).unwrap_err();
    assert!(error.to_string().contains("expected one row of each a row"), "{error}");
}

#[test]
fn average_precisions_are_those_of_their_definitions() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cases");
    let (cases, samples) = (200_i64, 60_i64);
    let draw = |name: &str| Draws::new(3, name, 0).normal(&[cases, samples], 1.0);
    // Half of the cases have no equal values; the area's order among equal ones is the samples'.
    let values = draw("values").to_kind(Kind::Double);
    let coarse = (values.narrow(0, 0, cases / 2) * 3.0).round();
    values.narrow(0, 0, cases / 2).copy_(&coarse);
    let positive = (draw("positive").to_kind(Kind::Double) + &values * 0.5).gt(0.8);
    positive.select(1, 0).copy_(&Tensor::ones([cases], (Kind::Bool, values.device())));
    let tensors =
        [("values", values.shallow_clone()), ("positive", positive.to_kind(Kind::Double))];
    Tensor::write_safetensors(&tensors, &file).unwrap();
    let theirs: Vec<[f64; 2]> =
        serde_json::from_str(&run("svm.py", &[&"precision", &file])).unwrap();
    for (case, [step, area]) in (0..).zip(theirs) {
        let shows: Vec<bool> = Vec::try_from(positive.select(0, case)).unwrap();
        let values = numbers(&values.select(0, case));
        let ours = precision::step_sum(&values, &shows).unwrap();
        assert!((ours - step).abs() < 1e-12, "case {case}: {ours}, scikit-learn {step}");
        let ours = precision::interpolated(&values, &shows).unwrap();
        assert!((ours - area).abs() < 1e-12, "case {case}: {ours}, by definition {area}");
    }
}

const CLASSES: [&str; 3] = ["boat", "cat", "tree"];

/// A picture whose classes are patches of a colour and pattern each, among noise.
fn picture(number: u64, shows: [bool; 3]) -> image::RgbImage {
    let mut draw = Draws::new(11, "picture", number);
    let mut below = |n: u64| draw.below(n) as u32;
    let (width, height) = (150 + below(120), 120 + below(150));
    let mut image = image::RgbImage::new(width, height);
    for pixel in image.pixels_mut() {
        *pixel = image::Rgb([0; 3].map(|_| 90 + below(60) as u8));
    }
    for class in (0..3).filter(|class| shows[*class as usize]) {
        let (left, top) = (below(u64::from(width) - 60), below(u64::from(height) - 60));
        for (x, y) in (0..60).flat_map(|x| (0..60).map(move |y| (x, y))) {
            let lit = [x / 6, y / 6, (x + y) / 8][class as usize] % 2 == 0;
            let color = [[250, 40, 60], [30, 220, 90], [60, 80, 250]][class as usize];
            let color = if lit { color } else { [below(200) as u8, 128, 20] };
            image.put_pixel(left + x, top + y, image::Rgb(color));
        }
    }
    image
}

/// A folder of PASCAL VOC with 54 images for training and 42 for the test, and a ResNet-18.
fn devkit() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let voc = folder.path().join("VOC2007");
    for name in ["ImageSets/Main", "JPEGImages"] {
        std::fs::create_dir_all(voc.join(name)).unwrap();
    }
    for (split, first, count) in [("trainval", 0, 54), ("test", 54, 42)] {
        let (mut list, mut files) = (String::new(), [const { String::new() }; 3]);
        for number in first..first + count {
            let mut draw = Draws::new(12, "labels", number);
            // 0 absent, 1 present, 2 difficult.
            let labels = [0; 3].map(|_| [0, 0, 0, 0, 0, 1, 1, 1, 2][draw.below(9) as usize]);
            let name = format!("{number:06}");
            // Difficult ones show their class half of the time, so that what becomes of them matters.
            let shows = labels.map(|label| label == 1 || label == 2 && number % 2 == 0);
            picture(number, shows).save(voc.join(format!("JPEGImages/{name}.jpg"))).unwrap();
            list += &format!("{name}\n");
            for (file, label) in files.iter_mut().zip(labels) {
                *file += &format!("{name} {:>2}\n", [-1, 1, 0][label]);
            }
        }
        let lists = voc.join("ImageSets/Main");
        std::fs::write(lists.join(format!("{split}.txt")), list).unwrap();
        for (class, text) in CLASSES.iter().zip(files) {
            std::fs::write(lists.join(format!("{class}_{split}.txt")), text).unwrap();
        }
    }
    let weights = folder.path().join("resnet18.safetensors");
    run("svm.py", &[&"weights", &weights]);
    (folder, voc, weights)
}

fn costs(list: &[f64]) -> String {
    list.iter().map(f64::to_string).collect::<Vec<_>>().join(",")
}

fn near(ours: &Value, theirs: &Value, within: f64, what: &str) {
    let (ours, theirs) = (ours.as_f64().unwrap(), theirs.as_f64().unwrap());
    assert!((ours - theirs).abs() <= within, "{what}: {ours}, scikit-learn {theirs}");
}

#[test]
fn the_program_follows_the_protocol_on_a_folder_of_voc() {
    let (_folder, voc, weights) = devkit();
    let list = detco::eval::svm::costs_openselfsup();
    let said = run("svm.py", &[&"protocol", &voc, &weights, &costs(&list)]);
    let forms: Value = serde_json::from_str(&said).unwrap();
    for difficult in ["as-published", "ignore"] {
        let args = [
            "eval",
            "svm",
            path(&weights),
            "--voc",
            path(&voc),
            "--difficult",
            difficult,
            "--json",
        ];
        let ours: Value = serde_json::from_str(&detco_ok(&args)).unwrap();
        let theirs = &forms[difficult];
        let level = &ours["levels"][0];
        assert!(level["level"] == 5 && level["features"] == 8192, "{ours}");
        for (class, name) in level["classes"].as_array().unwrap().iter().zip(CLASSES) {
            let theirs = &theirs[name];
            assert_eq!(class["class"], name);
            let cost = theirs["cost"].as_f64().unwrap();
            near(&class["cost"], &theirs["cost"], 1e-12 * cost, name);
            near(&class["ap"], &theirs["ap"], 0.05, name);
            let curves = [&class["cross_validation"], &theirs["curve"]];
            let [ours, theirs] = curves.map(|curve| curve.as_array().unwrap());
            assert_eq!(ours.len(), list.len());
            ours.iter().zip(theirs).for_each(|(ours, theirs)| near(ours, theirs, 0.05, name));
        }
        let mean =
            CLASSES.iter().map(|name| theirs[name]["ap"].as_f64().unwrap()).sum::<f64>() / 3.0;
        near(&ours["readings"][0]["value"], &mean.into(), 0.05, "mAP");
        println!("mAP {mean:.2}, difficult {difficult}");
        let protocol = if difficult == "ignore" { "svm-custom" } else { "svm-openselfsup" };
        assert_eq!(ours["protocol"], protocol);
    }
    let text = detco_ok(&["eval", "svm", path(&weights), "--voc", path(&voc), "--levels", "4,5"]);
    assert!(
        text.contains("Res4 mAP") && text.contains("Res5 mAP") && text.contains("tree"),
        "{text}"
    );
}

#[test]
fn low_shot_trials_have_scikit_learns_figures() {
    let (folder, voc, weights) = devkit();
    let samples = folder.path().join("samples");
    std::fs::create_dir(&samples).unwrap();
    let split = detco::eval::voc::Split::read(&voc, "trainval").unwrap();
    let mut files = Vec::new();
    for trial in 0..2 {
        let drawn = detco::eval::svm::lowshot::draw(&split.labels, 1, 9, trial).unwrap();
        let of_image = |row: usize| {
            let of_class = |(class, labels): (&String, &Vec<_>)| {
                let target = match labels[row] {
                    detco::eval::svm::Label::Present => 1,
                    detco::eval::svm::Label::Absent => 0,
                    detco::eval::svm::Label::Difficult => -1,
                };
                (class.clone(), Value::from(target))
            };
            let all = split.classes.iter().zip(&drawn).map(of_class).collect();
            (split.images[row].clone(), Value::Object(all))
        };
        let all: serde_json::Map<_, _> = (0..split.images.len()).map(of_image).collect();
        let file = samples.join(format!("train_targets_sample{}_k1.json", trial + 1));
        std::fs::write(&file, Value::Object(all).to_string()).unwrap();
        files.push(file);
    }
    let common =
        ["eval", "lowshot", path(&weights), "--voc", path(&voc), "--k", "1", "--trials", "2"];
    let run_with = |more: &[&str]| -> Value {
        serde_json::from_str(&detco_ok(&[&common[..], &["--json"], more].concat())).unwrap()
    };
    let ours = run_with(&["--samples", path(&samples)]);
    let list = detco::eval::svm::costs_openselfsup();
    let said = {
        let costs = costs(&list);
        run("svm.py", &[&"lowshot", &voc, &weights, &costs, &"1", &files[0], &files[1]])
    };
    let theirs: Vec<Vec<f64>> = serde_json::from_str(&said).unwrap();
    let shots = &ours["levels"][0]["shots"][0];
    for (at, ours) in shots["curve"].as_array().unwrap().iter().enumerate() {
        near(ours, &((theirs[0][at] + theirs[1][at]) / 2.0).into(), 0.05, "mean over trials");
    }
    for (trial, theirs) in theirs.iter().enumerate() {
        near(&shots["fixed"]["trials"][trial], &theirs[list.len()].into(), 0.05, "C = 1");
    }
    let mut means: Vec<f64> =
        shots["curve"].as_array().unwrap().iter().flat_map(Value::as_f64).collect();
    means.sort_by(f64::total_cmp);
    near(&shots["test"]["mean"], &means[means.len() - 1].into(), 1e-9, "the best in the test");
    // The same draws by the program itself.
    let drawn = run_with(&["--seed", "9"]);
    assert_eq!(drawn["levels"], ours["levels"]);
    assert_ne!(run_with(&["--seed", "8"])["levels"], ours["levels"]);

    let error = detco_fails(&[&common[..6], &["96"]].concat(), 1);
    assert!(error.contains("are fewer than k = 96 and 19 k = 1824"), "{error}");
    let error = detco_fails(&[&common[..], &["--samples", path(&voc)]].concat(), 1);
    assert!(error.contains("train_targets_sample1_k1.json"), "{error}");
}

#[test]
fn a_folder_that_is_none_is_said() {
    let (_folder, voc, weights) = devkit();
    let lists = voc.join("ImageSets/Main");
    let fails = |voc: &Path| detco_fails(&["eval", "svm", path(&weights), "--voc", path(voc)], 1);
    let restore = |name: &str, text: &str, expected: &str| {
        let file = lists.join(name);
        let before = std::fs::read(&file).ok();
        std::fs::write(&file, text).unwrap();
        let error = fails(&voc);
        assert!(error.contains(expected), "{name}: {error}");
        match before {
            Some(before) => std::fs::write(&file, before).unwrap(),
            None => std::fs::remove_file(&file).unwrap(),
        }
    };
    assert!(fails(&lists).contains("trainval.txt"));
    restore(
        "cat_trainval.txt",
        "000000 yes\n",
        "cat_trainval.txt: line 1: expected an image and 1, -1 or 0",
    );
    restore("cat_trainval.txt", "999999 1\n", "line 1: image 999999 is not in the split's list");
    restore("cat_trainval.txt", "000000 1\n000000 1\n", "line 2: image 000000 is listed twice");
    restore("cat_trainval.txt", "000000 1\n", "image 000001: is not listed here");
    let absent: String = (0..54).map(|n| format!("{n:06} -1\n")).collect();
    restore("dog_trainval.txt", &absent, "there is dog_trainval.txt and no dog_test.txt");
    restore(
        "cat_trainval.txt",
        &absent,
        "0 with the class and 54 without: cross-validation in 3 folds",
    );
    // An image of both sets.
    let twice = voc.join("JPEGImages/000054.jpg");
    std::fs::copy(voc.join("JPEGImages/000003.jpg"), &twice).unwrap();
    let error = fails(&voc);
    assert!(error.contains("000054.jpg and") && error.contains("are the same file"), "{error}");
    std::fs::write(&twice, b"no picture").unwrap();
    let error = fails(&voc);
    assert!(error.contains("000054.jpg: "), "{error}");
}
