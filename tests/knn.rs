//! The kNN monitor against an independent implementation, and end to end from shards.
#![cfg(feature = "train")]

mod export_oracle;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use detco::checkpoint;
use detco::config::Config;
use detco::eval::features::{FeaturesError, Look};
use detco::eval::knn::{self, Features, KnnError, KnnOptions, Report};
use detco::model::Model;
use detco_shards::order::Cursor;
use detco_shards::stream::ShardSet;
use export_oracle::run;
use tch::{Device, Kind, Tensor, kind::FLOAT_CPU};

struct Case {
    train: (Tensor, Tensor),
    test: (Tensor, Tensor),
}

fn rust(case: &Case, k: usize, t: f64) -> Report {
    let features = |(rows, classes): &(Tensor, Tensor), which| {
        let classes = Vec::<i64>::try_from(classes).unwrap();
        Features::new(rows, classes.into_iter().map(|class| class as u32).collect(), which).unwrap()
    };
    knn::classify(&features(&case.train, "train"), &features(&case.test, "test"), k, t).unwrap()
}

/// What the oracle says, and how many queries are too close to call in `f32`.
fn python(case: &Case, k: usize, t: f64) -> (f64, f64, u64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.safetensors");
    let tensors = [
        ("train_features", &case.train.0),
        ("train_classes", &case.train.1),
        ("test_features", &case.test.0),
        ("test_classes", &case.test.1),
    ];
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let said = run("knn_reference.py", &[&path, &k.to_string(), &t.to_string()]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let number = |name: &str| said[name].as_f64().unwrap();
    (number("top1"), number("top5"), said["close"].as_u64().unwrap())
}

/// Features around class centres, as far apart as `signal` says.
fn clusters(m: i64, n: i64, classes: i64, signal: f64) -> Case {
    let centres = Tensor::randn([classes, 32], FLOAT_CPU) * signal;
    let set = |rows: i64| {
        let of = Tensor::randint(classes, [rows], (Kind::Int64, Device::Cpu));
        (centres.index_select(0, &of) + Tensor::randn([rows, 32], FLOAT_CPU), of)
    };
    let (train, test) = (set(m), set(n));
    Case { train, test }
}

#[test]
fn percentages_are_those_of_an_independent_implementation() {
    tch::manual_seed(11);
    for (m, n, classes, signal, k, t) in [
        (900, 600, 10, 0.35, 200, 0.1),
        (900, 300, 40, 0.5, 20, 0.07),
        (150, 300, 7, 0.3, 200, 0.5), // fewer in memory than k
        (400, 300, 3, 0.2, 1, 0.1),
    ] {
        let case = clusters(m, n, classes, signal);
        let report = rust(&case, k, t);
        let (top1, top5, close) = python(&case, k, t);
        // Each query that is too close to call may go either way.
        let slack = 100.0 * close as f64 / n as f64 + 1e-9;
        assert!(close <= 2, "{close} of {n} queries are too close to call");
        assert!((report.top1 - top1).abs() <= slack, "top-1 {} and {top1}", report.top1);
        assert!((10.0..99.0).contains(&top1), "{top1} % tells right from wrong badly");
        match report.top5 {
            Some(mine) => assert!((mine - top5).abs() <= slack, "top-5 {mine} and {top5}"),
            None => assert!(classes <= 5),
        }
        assert_eq!(report.k, k.min(m as usize));
        assert_eq!((report.memory, report.queries), (m as usize, n as usize));
        assert_eq!(report.classes, classes as usize);
    }
}

/// Features from four directions: everything ties, also across the blocks the memory is cut into.
#[test]
fn ties_are_decided_alike() {
    tch::manual_seed(12);
    let directions = Tensor::eye(4, FLOAT_CPU);
    let integers = |high: i64, n: i64| Tensor::randint(high, [n], (Kind::Int64, Device::Cpu));
    for (m, n) in [(300, 150), (70_000, 20)] {
        let set = |n: i64| (directions.index_select(0, &integers(4, n)), integers(12, n));
        let case = Case { train: set(m), test: set(n) };
        for k in [1, 7, 200] {
            let report = rust(&case, k, 0.1);
            let (top1, top5, _) = python(&case, k, 0.1);
            assert_eq!((report.top1, report.top5), (top1, Some(top5)), "m = {m}, k = {k}");
            assert_eq!(report, rust(&case, k, 0.1), "the same again");
        }
    }
}

/// A JPEG whose look is its class: stripes of that many pixels and more.
fn picture(look: usize) -> Vec<u8> {
    let width = look as u32 + 2;
    let image = image::RgbImage::from_fn(48, 48, |x, y| {
        let light = if (x / width + y / (16 - width)).is_multiple_of(2) { 40 } else { 220 };
        image::Rgb([light, (20 * width) as u8, 255 - light])
    });
    let mut jpeg = std::io::Cursor::new(Vec::new());
    image.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    jpeg.into_inner()
}

/// A tar of JPEGs: three classes told apart by colour, with `.cls` members unless `bare`.
fn shard(path: &Path, seed: u32, each: u32, bare: bool) {
    let samples = (0..3 * each).map(|i| {
        let class = i % 3;
        let image = image::RgbImage::from_fn(40, 36, |x, y| {
            let noise =
                (x * 7919 + y * 104_729 + (i + seed) * 31_337).wrapping_mul(2_654_435_761) >> 26;
            let mut pixel = [60 + noise as u8; 3];
            pixel[class as usize] += 90;
            image::Rgb(pixel)
        });
        let mut jpeg = std::io::Cursor::new(Vec::new());
        image.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
        (jpeg.into_inner(), (!bare).then_some(class))
    });
    tar(path, samples);
}

/// A tar of these JPEGs, with `.cls` members where there are classes.
fn tar(path: &Path, samples: impl Iterator<Item = (Vec<u8>, Option<u32>)>) {
    let mut tar = Vec::new();
    let mut member = |name: String, data: &[u8]| {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..124].copy_from_slice(b"0000000\x000000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend(header);
        tar.extend(data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    };
    for (i, (jpeg, class)) in samples.enumerate() {
        member(format!("{i:04}.jpg"), &jpeg);
        if let Some(class) = class {
            member(format!("{i:04}.cls"), class.to_string().as_bytes());
        }
    }
    tar.resize(tar.len() + 1024, 0);
    std::fs::write(path, tar).unwrap();
}

fn small() -> Config {
    let sets = ["model.backbone=resnet18", "model.width=8", "model.stem=cifar", "train.device=cpu"];
    let sets: Vec<String> = sets.into_iter().map(String::from).collect();
    Config::load("moco-v2-small", &sets).unwrap()
}

#[test]
fn shards_are_classified_end_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    shard(&path("train.tar"), 1, 40, false);
    shard(&path("test.tar"), 1000, 15, false);
    shard(&path("bare.tar"), 1, 2, true);
    let open =
        |name: &str| Arc::new(ShardSet::open(&[path(name).to_str().unwrap().to_string()]).unwrap());
    let (train, test, bare) = (open("train.tar"), open("test.tar"), open("bare.tar"));
    let model = Model::new(&small(), Device::Cpu).unwrap();
    let look = Look { size: 32, workers: 1, ..Look::default() };
    let options = KnnOptions { k: 20, look, batch: 16, ..KnnOptions::default() };
    let report = knn::evaluate(&model.query, &train, &test, &options).unwrap();
    assert_eq!((report.memory, report.queries, report.classes), (120, 45, 3));
    // Colour survives random convolutions.
    assert!(report.top1 > 90.0, "{report:?}");
    of_each_level(&model, (&train, &test), &options);
    // Neither batches nor workers change the figure; a part is a part.
    let look = Look { workers: 3, ..options.look.clone() };
    let other = KnnOptions { batch: 7, look, ..options.clone() };
    assert_eq!(knn::evaluate(&model.query, &train, &test, &other).unwrap(), report);
    let part = KnnOptions { samples_max: 31, ..options.clone() };
    let report = knn::evaluate(&model.query, &train, &test, &part).unwrap();
    assert_eq!((report.memory, report.queries, report.k), (31, 31, 20));
    assert_eq!(report.classes, 3);
    let error = knn::evaluate(&model.query, &train, &bare, &options).unwrap_err();
    let KnnError::Features(FeaturesError::NoClass { which: "test", key, .. }) = &error else {
        panic!("{error}")
    };
    assert_eq!(key, "0000");
    assert!(error.to_string().contains("bare.tar"), "{error}");

    command_line(&path, &model);
}

/// The figure on a stage's map is that of its maps' means, and a stage without a map is refused.
fn of_each_level(
    model: &Model,
    (train, test): (&Arc<ShardSet>, &Arc<ShardSet>),
    options: &KnnOptions,
) {
    let draws = |n: i64| Tensor::randn([n, 3, 32, 32], FLOAT_CPU);
    let mut figures = Vec::new();
    for level in 2..=5_u8 {
        let images = draws(5);
        let map = &model.query.maps(&images).unwrap()[usize::from(level) - 2];
        let mean = map.mean_dim(&[2_i64, 3][..], false, Kind::Float);
        let features = model.query.features_at(&images, level).unwrap();
        assert_eq!(features.size(), mean.size());
        let off = (&features - &mean).abs().max().double_value(&[]);
        assert!(off <= 1e-6 * mean.abs().max().double_value(&[]), "Res{level}: {off}");
        let options = KnnOptions { level, ..options.clone() };
        let report = knn::evaluate(&model.query, train, test, &options).unwrap();
        assert!(report.top1 > 80.0, "Res{level}: {report:?}");
        figures.push(report);
    }
    assert_eq!(figures[3], knn::evaluate(&model.query, train, test, options).unwrap());
    for level in [0, 1, 6] {
        let options = KnnOptions { level, ..options.clone() };
        let error = knn::evaluate(&model.query, train, test, &options).unwrap_err();
        assert!(matches!(error, KnnError::Level { .. }), "{error}");
    }
}

fn detco(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_detco")).args(arguments).output().unwrap()
}

/// `detco eval knn` of a weights file and of a run's initial weights.
fn command_line(path: &dyn Fn(&str) -> std::path::PathBuf, model: &Model) {
    let text = |name: &str| path(name).to_str().unwrap().to_string();
    let weights = path("weights.safetensors");
    detco::export::write(
        &weights,
        detco::export::Format::Torchvision,
        &model.query.backbone_tensors(),
        &detco::export::Origin::default(),
    )
    .unwrap();
    let run = path("run");
    trained(&run, small());
    // What somebody makes of the run's copy of its configuration is not what the run began with.
    let mut edited = small();
    edited.seed += 1;
    edited.model.width = 16;
    std::fs::write(run.join("config.toml"), edited.to_toml()).unwrap();
    let none = path("none");
    std::fs::create_dir(&none).unwrap();
    std::fs::write(none.join("config.toml"), small().to_toml()).unwrap();
    let (train, test) = (text("train.tar"), text("test.tar"));
    let sets = ["--train", &train, "--test", &test, "-k", "300", "--json"];
    let json = |what: &[&str]| -> serde_json::Value {
        let output = detco(&[&["eval", "knn"], what, &sets].concat());
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{complaint}");
        assert!(complaint.contains("k = 120, not 300"), "{complaint}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let of_file = json(&[weights.to_str().unwrap(), "--size", "64"]);
    let of_run = json(&[run.to_str().unwrap(), "--init"]);
    assert_eq!(of_file["top1"], of_run["top1"]);
    assert_eq!(of_run["classes"], 3);
    // With other weights in the checkpoint, the initial ones are still the configuration's.
    let trained = json(&[run.to_str().unwrap()]);
    assert_ne!(trained["top1"], of_run["top1"]);
    // Without one, the copy is all there is.
    let of_none = json(&[none.to_str().unwrap(), "--init"]);
    assert_eq!(of_none["top1"], of_run["top1"]);
    let none = none.to_str().unwrap();
    let output = detco(&["eval", "knn", none, "--train", &train, "--test", &test]);
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("checkpoint"), "{complaint}");
}

/// A run whose newest checkpoint holds a network that sees nothing: all of its weights are zero.
fn trained(run: &Path, config: Config) {
    let mut tensors = Model::new(&config, Device::Cpu).unwrap().tensors();
    for (_, tensor) in &mut tensors {
        *tensor = tensor.zeros_like();
    }
    let state = checkpoint::State {
        config,
        cursor: Cursor { epoch: 1, step: 0 },
        step: 7,
        fingerprint: 1,
        ranks: 1,
        collapsing: Vec::new(),
        samples: 1,
    };
    checkpoint::save(run, &state, &tensors, &[]).unwrap();
}

/// Class folders packed apart: a test set without one of the classes, with one more, and folders that
/// are numbers beside shards that have numbers alone.
#[test]
fn classes_are_compared_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_string();
    let pack = |name: &str, classes: &[(&str, usize)], each: usize| {
        for (class, look) in classes {
            let of = path(name).join(class);
            std::fs::create_dir_all(&of).unwrap();
            for i in 0..each {
                std::fs::write(of.join(format!("{i}.jpg")), picture(*look)).unwrap();
            }
        }
        let (from, to) = (text(name), text(&format!("{name}-packed")));
        let output = detco(&["pack", &from, &to]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        to
    };
    let weights = path("weights.safetensors");
    let model = Model::new(&small(), Device::Cpu).unwrap();
    let tensors = model.query.backbone_tensors();
    let (format, origin) = (detco::export::Format::Torchvision, detco::export::Origin::default());
    detco::export::write(&weights, format, &tensors, &origin).unwrap();
    let knn = |train: &str, test: &str| {
        let weights = weights.to_str().unwrap();
        let output =
            detco(&["eval", "knn", weights, "--train", train, "--test", test, "-k", "1", "--json"]);
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = serde_json::from_slice::<serde_json::Value>(&output.stdout);
        (said.ok(), complaint, output.status.code())
    };
    // The pictures of a class are all alike, so that only a wrong class is a wrong answer.
    let train = pack("train", &[("cat", 0), ("dog", 1), ("fox", 2)], 2);
    let fewer = pack("fewer", &[("cat", 0), ("fox", 2)], 2);
    let (said, complaint, _) = knn(&train, &fewer);
    assert_eq!(said.unwrap()["top1"], 100.0, "{complaint}");
    assert!(!complaint.contains("warning"), "{complaint}");
    let more = pack("more", &[("cat", 0), ("fox", 2), ("owl", 3), ("yak", 4)], 1);
    let (said, complaint, _) = knn(&train, &more);
    let said = said.unwrap();
    assert_eq!((said["top1"].as_f64(), said["unknown"].as_u64()), (Some(50.0), Some(2)));
    assert!(
        complaint.contains("2 classes of the test set are not in the train set"),
        "{complaint}"
    );
    assert!(complaint.contains("owl, yak") && complaint.contains("2 test samples"), "{complaint}");
    let others = pack("others", &[("n01", 0), ("n02", 1)], 1);
    let (_, complaint, code) = knn(&train, &others);
    assert_eq!(code, Some(1), "{complaint}");
    assert!(complaint.contains("cat, dog, fox there, n01, n02 here"), "{complaint}");
    // Twelve folders of numbers, sorted as text, against shards whose classes are those numbers.
    let numbers: Vec<String> = (0..12).map(|class| class.to_string()).collect();
    let numbers: Vec<(&str, usize)> =
        numbers.iter().zip(0..).map(|(class, look)| (class.as_str(), look)).collect();
    let folders = pack("numbers", &numbers, 2);
    tar(&path("numbers.tar"), (0..24).map(|i| (picture(i % 12), Some(i as u32 % 12))));
    let bare = text("numbers.tar");
    for (train, test) in [(&bare, &folders), (&folders, &bare), (&folders, &folders)] {
        let (said, complaint, _) = knn(train, test);
        assert_eq!(said.unwrap()["top1"], 100.0, "{complaint}");
        assert!(!complaint.contains("warning"), "{complaint}");
    }
    let (said, complaint, _) = knn(&bare, &train);
    assert!(said.is_some() && complaint.contains("could not be compared"), "{complaint}");
    monitor(&[&train, &fewer, &others]);
}

/// The monitor's sets are compared when a run starts, and by `--dry-run`.
fn monitor(sets: &[&str; 3]) {
    let [train, fewer, others] = sets;
    let dry = |test: &str| {
        let test = format!("monitor.knn_test=['{test}']");
        let sets =
            ["--set", "train.batch=4", "--set", "model.bn_splits=2", "--set", "method.queue=8"];
        let monitor = ["--set", "monitor.knn_every_epochs=1", "--set", &test, "--dry-run"];
        let start = ["train", "moco-v2-small", "--data", train, "--set", "train.device=cpu"];
        let output = detco(&[&start[..], &sets, &monitor].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, complaint) = dry(fewer);
    assert_eq!(code, Some(0), "{complaint}");
    let (code, complaint) = dry(others);
    assert_eq!(code, Some(1), "{complaint}");
    assert!(complaint.contains("the kNN monitor failed: no class of the test set"), "{complaint}");
}
