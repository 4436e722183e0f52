//! Exported backbones against the programs they are meant for, and other programs' files against
//! the reader.
#![cfg(feature = "train")]

mod export_oracle;

use std::collections::BTreeMap;
use std::path::Path;

use detco::export::{self, Encoder, Format, Origin};
use detco::weights::{self, WeightsError, WeightsFile};
use export_oracle::run;
use proptest::prelude::*;
use tch::{Kind, Tensor, kind::FLOAT_CPU};

/// Names and shapes of torchvision's ResNets, without `fc`.
fn resnet(blocks: [usize; 4], bottleneck: bool) -> Vec<(String, Tensor)> {
    tch::manual_seed(7);
    let mut tensors = Vec::new();
    let mut conv =
        |name: String, size: [i64; 4]| tensors.push((name, Tensor::randn(size, FLOAT_CPU)));
    let expansion = if bottleneck { 4 } else { 1 };
    let mut norms = vec![("bn1".to_string(), 64)];
    conv("conv1.weight".into(), [64, 3, 7, 7]);
    let mut input = 64;
    for (stage, blocks) in blocks.iter().enumerate() {
        let width = 64 << stage;
        for block in 0..*blocks {
            let at = format!("layer{}.{block}", stage + 1);
            let output = width * expansion;
            let shapes = if bottleneck {
                vec![[width, input, 1, 1], [width, width, 3, 3], [output, width, 1, 1]]
            } else {
                vec![[width, input, 3, 3], [width, width, 3, 3]]
            };
            for (i, shape) in shapes.into_iter().enumerate() {
                norms.push((format!("{at}.bn{}", i + 1), shape[0]));
                conv(format!("{at}.conv{}.weight", i + 1), shape);
            }
            if input != output {
                norms.push((format!("{at}.downsample.1"), output));
                conv(format!("{at}.downsample.0.weight"), [output, input, 1, 1]);
            }
            input = output;
        }
    }
    for (at, width) in norms {
        for leaf in ["weight", "bias", "running_mean", "running_var"] {
            tensors.push((format!("{at}.{leaf}"), Tensor::rand([width], FLOAT_CPU)));
        }
        tensors.push((format!("{at}.num_batches_tracked"), Tensor::from(70_000_i64 + width)));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

fn origin() -> Origin {
    Origin {
        detco: "0.1.0".into(),
        backbone: "resnet50".into(),
        encoder: "query".into(),
        recipe: Some("detco-r50".into()),
        file: None,
        epoch: 200,
        step: 1_000_800,
    }
}

#[track_caller]
fn assert_same(found: &[(String, Tensor)], expected: &[(String, Tensor)]) {
    let names = |tensors: &[(String, Tensor)]| -> Vec<String> {
        tensors.iter().map(|(name, _)| name.clone()).collect()
    };
    assert_eq!(names(found), names(expected));
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        assert_eq!(found.kind(), expected.kind(), "{name}");
        assert_eq!(found.size(), expected.size(), "{name}");
        assert!(found.equal(expected), "{name}");
    }
}

#[test]
fn torchvision_loads_them_strictly_and_we_read_them_back() {
    let folder = tempfile::tempdir().unwrap();
    for (arch, blocks, bottleneck) in
        [("resnet18", [2, 2, 2, 2], false), ("resnet50", [3, 4, 6, 3], true)]
    {
        let tensors = resnet(blocks, bottleneck);
        for name in ["x.safetensors", "x.pth"] {
            let path = folder.path().join(name);
            export::write(&path, Format::Torchvision, &tensors, &origin()).unwrap();
            let said = run("export_check.py", &[&"torchvision", &arch, &path]);
            assert_same(&weights::read_backbone(&path, None).unwrap().tensors, &tensors);
            if name == "x.safetensors" {
                let said: serde_json::Value = serde_json::from_str(&said).unwrap();
                assert_eq!(said["recipe"], "detco-r50");
                assert_eq!(said["step"], 1_000_800);
            }
        }
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "no temporary file stays: {left:?}");
}

#[test]
fn detectron2_gets_its_names_and_arrays() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = resnet([3, 4, 6, 3], true);
    let (pkl, reference) = (folder.path().join("x.pkl"), folder.path().join("x.safetensors"));
    export::write(&pkl, Format::Detectron2, &tensors, &origin()).unwrap();
    export::write(&reference, Format::Torchvision, &tensors, &origin()).unwrap();
    let author = run("export_check.py", &[&"detectron2", &pkl, &reference]);
    assert_eq!(author.trim(), "detco 0.1.0: detco-r50, query encoder, epoch 200, step 1000800");
}

