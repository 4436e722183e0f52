//! Linear classifiers against PyTorch, and `detco eval features`, `linear` and `compare` end to end.
#![cfg(feature = "train")]

mod export_oracle;
mod support;

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};

use detco::eval::features::Pool;
use detco::eval::linear::heads::{Heads, Training};
use detco::eval::linear::newton::{Problem, Until};
use export_oracle::run;
use serde_json::{Value, json};
use support::{DETCO, detco_fails, detco_ok, path, shards};
use tch::{Device, Kind, Tensor, kind::FLOAT_CPU};

/// The largest difference, relative to the largest element.
fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let difference = (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max();
    f64::try_from(difference / b.to_kind(Kind::Double).abs().max().clamp_min(1e-30)).unwrap()
}

fn read(file: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(file).unwrap().into_iter().collect()
}

/// Clusters that overlap: rows `[n, d]` around the centres of their classes.
fn clusters(shape: &[i64], classes: i64, kind: Kind) -> (Tensor, Tensor) {
    let d = *shape.last().unwrap();
    let centres = Tensor::randn([classes, d], FLOAT_CPU) * 0.5;
    let of = Tensor::randint(classes, &shape[..shape.len() - 1], (Kind::Int64, Device::Cpu));
    let rows =
        centres.index_select(0, &of.flatten(0, -1)).view(shape) + Tensor::randn(shape, FLOAT_CPU);
    (rows.to_kind(kind), of)
}

#[test]
fn fifty_updates_are_pytorchs() {
    tch::manual_seed(5);
    let folder = tempfile::tempdir().unwrap();
    let (given, found) =
        (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    for (kind, bound) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        for (norm, nesterov, weight_decay) in [(false, false, 0.0), (true, true, 1e-4)] {
            let (rows, classes) = clusters(&[50, 32, 24], 7, kind);
            let rows = rows * 0.5;
            // The largest ones do not yet throw weights to and fro, which would make rounding large.
            let rates = if norm { vec![0.001, 0.01, 0.1] } else { vec![0.01, 1.0, 10.0] };
            let training =
                Training { rates: rates.clone(), momentum: 0.9, nesterov, weight_decay, norm };
            let mut heads =
                Heads::draw(training, (7, 24), (3, "test"), (kind, Device::Cpu)).unwrap();
            let [(_, weight), ..] = heads.tensors();
            let weight = weight.get(0).copy();
            let std = f64::try_from(weight.std(true)).unwrap();
            assert!((0.007..0.013).contains(&std), "drawn with a standard deviation of {std}");
            Tensor::write_safetensors(
                &[("rows", &rows), ("classes", &classes), ("weight", &weight)],
                &given,
            )
            .unwrap();
            let factors: Vec<f64> = (0..50).map(|step| if step < 30 { 1.0 } else { 0.1 }).collect();
            let settings = json!({
                "rates": rates, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay,
                "norm": norm, "factors": factors,
            });
            run("linear.py", &[&"sgd", &given, &found, &settings.to_string()]);
            let mut losses = Vec::new();
            for (step, factor) in factors.iter().enumerate() {
                let step = step as i64;
                losses = heads.step(&rows.get(step), &classes.get(step), *factor).unwrap();
            }
            let theirs = read(&found);
            let logits = heads.logits(&rows.get(0)).unwrap();
            let [(_, weight), (_, bias), ..] = heads.tensors();
            for (i, loss) in losses.iter().enumerate() {
                let what = format!("{kind:?}, norm {norm}, rate {}", rates[i]);
                let at = i as i64;
                let errors = [
                    error(&weight.get(at), &theirs[&format!("weight.{i}")]),
                    error(&bias.get(at), &theirs[&format!("bias.{i}")]),
                    error(&logits.select(1, at), &theirs[&format!("logits.{i}")]),
                    error(&Tensor::from_slice(&[*loss]), &theirs[&format!("loss.{i}")]),
                ];
                assert!(errors.iter().all(|error| *error < bound), "{what}: {errors:?}");
            }
        }
    }
}

