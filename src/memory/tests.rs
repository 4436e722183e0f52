//! Needs, against what libtorch's allocator counts, and shapes against models.

use super::*;
use crate::batch::{Batch, Form};
use crate::dist::local::Local;
use crate::model::{Draws, Model};
use crate::optim::Sgd;
use crate::shim::step::Meter;
use crate::step::{At, update};
use detco_shards::views::{Note, Rect};
use tch::{Kind, Tensor};

/// The most that two steps hold, counted by libtorch's allocator.
fn measured(config: &Config, norms: Norms) -> i64 {
    tch::set_num_threads(1);
    let meter = Meter::begin().unwrap();
    let mut model = Model::new(config, Device::Cpu).unwrap();
    model.normalise_by(norms);
    let mut sgd = Sgd::of(model.query.parameters(), &config.optim);
    let form = Form::of(config, Device::Cpu);
    for step in 0..2 {
        let n = config.train.batch;
        let view = |name: &str, images: i64, edge: i64| {
            let kind = if form.bf16 { Kind::BFloat16 } else { Kind::Float };
            let lead = if images == 1 { vec![n] } else { vec![n, images] };
            let draw = |shape: Vec<i64>, at| Draws::new(step, name, at).normal(&shape, 1.0);
            // Small factors: what the test itself needs for its batch is not to be the most.
            let each = draw([lead, vec![3, 1, 1]].concat(), 0).to_kind(kind);
            each + draw(vec![3, edge, edge], 1).to_kind(kind)
        };
        let groups = config.training_views().groups.into_iter().map(|group| {
            let (images, edge) = group.images();
            let view = |v: u32| view(&v.to_string(), images as i64, edge.into());
            (group.name.clone(), (0..group.count).map(view).collect())
        });
        let note = |sample: i64| Note {
            picture: [64, 64],
            crop: Rect { left: 0, top: 0, width: 64, height: 64 },
            flip: false,
            rotation: 0,
            permutation: Some(sample as u32),
        };
        let notes = config.training_views().groups.into_iter().map(|group| {
            let of_view = |_| (0..n).map(note).collect();
            (group.name, (0..group.count).map(of_view).collect())
        });
        let batch = Batch::new(groups.collect()).with_notes(notes.collect());
        let at = At { step, learning_rate: 0.01 };
        let report = update(&mut model, &mut sgd, &Local, config, &batch, at).unwrap();
        assert!(report.applied);
    }
    meter.read().unwrap().1
}