#[test]
fn the_same_weights_give_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = resnet([1, 1, 1, 1], false);
    for (name, format) in [
        ("x.safetensors", Format::Torchvision),
        ("x.pth", Format::Torchvision),
        ("x.pkl", Format::Detectron2),
    ] {
        let path = folder.path().join(name);
        let mut files = Vec::new();
        for _ in 0..2 {
            export::write(&path, format, &tensors, &origin()).unwrap();
            files.push(std::fs::read(&path).unwrap());
        }
        assert!(files[0] == files[1], "{name}");
    }
}

#[test]
fn an_encoder_is_picked_from_a_checkpoint_without_its_heads() {
    let tensors = resnet([1, 1, 1, 1], false);
    let mut all: Vec<(String, Tensor)> = vec![
        ("query.global.5.0.weight".into(), Tensor::zeros([2, 2], FLOAT_CPU)),
        ("queue.pointer".into(), Tensor::from(0_i64)),
    ];
    for (name, tensor) in &tensors {
        all.push((format!("key.backbone.{name}"), tensor * 2));
        all.push((format!("query.backbone.{name}"), tensor.shallow_clone()));
    }
    assert_same(&export::backbone(&all, Encoder::Query).unwrap(), &tensors);
    let key = export::backbone(&all, Encoder::Key).unwrap();
    assert!(key[0].1.equal(&(&tensors[0].1 * 2)));
    let error = export::backbone(&all[..2], Encoder::Query).unwrap_err().to_string();
    assert!(error.contains("query.backbone.conv1.weight"), "{error}");
}

#[test]
fn wrong_names_and_places_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = resnet([1, 1, 1, 1], false);
    for (name, format, hint) in [
        ("x.bin", Format::Torchvision, ".safetensors, .pth or .pt"),
        ("x.pth", Format::Detectron2, ".pkl"),
    ] {
        let path = folder.path().join(name);
        let error = export::write(&path, format, &tensors, &origin()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(hint), "{error}");
    }
    let mut heads = tensors;
    heads.push(("fc.weight".into(), Tensor::zeros([2, 2], FLOAT_CPU)));
    let path = folder.path().join("x.pth");
    assert!(export::write(&path, Format::Torchvision, &heads, &origin()).is_err());
    heads.pop();
    heads[0].1 = heads[0].1.to_kind(Kind::Half);
    for name in ["x.pth", "x.safetensors"] {
        let path = folder.path().join(name);
        let error = export::write(&path, Format::Torchvision, &heads, &origin()).unwrap_err();
        assert!(error.to_string().contains(&heads[0].0), "{error}");
    }
    let path = folder.path().join("x.pkl");
    assert!(export::write(&path, Format::Detectron2, &heads, &origin()).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let path = folder.path().join("no/such/folder/x.pth");
    let tensors = resnet([1, 1, 1, 1], false);
    let error = export::write(&path, Format::Torchvision, &tensors, &origin()).unwrap_err();
    assert!(error.to_string().contains("no/such/folder/x.pth"), "{error}");
}