#[test]
fn logistic_regression_is_at_pytorchs_minimum() {
    tch::manual_seed(11);
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("in.safetensors");
    let (rows, classes) = clusters(&[600, 20], 5, Kind::Double);
    let (test, _) = clusters(&[1000, 20], 5, Kind::Double);
    Tensor::write_safetensors(&[("rows", &rows), ("classes", &classes), ("test", &test)], &given)
        .unwrap();
    for cost in [0.001, 0.1, 10.0] {
        let said = run("linear.py", &[&"logistic", &given, &cost.to_string()]);
        let said: Value = serde_json::from_str(&said).unwrap();
        let problem = Problem { rows: &rows, classes: &classes, count: 5, cost };
        let fitted = problem.fit(None, Until { gradient: 1e-10, steps: 100 }).unwrap();
        assert!(fitted.gradient <= 1e-10, "C = {cost}: a gradient of {}", fitted.gradient);
        let theirs = said["objective"].as_f64().unwrap();
        assert!(fitted.objective <= theirs + 1e-9, "C = {cost}: {} for {theirs}", fitted.objective);
        assert!(
            (fitted.objective - theirs).abs() < 1e-6 * theirs,
            "{} for {theirs}",
            fitted.objective
        );
        let ours = Vec::<i64>::try_from(fitted.logits(&test).unwrap().argmax(1, false)).unwrap();
        let same = said["predictions"].as_array().unwrap().iter().zip(&ours);
        let same = same.filter(|(theirs, ours)| theirs.as_i64() == Some(**ours)).count();
        assert!(same >= 999, "C = {cost}: {same} of 1,000 predictions");
        // Rows in float32, and from another start: the same minimum.
        let rows = rows.to_kind(Kind::Float);
        let problem = Problem { rows: &rows, classes: &classes, count: 5, cost };
        let start = fitted.theta.randn_like();
        let other = problem.fit(Some(&start), Until { gradient: 1e-10, steps: 200 }).unwrap();
        assert!((other.objective - fitted.objective).abs() < 1e-6, "{}", other.objective);
    }
}

#[test]
fn pooled_maps_are_pytorchs() {
    let folder = tempfile::tempdir().unwrap();
    let (given, found) =
        (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let usual =
        [("res2", 256, 56, 6), ("res3", 512, 28, 4), ("res4", 1024, 14, 3), ("res5", 2048, 7, 2)];
    let odd =
        [("res2", 64, 32, 12), ("res3", 128, 16, 8), ("res4", 256, 8, 6), ("res5", 512, 2, 2)];
    let mut maps = Vec::new();
    for (name, c, side, _) in usual {
        maps.push((name.to_owned(), Tensor::randn([2, c, side, side], FLOAT_CPU)));
    }
    for (name, c, side, _) in odd {
        maps.push((format!("{name}.odd"), Tensor::randn([2, c, side, side], FLOAT_CPU)));
    }
    Tensor::write_safetensors(&maps, &given).unwrap();
    run("linear.py", &[&"pool", &given, &found]);
    let theirs = read(&found);
    for ((name, map), (_, c, _, side)) in maps.iter().zip(usual.iter().chain(&odd)) {
        let ours = Pool::Grid.rows(map).unwrap();
        assert_eq!(ours.size(), [2, c * side * side], "{name}");
        assert!(error(&ours, &theirs[name]) < 1e-5, "{name}");
        let average = Pool::Average.rows(map).unwrap();
        assert!(error(&average, &map.mean_dim(&[2_i64, 3][..], false, None)) < 1e-5, "{name}");
    }
}

/// An untrained backbone and two labelled sets.
struct World {
    folder: tempfile::TempDir,
    _sets: [tempfile::TempDir; 2],
    train: String,
    test: String,
    weights: String,
}

fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let ((of_train, train), (of_test, test)) = (shards(24), shards(6));
    let sets = ["model.width=8".to_owned()];
    let config = detco::config::Config::load("detco-small", &sets).unwrap();
    let model = detco::model::Model::bare(&config, Device::Cpu).unwrap();
    let weights = folder.path().join("weights.safetensors");
    let (format, origin) = (detco::export::Format::Torchvision, detco::export::Origin::default());
    detco::export::write(&weights, format, &model.query.backbone_tensors(), &origin).unwrap();
    let [train, test, weights] = [train, test, weights].map(|at| path(&at).to_owned());
    World { folder, _sets: [of_train, of_test], train, test, weights }
}