/// Between 5 % below and 15 % above, for both kinds of blocks, with and without
/// patches, in both precisions, whole and in micro-batches; where our kernels normalise, too.
#[test]
fn needs_are_what_libtorch_counts() {
    let small = ["model.width=8", "train.batch=8"];
    let (moco, edges) =
        (["method.dim=32", "method.queue=512"], ["views.crops.size=64", "model.bn_splits=4"]);
    let byol = ["method.hidden=256", "views.first.size=64", "views.second.size=64"];
    let swav = [
        "method.prototypes=300",
        "method.hidden=128",
        "views.small.size=32",
        "method.queue_from=0",
    ];
    use Norms::{Kernels, Libtorch};
    let cases: [(&str, &[&str], Norms); 25] = [
        ("detco-r50", &["method.local_head=pirl", "views.patches.grid.patch=32"], Libtorch),
        // With 8 channels libtorch's convolutions in bfloat16 hold more on a CPU than their maps.
        (
            "detco-r50",
            &[
                "model.backbone=resnet18",
                "model.width=16",
                "views.patches.grid.patch=32",
                "train.precision=bf16",
            ],
            Libtorch,
        ),
        ("detco-r50", &["model.backbone=resnet18", "train.accumulate=4"], Libtorch),
        ("moco-v2-r50", &["train.accumulate=2"], Libtorch),
        ("moco-v2-cifar", &["model.bn_splits=1", "train.layout=channels-last"], Libtorch),
        (
            "detco-r50",
            &[
                "method.local_head=pirl",
                "views.patches.grid.patch=32",
                "train.layout=channels-last",
            ],
            Kernels,
        ),
        ("moco-v2-cifar", &["train.layout=channels-last"], Kernels),
        ("simclr-cifar", &["train.accumulate=2"], Libtorch),
        ("simclr-r50", &[], Libtorch),
        // Narrow, of small images: gradients and workspace are a large part, and come when activations go.
        ("simclr-r50", &["model.backbone=resnet18", "model.width=16"], Libtorch),
        // More weights than activations: what LARS makes of the gradients is the most.
        (
            "simclr-r50",
            &["model.backbone=resnet18", "model.width=32", "train.batch=4", "model.bn_splits=2"],
            Libtorch,
        ),
        ("rotation-r50", &["model.backbone=resnet18", "model.width=16"], Libtorch),
        ("rotation-r50", &[], Libtorch),
        ("rotation-cifar", &["train.accumulate=2"], Libtorch),
        // 2 x 2 and 4 x 4 cells.
        ("densecl-r50", &[], Libtorch),
        ("densecl-r50", &["views.crops.size=128", "train.accumulate=2"], Libtorch),
        ("densecl-cifar", &["train.layout=channels-last"], Kernels),
        ("byol-r50", &[], Libtorch),
        ("byol-r50", &["method.hidden=4096", "method.dim=256"], Libtorch),
        ("byol-cifar", &["train.accumulate=2", "model.width=16"], Libtorch),
        ("jigsaw-r50", &["model.backbone=resnet18", "views.patches.grid.patch=32"], Libtorch),
        ("jigsaw-r50", &["train.accumulate=2"], Libtorch),
        ("swav-r50", &[], Libtorch),
        ("swav-r50", &["method.prototypes=3000"], Libtorch),
        ("swav-cifar", &["train.accumulate=2"], Libtorch),
    ];
    let mut faults = Vec::new();
    for (recipe, more, norms) in cases {
        let own: &[&str] = match recipe.split('-').next() {
            Some("simclr" | "rotation" | "jigsaw") => &[],
            Some("byol") => &byol,
            Some("swav") => &swav,
            _ => &moco,
        };
        let sets = small.iter().chain(own).chain(&edges).chain(more).map(ToString::to_string);
        let config = Config::load(recipe, &sets.collect::<Vec<_>>()).unwrap();
        let needs = Needs::normalised_by(norms, &config, 1, Device::Cpu, Way::Copied);
        let beside = needs.part("data pipeline") + needs.part("libraries");
        let of_libtorch = needs.sum() - beside;
        let (said, found) = (of_libtorch as f64, measured(&config, norms) as f64);
        println!("{recipe} {more:?} {norms:?}: said {said:.3e}, found {found:.3e}\n{needs}");
        if !(0.95..1.15).contains(&(said / found)) {
            faults.push(format!("{recipe} {more:?}: {}", said / found));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_smaller_card_takes_more_micro_batches() {
    let sets = ["model.width=8", "method.local_head=pirl", "method.queue=1024"];
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let config = Config::load("detco-r50", &sets).unwrap();
    let whole = Needs::of(&config, 1, Device::Cuda(0), Way::Copied);
    let fits = |free| accumulate_for(&config, 1, Device::Cuda(0), Way::Copied, free);
    assert_eq!(fits(whole.sum()), Some(1));
    assert_eq!(fits(whole.sum() - 1), Some(2));
    assert_eq!(fits(whole.sum() - whole.part("activations")), None);
    let half = whole.part("activations") / 2 + whole.part("logits") / 2;
    assert_eq!(fits(whole.sum() - half), Some(2));
    assert!(matches!(fits(whole.sum() - half - half / 2), Some(4 | 8)));
}

#[test]
fn batches_that_wait_on_the_device_are_counted() {
    let sets = ["model.width=8", "method.queue=1024", "data.batches_ahead=2"];
    let config = Config::load("detco-r50", &sets.map(String::from)).unwrap();
    let of = |way| Needs::of(&config, 1, Device::Cuda(0), way);
    let (copied, lent) = (of(Way::Copied), of(Way::Lent));
    assert_eq!(copied.part("data pipeline"), 0);
    // Three batches of 256: two crops and two patch sets in bfloat16, and a picture.
    let (crop, patch) = (224 * 224, config.patch_size().unwrap().pow(2));
    let sample = 2 * 3 * 2 * i64::from(crop + 9 * patch) + (640 << 10);
    assert_eq!(lent.part("data pipeline"), 3 * 256 * sample + NVJPEG);
    assert_eq!(lent.part("batch"), 0, "the pipeline's own views, and nothing made of them");
    let rest = |needs: &Needs| needs.sum() - needs.part("batch") - needs.part("data pipeline");
    assert_eq!(rest(&copied), rest(&lent));
}

/// What is counted by shapes is what models hold, byte by byte, and what their checkpoints do.
#[test]
fn shapes_are_those_of_models() {
    let bytes = |tensors: &[(String, Tensor)]| -> i64 {
        let of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        tensors.iter().map(|(_, tensor)| of(tensor) as i64).sum()
    };
    let small = ["model.width=4", "method.dim=8", "method.queue=1024"];
    for (recipe, more) in [
        ("simclr-r50", &[][..]),
        ("simclr-cifar", &[]),
        ("rotation-r50", &[]),
        ("byol-r50", &["method.hidden=64"]),
        ("swav-cifar", &["method.hidden=64"]),
    ] {
        let sets = ["model.width=4"].iter().chain(more).map(ToString::to_string);
        let config = Config::load(recipe, &sets.collect::<Vec<_>>()).unwrap();
        let model = Model::new(&config, Device::Cpu).unwrap();
        let parameters = bytes(&model.query.parameters());
        let design = config.design();
        assert_eq!(parameters, shapes::parameters(&config.model, &design) * shapes::FLOAT);
        let query = bytes(&model.query.tensors());
        assert_eq!(query, shapes::encoder_bytes(&config.model, &design), "{recipe}");
        let saved = bytes(&model.tensors()) + parameters; // momentum
        assert_eq!(saved, shapes::checkpoint_bytes(&config), "{recipe}");
    }
    for (recipe, more) in [
        ("detco-r50", ["method.local_head=pirl", "method.levels=[3,5]"]),
        ("detco-small", ["method.local_head=9c-9c", "model.backbone=resnet34"]),
        ("moco-v1-r50", ["model.backbone=resnet101", "model.stem=cifar"]),
        ("moco-v2-cifar", ["method.head=linear", "model.width=6"]),
        ("densecl-r50", ["model.backbone=resnet18", "method.ema=0.9"]),
        ("swav-r50", ["method.prototypes=30", "method.hidden=64"]),
    ] {
        let mut sets: Vec<String> = small.iter().chain(&more).map(ToString::to_string).collect();
        if more[1].contains("levels") {
            sets.push("method.level_weights=[0.5,1.0]".into());
        }
        let config = Config::load(recipe, &sets).unwrap();
        let model = Model::new(&config, Device::Cpu).unwrap();
        let parameters = bytes(&model.query.parameters());
        assert_eq!(
            parameters,
            shapes::parameters(&config.model, &config.design()) * shapes::FLOAT,
            "{recipe}"
        );
        let query = bytes(&model.query.tensors());
        assert_eq!(
            query,
            parameters + shapes::buffer_bytes(&config.model, &config.design()),
            "{recipe}"
        );
        let saved = bytes(&model.tensors()) + parameters; // momentum
        // The queues' pointer is eight bytes.
        assert_eq!(saved - 8, shapes::checkpoint_bytes(&config), "{recipe}");
    }
}

#[test]
fn ranks_share_the_batch_and_not_the_model() {
    let config = Config::load("detco-r50", &[]).unwrap();
    let of = |ranks| Needs::of(&config, ranks, Device::Cuda(0), Way::Copied);
    let (one, eight) = (of(1), of(8));
    for shared in ["batch", "logits", "activations"] {
        let part = |needs: &Needs| needs.part(shared) as f64;
        // Weights that were cast to bfloat16 are among the activations.
        let share = part(&one) / part(&eight);
        assert!((7.0..=8.0).contains(&share), "{shared}: {share}");
    }
    for own in ["query encoder", "momentum", "queues"] {
        assert_eq!(one.part(own), eight.part(own));
    }
    assert_eq!((one.part("averaging"), eight.part("averaging")), (0, one.part("gradients")));
}
