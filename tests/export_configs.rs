//! Folders of `detco export --configs`: their values against the paper's, their scripts against torchvision's
//! detectors, and what cannot be written.
#![cfg(feature = "train")]

mod export_oracle;

use std::path::{Path, PathBuf};
use std::process::Command;

use detco::checkpoint::{self, State};
use detco::config::Config;
use detco::export::{self, Format, Origin};
use detco::model::Model;
use detco_shards::order::Cursor;
use export_oracle::run;
use tch::{Device, Tensor, kind::FLOAT_CPU};

/// A model with statistics as training would leave them, not the 0 and 1 they start with.
fn model(sets: &[&str]) -> (Config, Model) {
    let sets: Vec<String> = ["train.device=cpu", "method.queue=256"]
        .iter()
        .chain(sets)
        .map(ToString::to_string)
        .collect();
    let config = Config::load("moco-v2-r50", &sets).unwrap();
    let mut model = Model::new(&config, Device::Cpu).unwrap();
    tch::manual_seed(5);
    let mut backbone = model.query.backbone_tensors();
    for (name, tensor) in &mut backbone {
        let random = Tensor::rand(tensor.size(), FLOAT_CPU);
        match name.rsplit('.').next() {
            Some("running_mean") => *tensor = random * 0.2 - 0.1,
            Some("running_var") => *tensor = random + 0.5,
            Some("bias") => *tensor = random * 0.1,
            _ => {}
        }
    }
    model.start_from(&backbone).unwrap();
    (config, model)
}

/// A run's folder with a checkpoint of such a model.
fn a_run(folder: &Path, sets: &[&str]) -> PathBuf {
    let (config, model) = model(sets);
    let state = State {
        config,
        cursor: Cursor { epoch: 2, step: 5 },
        step: 1200,
        fingerprint: 1,
        ranks: 1,
        samples: 1,
        collapsing: Vec::new(),
    };
    let run = folder.join("run");
    checkpoint::save(&run, &state, &model.tensors(), &[]).unwrap();
    run
}

/// A file of weights of such a model.
fn a_file(folder: &Path, sets: &[&str]) -> PathBuf {
    let path = folder.join("foreign.pth");
    let tensors = model(sets).1.query.backbone_tensors();
    export::write(&path, Format::Torchvision, &tensors, &Origin::default()).unwrap();
    path
}