/// Other programs' files, and what is said of them. All hold the same backbone.
const FILES: &[(&str, &str)] = &[
    ("torchvision.pth", ""),
    ("torchvision.safetensors", ""),
    ("protocol-1.pth", ""),
    ("protocol-3.pth", ""),
    ("protocol-4.pth", ""),
    ("protocol-5.pth", ""),
    ("legacy-4.pth", ""),
    ("script.pt", ""),
    ("moco.pth", MOCO),
    ("legacy.pth", MOCO),
    ("baggage-2.pth", MOCO),
    ("baggage-4.pth", MOCO),
    ("baggage-5.pth", MOCO),
    ("baggage-legacy.pth", MOCO),
    ("parameters.pth", " below \"model.\""),
    ("views.pth", " below \"backbone.\""),
    ("legacy-views.pth", " below \"backbone.\""),
    ("module.pth", " below \"backbone.\""),
    (
        "dino.pth",
        " below \"student.module.backbone.\" (chosen before \"teacher.backbone.\"; --init-prefix \
         chooses another)",
    ),
    ("vissl.torch", " below \"classy_state_dict.base_model.model.trunk._feature_blocks.\""),
    (
        "mmselfsup.pth",
        " below \"state_dict.online_net.0.\" (chosen before \"state_dict.backbone.\" and 1 more; \
         --init-prefix chooses another)",
    ),
    ("numbered.pth", NUMBERED),
    ("numbered-2.pth", NUMBERED),
    ("detectron2-0.pkl", DETECTRON2),
    ("detectron2-2.pkl", DETECTRON2),
    ("detectron2-3.pkl", DETECTRON2),
    ("detectron2-4.pkl", DETECTRON2),
    ("detectron2-5.pkl", DETECTRON2),
    ("model_final.pth", " below \"model.backbone.bottom_up.\", named as in detectron2"),
    ("transformers.safetensors", " below \"resnet.\", named as in transformers"),
];
const MOCO: &str = " below \"state_dict.module.encoder_q.\" (chosen before \
                    \"state_dict.module.encoder_k.\"; --init-prefix chooses another)";
const NUMBERED: &str =
    " below \"state_dict.backbone.\", numbered as the children of an nn.Sequential";
const DETECTRON2: &str = " below \"model.\", named as in detectron2";

/// One of each format: cut and changed, each ends.
const DAMAGED: [&str; 5] =
    ["old.pth", "bfloat16.safetensors", "legacy.pth", "detectron2-2.pkl", "detectron2-5.pkl"];

#[test]
fn other_programs_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    run("export_files.py", &[&folder.path()]);
    let whole =
        |name: &str| weights::read_backbone(&folder.path().join(name), None).map_err(Box::new);
    let read = |name: &str| whole(name).map(|backbone| backbone.tensors);
    let expected = read("reference.safetensors").unwrap();
    assert_eq!(expected.len(), 120);
    for (name, said) in FILES {
        let backbone = whole(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        println!("{name}: {}", backbone.describe());
        assert_same(&backbone.tensors, &expected);
        assert_eq!(backbone.describe(), format!("120 tensors{said}"), "{name}");
    }
    assert!(!folder.path().join("was-run").exists(), "a pickle's code was run");
    let key = Some("student.module.backbone");
    let chosen = weights::read_backbone(&folder.path().join("dino.pth"), key).unwrap();
    assert_same(&chosen.tensors, &expected);
    for (name, prefix) in
        [("dino.pth", "teacher.backbone."), ("moco.pth", "state_dict.module.encoder_k")]
    {
        let chosen = weights::read_backbone(&folder.path().join(name), Some(prefix)).unwrap();
        let [(first, doubled), ..] = &chosen.tensors[..] else { panic!("{name}: no tensors") };
        assert_eq!(first, "bn1.bias");
        assert!(doubled.equal(&(&expected[0].1 * 2)), "{name}");
    }
    let double = whole("double.pth").unwrap();
    assert_same(&double.tensors, &expected);
    assert_eq!(
        double.describe(),
        "120 tensors below \"model.\", converted from float64 to float32"
    );
    let half = read("bfloat16-reference.safetensors").unwrap();
    assert_same(&read("bfloat16.pth").unwrap(), &half);
    assert_same(&read("bfloat16.safetensors").unwrap(), &half);
    assert_same(&read("half.pth").unwrap(), &read("half-reference.safetensors").unwrap());
    assert!(whole("half.pth").unwrap().describe().ends_with("from float16 to float32"));
    assert!(whole("bfloat16.pth").unwrap().describe().ends_with("from bfloat16 to float32"));
    let old: BTreeMap<String, Tensor> = read("old.pth").unwrap().into_iter().collect();
    assert_eq!(old.len(), expected.len());
    assert_eq!(old["layer4.1.bn2.num_batches_tracked"].int64_value(&[]), 0);
    for (name, hint) in [
        ("tar.pth", "before 0.1.10"),
        ("pointer.pth", "git lfs pull"),
        ("page.pth", "web page"),
        ("gzip.pth", "unpack it first"),
        ("big.pth", "big-endian machine"),
        ("big-legacy.pth", "big-endian machine"),
        ("big-array.pkl", "res2.0.conv1.weight has the element type big-endian numbers"),
        ("several.pth", "below \"flow.\", \"rgb.\"\nhint: --init-prefix"),
        ("deep.pth", "no conv1.weight: a ResNet with a deep stem"),
        ("complex.pth", "conv1.weight has the element type ComplexFloatStorage"),
        ("other.pth", "it holds a, b"),
        ("se.pth", "layer1.0.se.weight"),
        ("nan.pth", "layer2.0.bn1.bias holds values that are not finite"),
        ("int.pth", "layer1.0.conv1.weight has the element type Int"),
        ("deflated.pth", "is compressed"),
        ("stretched.pth", "holds"),
        ("missing.pth", "cannot read"),
    ] {
        let error = read(name).expect_err(name).to_string();
        assert!(error.contains(hint) && error.contains(name), "{name}: {error}");
    }
    damaged_files_are_errors(folder.path());
}

