//! Statistics of batch normalisation computed anew: against torch's `update_bn`, and by the commands that offer it.
#![cfg(feature = "train")]

mod export_oracle;
mod support;

use std::collections::HashMap;
use std::sync::Arc;

use detco::config::Config;
use detco::eval::digest;
use detco::eval::features::{FeaturesError, Look, recompute_bn};
use detco::model::{Draws, Model};
use detco::shim::ShimError;
use detco_shards::stream::ShardSet;
use serde_json::Value;
use support::{detco_fails, detco_ok, images, path, shards};
use tch::{Device, Kind, Tensor};

fn model(sets: &[&str]) -> Model {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Model::bare(&Config::load("moco-v2-small", &sets).unwrap(), Device::Cpu).unwrap()
}

fn pixels(batch: u64, n: i64) -> Tensor {
    let shift = Draws::new(2, "shift", batch).normal(&[1, 3, 1, 1], 1.0);
    Draws::new(1, "images", batch).normal(&[n, 3, 64, 64], 1.0) + shift
}

/// Batches of different sizes count alike, as they do for torch; both layouts of memory.
#[test]
fn statistics_are_those_of_torchs_update_bn() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("in"), folder.path().join("out"));
    for layout in ["channels-first", "channels-last"] {
        let mut model = model(&["model.width=64", &format!("train.layout={layout}")]);
        let before: HashMap<String, Tensor> = model
            .query
            .backbone_tensors()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.copy().contiguous()))
            .collect();
        let batches: Vec<Tensor> =
            [6, 6, 3].into_iter().zip(0..).map(|(n, i)| pixels(i, n)).collect();
        let mut tensors: Vec<(String, Tensor)> =
            before.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let named =
            (0..).zip(&batches).map(|(i, batch)| (format!("batch.{i}"), batch.shallow_clone()));
        tensors.extend(named);
        Tensor::write_safetensors(&tensors, &file).unwrap();
        export_oracle::run("recompute_bn.py", &[&file, &out]);
        let theirs: HashMap<String, Tensor> =
            Tensor::read_safetensors(&out).unwrap().into_iter().collect();

        let all = batches.iter().map(|batch| Ok::<_, ShimError>(batch.shallow_clone()));
        assert_eq!(model.query.recompute_statistics(all).unwrap(), 3);
        let (mut moved, mut counters) = (0, 0);
        for (name, ours) in model.query.backbone_tensors() {
            let theirs = &theirs[&name];
            if name.ends_with("num_batches_tracked") {
                assert_eq!((ours.int64_value(&[]), theirs.int64_value(&[])), (3, 3), "{name}");
                counters += 1;
            } else if name.ends_with("running_mean") || name.ends_with("running_var") {
                let off = (&ours - theirs).abs().max().double_value(&[]);
                let largest = theirs.abs().max().double_value(&[]);
                assert!(off < 1e-5 * largest, "{layout} {name}: {off:e} of {largest:e}");
                assert!(!ours.equal(&before[&name]), "{name}");
                moved += 1;
            } else {
                assert!(ours.equal(&before[&name]), "{name} is no statistic");
            }
        }
        assert_eq!((moved, counters), (40, 20), "of 20 normalisations");
    }
    // Nothing to see changes nothing.
    let mut model = model(&[]);
    let before = digest(&model.query.backbone_tensors()).unwrap();
    let none = std::iter::empty::<Result<Tensor, ShimError>>();
    assert_eq!(model.query.recompute_statistics(none).unwrap(), 0);
    assert_eq!(digest(&model.query.backbone_tensors()).unwrap(), before);
}

/// Both figures are reported, the first as without the flag; statistics are the training set's, in any number of
/// workers.
#[test]
fn commands_report_both() {
    let folder = tempfile::tempdir().unwrap();
    let ((_train, train), (_test, test)) = (shards(24), shards(6));
    let weights = folder.path().join("weights.safetensors");
    let (format, origin) = (detco::export::Format::Torchvision, detco::export::Origin::default());
    let mut ours = model(&["model.width=8"]);
    detco::export::write(&weights, format, &ours.query.backbone_tensors(), &origin).unwrap();
    let sets =
        ["--train", path(&train), "--test", path(&test), "--size", "32", "--json", "--workers"];
    let eval = |how: &[&str], workers: &str| -> Value {
        let command =
            [&["eval"], &how[..1], &[path(&weights)], &how[1..], &sets, &[workers]].concat();
        serde_json::from_str(&detco_ok(&command)).unwrap()
    };
    let readings = |report: &Value| -> HashMap<String, Value> {
        let all = report["readings"].as_array().unwrap().iter();
        all.map(|one| (one["name"].as_str().unwrap().to_owned(), one.clone())).collect()
    };
    for (how, name) in [
        (&["knn", "-k", "5"][..], "top1"),
        (&["linear", "--costs", "1", "--levels", "2,5"], "res5/top1"),
        (
            &["linear", "--protocol", "moco", "--epochs", "2", "--batch", "16", "--rates", "1"],
            "res5/top1",
        ),
    ] {
        let plain = eval(how, "1");
        let both = eval(&[how, &["--recompute-bn"]].concat(), "1");
        assert_eq!(plain["sha256"], both["sha256"], "{how:?}: the backbone is the one given");
        // Whole batches of 64: those of 96 samples.
        assert_eq!(both["recomputed_bn_images"], 64, "{how:?}");
        let (of_plain, of_both) = (readings(&plain), readings(&both));
        for (name, reading) in &of_plain {
            assert_eq!(&of_both[name], reading, "{how:?}");
        }
        let again = &of_both[&format!("recomputed-bn/{name}")];
        assert_ne!(again["samples"], of_plain[name]["samples"], "{how:?}: untrained statistics");
        assert_eq!(eval(&[how, &["--recompute-bn"]].concat(), "3"), both, "{how:?}");
    }
    // What the command measured is what the function makes.
    let open = |at: &std::path::Path| Arc::new(ShardSet::open(&[path(at).to_owned()]).unwrap());
    let look = Look { size: 32, ..Look::default() };
    assert_eq!(recompute_bn(&mut ours.query, ("train", &open(&train)), &look).unwrap(), 64);
    let mean =
        ours.query.backbone_tensors().into_iter().find(|(name, _)| name == "bn1.running_mean");
    assert!(mean.unwrap().1.abs().sum(Kind::Float).double_value(&[]) > 0.0);

    // One image has no variance.
    images(&folder.path().join("one"), 1, 1);
    let (from, one) = (folder.path().join("one"), folder.path().join("shard"));
    detco_ok(&["pack", path(&from), path(&one)]);
    let before = digest(&ours.query.backbone_tensors()).unwrap();
    let error = recompute_bn(&mut ours.query, ("train", &open(&one)), &look).unwrap_err();
    assert!(matches!(error, FeaturesError::Few { samples: 1, .. }), "{error}");
    assert_eq!(digest(&ours.query.backbone_tensors()).unwrap(), before);
    let said = detco_fails(&["eval", "svm", path(&weights), "--recompute-bn"], 2);
    assert!(said.contains("--recompute-bn"), "{said}");
}