/// Killed after its first epochs, a probe goes on from there and finds what one finds that nobody killed.
fn goes_on_after_a_kill(world: &World, sets: &[&str], state: &str) {
    let long = ["--protocol", "moco", "--batch", "16", "--rates", "0.3,30", "--epochs", "60"];
    let command = [&["eval", "linear", &world.weights][..], &long, sets].concat();
    let with_state = [&command[..], &["--state", state]].concat();
    let mut child = Command::new(DETCO);
    child.args(&with_state).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = child.spawn().unwrap();
    while !Path::new(state).join("linear.safetensors").exists() {
        assert_eq!(child.try_wait().unwrap(), None, "it ends before its first epoch is kept");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let output = support::detco(&with_state);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("going on from"), "{said}");
    assert!(!said.contains("after epoch 60"), "the kill came too late: {said}");
    let resumed = parsed(&String::from_utf8_lossy(&output.stdout));
    let whole = parsed(&detco_ok(&command));
    assert_eq!((&resumed["readings"], &resumed["levels"]), (&whole["readings"], &whole["levels"]));
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn commands_measure_the_same_backbone() {
    let world = world();
    let at = |name: &str| path(&world.folder.path().join(name)).to_owned();
    let sets = ["--train", &world.train, "--test", &world.test, "--json"];
    let eval = |how: &[&str]| {
        parsed(&detco_ok(&[&["eval", "linear", &world.weights][..], how, &sets].concat()))
    };

    // Features are what the network gives, whatever the number of workers; a second file has the same bytes.
    let features = |name: &str, workers: &str| {
        let file = at(name);
        let levels = ["--levels", "2,3,4,5", "--pool", "grid", "--workers", workers];
        let command = ["eval", "features", &world.weights, "--data", &world.train, "-o", &file];
        let said = detco_ok(&[&command[..], &levels].concat());
        (file, said)
    };
    let (first, said) = features("a.safetensors", "1");
    assert!(said.contains("96 samples") && said.contains("res2"), "{said}");
    let (second, _) = features("b.safetensors", "3");
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
    let found = read(Path::new(&first));
    assert_eq!(found["labels"].size(), [96]);
    let keys = Vec::<u8>::try_from(&found["keys"]).unwrap();
    assert_eq!(keys.iter().filter(|byte| **byte == 0).count(), 96);
    let mut labels = Vec::<i64>::try_from(&found["labels"]).unwrap();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels, [0, 1, 2, 3]);

    // Stripes of four directions: untrained features tell most of them apart.
    let cached = eval(&["--costs", "0.1,10", "--levels", "2,5"]);
    let reading = |report: &Value, name: &str| {
        let readings = report["readings"].as_array().unwrap().clone();
        readings.into_iter().find(|reading| reading["name"] == name).unwrap()
    };
    assert_eq!(cached["protocol"], "linear-cached");
    let top1 = reading(&cached, "res5/top1");
    assert!(top1["value"].as_f64().unwrap() > 60.0, "{top1}");
    assert_eq!(top1["samples"].as_array().unwrap().len(), 24);
    assert_eq!(cached["levels"]["res2"]["tried"].as_array().unwrap().len(), 2);

    let short = ["--protocol", "moco", "--batch", "16", "--rates", "0.3,30"];
    let whole = eval(&[&short[..], &["--epochs", "4"]].concat());
    assert_eq!(whole["settings"]["milestones"], json!([3, 4]));
    let state = at("state");
    let kept = eval(&[&short[..], &["--epochs", "4", "--state", &state]].concat());
    assert_eq!(kept["readings"], whole["readings"]);
    let again = eval(&[&short[..], &["--epochs", "4", "--state", &state]].concat());
    assert_eq!(again, kept);
    goes_on_after_a_kill(&world, &sets, &at("killed"));
    let command = [
        "eval",
        "linear",
        &world.weights,
        "--protocol",
        "moco",
        "--epochs",
        "5",
        "--state",
        &state,
    ];
    let said = detco_fails(&[&command[..], &sets].concat(), 1);
    assert!(said.contains("is the state of another evaluation"), "{said}");

    let levels = eval(&["--protocol", "levels", "--epochs", "2", "--batch", "32"]);
    assert_eq!(levels["readings"].as_array().unwrap().len(), 4);
    assert_eq!(levels["sha256"], cached["sha256"]);

    // Compared with itself nothing differs; unlike protocols are refused.
    let file = |name: &str, report: &Value| {
        std::fs::write(at(name), report.to_string()).unwrap();
        at(name)
    };
    let (a, b) = (file("a.json", &cached), file("b.json", &whole));
    let said = parsed(&detco_ok(&["eval", "compare", &a, &a, "--json"]));
    for difference in said["others"][0]["differences"].as_array().unwrap() {
        assert_eq!((&difference["value"], &difference["pairs"]), (&json!(0.0), &json!(24)));
    }
    let said = detco_fails(&["eval", "compare", &a, &b], 1);
    assert!(said.contains("linear-moco") && said.contains("not compared"), "{said}");
    let said =
        detco_fails(&[&["eval", "linear", &world.weights, "--rates", "1"][..], &sets].concat(), 1);
    assert!(said.contains("--rates is for the protocols moco and levels"), "{said}");
}