/// Cuts and flips bytes all over real files: every outcome but a panic is right, and a cut is
/// always found.
fn damaged_files_are_errors(folder: &Path) {
    let victim = folder.join("damaged");
    for name in DAMAGED {
        let whole = std::fs::read(folder.join(name)).unwrap();
        for share in [0, 1, 2, 9, 10, 50, 90, 98, 99] {
            let cut = whole.len() * share / 100;
            std::fs::write(&victim, &whole[..cut]).unwrap();
            assert!(weights::read_backbone(&victim, None).is_err(), "{name} cut to {cut} bytes");
        }
        changed_files_end(std::fs::read(folder.join(name)).unwrap());
    }
}

/// Changes bytes where structure is: in the pickle or header at the beginning, in the zip's
/// directory or the arrays' ends.
fn changed_files_end(whole: Vec<u8>) {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 120,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let places = prop_oneof![0..200_usize, 0..8000_usize, whole.len() - 8000..whole.len()];
    runner
        .run(&(prop::collection::vec((places, any::<u8>()), 1..4)), |flips| {
            let mut bytes = whole.clone();
            for (place, byte) in flips {
                bytes[place] = byte;
            }
            // Either outcome is right: the property is that there is one, and that no more is read
            // than there is.
            let len = bytes.len();
            let read = WeightsFile::from_bytes(Path::new("x"), bytes).and_then(|mut file| {
                let choice = file.backbone(None)?;
                let names: Vec<&str> = choice.names.iter().map(|(name, _)| name.as_str()).collect();
                file.read(&names)
            });
            let read: usize = read.iter().flatten().map(|tensor| tensor.bytes.len()).sum();
            prop_assert!(read <= len + (1 << 20), "{read} of {len} bytes");
            Ok(())
        })
        .unwrap();
}