/// `detco export`: exit code, standard output, standard error.
fn detco_export(of: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
    let output = command.arg("export").arg(of).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn configs_have_the_values_of_the_tables() {
    let folder = tempfile::tempdir().unwrap();
    // A foreign file for one depth, a run for the other.
    for (depth, of) in [
        ("50", a_file(folder.path(), &[])),
        ("18", a_run(folder.path(), &["model.backbone=resnet18"])),
    ] {
        for (format, count) in
            [("detectron2", [14, 11]), ("torchvision", [10, 10]), ("mmdet", [13, 10])]
        {
            let out = folder.path().join(format!("{format}-{depth}"));
            let (code, said, notes) =
                detco_export(&of, &["--format", format, "--configs", path(&out)]);
            assert_eq!(code, Some(0), "{notes}");
            let count = count[usize::from(depth == "18")];
            assert!(said.contains(&format!(": {count} configs for resnet{depth}")), "{said}");
            let refused = notes.lines().filter(|line| line.starts_with("no table")).count();
            assert_eq!(count + refused, 14, "{notes}");
            let found = run("export_configs.py", &[&"files", &format, &depth, &out]);
            assert_eq!(found.trim(), count.to_string());
        }
        let weights = folder.path().join(format!("detectron2-{depth}/backbone.pkl"));
        let reference = folder.path().join(format!("torchvision-{depth}/backbone.pth"));
        let plain = folder.path().join("plain.safetensors");
        assert_eq!(detco_export(&reference, &["-o", path(&plain)]).0, Some(0));
        let author = run("export_check.py", &[&"detectron2", &weights, &plain]);
        let expected =
            if depth == "50" { "resnet50 of" } else { "moco-v2-r50, query encoder, epoch 2" };
        assert!(author.contains(expected), "{author}");
        let readme = std::fs::read_to_string(weights.with_file_name("README.md")).unwrap();
        assert!(readme.contains(author.trim()), "{readme}");
    }
    let mut left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    left.retain(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert!(left.is_empty(), "no temporary folder stays: {left:?}");
}

/// check.py passes on each, finds damage, and each detector takes a step of training and an evaluation.
#[test]
fn torchvision_runs_what_is_written_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let of = a_run(folder.path(), &["model.backbone=resnet18"]);
    let (out, coco) = (folder.path().join("out"), folder.path().join("coco"));
    let (code, _, notes) = detco_export(&of, &["--key", "--configs", path(&out)]);
    assert_eq!(code, Some(0), "{notes}");
    run("export_configs.py", &[&"tree", &coco]);
    print!("{}", run("export_configs.py", &[&"torchvision", &out, &coco]));
}

/// The same weights give the same folder.
#[test]
fn a_folder_is_a_function_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let of = a_file(folder.path(), &["model.backbone=resnet18"]);
    let mut files = Vec::new();
    for name in ["one", "other"] {
        let out = folder.path().join(name);
        // An empty folder is as good as none.
        std::fs::create_dir(&out).unwrap();
        let arguments = ["--format", "detectron2", "--configs", path(&out), "--tables", "7,2,7"];
        assert_eq!(detco_export(&of, &arguments).0, Some(0));
        let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(&out)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                (name, std::fs::read(path).unwrap())
            })
            .collect();
        all.sort();
        files.push(all);
    }
    assert!(files[0] == files[1]);
    let tables = files[0].iter().filter(|(name, _)| name.starts_with("table")).count();
    assert_eq!(tables, 5, "FPN of table 2, three RetinaNets and the keypoints of table 7");
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let small = a_file(folder.path(), &["model.backbone=resnet18"]);
    let at = |name: &str| folder.path().join(name);
    let of = |name: &str, sets: &[&str]| {
        std::fs::create_dir(at(name)).unwrap();
        a_file(&at(name), sets)
    };
    let cifar = of("cifar", &["model.backbone=resnet18", "model.stem=cifar"]);
    let wide = of("wide", &["model.backbone=resnet18", "model.width=32"]);
    std::fs::write(at("file"), "x").unwrap();
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    let (new, nowhere, file) = (at("new"), at("no/where"), at("file"));
    let (new, taken) = (path(&new), at("cifar"));
    for (of, arguments, complaint) in [
        (&cifar, &["--configs", new][..], "takes a CIFAR stem"),
        (&wide, &["--configs", new], "model.width of this backbone is 32"),
        (
            &small,
            &["--configs", new, "--format", "detectron2", "--tables", "7,9"],
            "nothing of table 9",
        ),
        (&small, &["--configs", new, "--tables", "4"], "torchvision has no Sparse R-CNN"),
        (&small, &["--configs", path(&taken)], "is not an empty folder"),
        (&small, &["--configs", path(&file)], "is not an empty folder"),
        (&small, &["--configs", path(&nowhere)], "there is no folder"),
        (&small, &["--configs", ".."], "cannot write .."),
        (&small, &["--configs", new, "--checkpoint", "7"], "are for runs"),
    ] {
        let (code, said, notes) = detco_export(of, arguments);
        assert_eq!((code, said.as_str()), (Some(1), ""), "{arguments:?}: {notes}");
        assert!(notes.contains(complaint), "{arguments:?}: {notes}");
    }
    for (arguments, complaint) in [
        (&["--configs", new, "--tables", "5"][..], "[possible values: 2, 3, 4, 7, 8, 9]"),
        (&["--configs", new, "-o", "x.pth"], "cannot be used with"),
        (&["-o", "x.pth", "--tables", "2"], "cannot be used with"),
        (&["--tables", "2"], "--configs <DIR>"),
        (&[], "--out <FILE>"),
    ] {
        let (code, _, notes) = detco_export(&small, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {notes}");
        assert!(notes.contains(complaint), "{arguments:?}: {notes}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before);
    assert_eq!(std::fs::read_dir(taken).unwrap().count(), 1, "the weights that were there");
}