/// A tensor that points outside its storage, or claims a terabyte by a zero stride.
#[test]
fn windows_outside_their_storage_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pth");
    let mut tensors = vec![("conv1.weight".to_string(), Tensor::zeros([2, 3], FLOAT_CPU))];
    tensors.push(("layer1.0.conv1.weight".into(), Tensor::zeros([5], FLOAT_CPU)));
    export::write(&path, Format::Torchvision, &tensors, &origin()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    // Offset 0, then the tuples (2, 3) and (3, 1).
    let needle = b"K\0(K\x02K\x03t(K\x03K\x01t";
    let at = whole.windows(needle.len()).position(|window| window == needle).unwrap();
    let mut tried = 0;
    for (place, byte) in [(1, 1), (4, 3), (6, 200), (10, 4), (12, 9), (10, 0)] {
        let mut bytes = whole.clone();
        bytes[at + place] = byte;
        if (place, byte) == (10, 0) {
            bytes[at + 4] = 200;
        }
        rewrite_crc(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let error = weights::read_backbone(&path, None).unwrap_err();
        assert!(matches!(error, WeightsError::Window { .. }), "{place}: {error}");
        tried += 1;
    }
    assert_eq!(tried, 6);
}

/// Puts the right CRC-32 of the first record into both of its headers.
fn rewrite_crc(bytes: &mut [u8]) {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let data = 30 + u16_at(26) + u16_at(28);
    let size = u32::from_le_bytes(bytes[18..22].try_into().unwrap()) as usize;
    let crc = crc32(&bytes[data..data + size]).to_le_bytes();
    let central = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    bytes[14..18].copy_from_slice(&crc);
    bytes[central + 16..central + 20].copy_from_slice(&crc);
}

/// CRC-32 of zip, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// The exported network is the trained network: torchvision's features are ours.
#[test]
fn features_are_torchvisions() {
    use detco::{config::Config, model::Model};

    let folder = tempfile::tempdir().unwrap();
    for (recipe, arch) in [("moco-v2-r50", "resnet18"), ("moco-v2-r50", "resnet50")] {
        let sets = [format!("model.backbone={arch}"), "method.queue=256".to_string()];
        let config = Config::load(recipe, &sets).unwrap();
        let mut model = Model::new(&config, tch::Device::Cpu).unwrap();
        // Statistics as training would leave them, not the 0 and 1 they start with.
        tch::manual_seed(21);
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
        let images = Tensor::randn([4, 3, 224, 224], FLOAT_CPU);
        let features = model.query.features(&images).unwrap();
        let reference = folder.path().join("reference.safetensors");
        let dump = [("images", &images), ("features", &features)];
        Tensor::write_safetensors(&dump, &reference).unwrap();
        for name in ["x.pth", "x.safetensors"] {
            let path = folder.path().join(name);
            let chosen = export::backbone(&model.tensors(), Encoder::Query).unwrap();
            export::write(&path, Format::Torchvision, &chosen, &origin()).unwrap();
            let worst = run("export_check.py", &[&"features", &arch, &path, &reference]);
            println!("{arch} {name}: worst difference {} of the largest feature", worst.trim());
        }
        let shape = weights::shape(&export::backbone(&model.tensors(), Encoder::Query).unwrap());
        let shape = shape.unwrap();
        assert_eq!((shape.backbone, shape.stem), (config.model.backbone, config.model.stem));
        assert_eq!(shape.width, 64);
    }
}

/// `detco export` of a run's checkpoint.
#[test]
fn a_run_is_exported_from_the_command_line() {
    use std::process::Command;

    use detco::checkpoint::{self, State};
    use detco::{config::Config, model::Model};
    use detco_shards::order::Cursor;

    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let config = Config::load("moco-v2-small", &["train.device=cpu".into()]).unwrap();
    let model = Model::new(&config, tch::Device::Cpu).unwrap();
    let state = State {
        config,
        cursor: Cursor { epoch: 2, step: 5 },
        step: 1200,
        fingerprint: 1,
        ranks: 1,
        samples: 1,
        collapsing: Vec::new(),
    };
    checkpoint::save(&run, &state, &model.tensors(), &[]).unwrap();
    let expected = export::backbone(&model.tensors(), Encoder::Query).unwrap();
    let detco = |name: &str, more: &[&str]| {
        let path = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
        command.arg("export").arg(&run).arg("-o").arg(&path).args(more);
        let output = command.output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        (path, output.status.code(), complaint)
    };
    for name in ["x.safetensors", "x.pth"] {
        let (path, code, complaint) = detco(name, &["--checkpoint", "1200"]);
        assert_eq!(code, Some(0), "{complaint}");
        assert_same(&weights::read_backbone(&path, None).unwrap().tensors, &expected);
    }
    // A run's folder stands for its newest checkpoint, of which the query encoder is taken.
    let of_run = weights::read_backbone(&run, None).unwrap();
    assert_same(&of_run.tensors, &expected);
    assert!(
        of_run.describe().contains("below \"query.backbone.\" (chosen before \"key.backbone.\"")
    );
    let (path, code, complaint) = detco("x.pkl", &["--format", "detectron2", "--key-encoder"]);
    assert_eq!(code, Some(0), "{complaint}");
    assert!(complaint.contains("no configuration of detectron2"), "{complaint}");
    let reference = folder.path().join("x.safetensors");
    let author = run_check(&path, &reference);
    assert!(author.contains("key encoder, epoch 2, step 1200"), "{author}");
    for (name, more, hint) in [
        ("y.onnx", &[][..], ".safetensors, .pth or .pt"),
        ("y.pth", &["--checkpoint", "7"][..], "step-000001200"),
    ] {
        let (path, code, complaint) = detco(name, more);
        assert_eq!(code, Some(1), "{complaint}");
        assert!(complaint.contains(hint), "{complaint}");
        assert!(!path.exists());
    }
}

/// The key encoder starts as a copy of the query encoder, so its export is compared with that.
fn run_check(pkl: &Path, reference: &Path) -> String {
    run("export_check.py", &[&"detectron2", &pkl, &reference])
}
