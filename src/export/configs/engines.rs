//! The files of each engine: a config a row, the bases that these name, and scripts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::Format;
use super::network::Network;
use super::rows::{Detector, Row};

/// Texts by their names.
pub(super) type Files = BTreeMap<String, String>;

/// Everything in the folder that is text, except README.md.
pub(super) fn files(format: Format, network: Network, rows: &[Row]) -> Files {
    let mut files = Files::new();
    let mut add = |name: &str, text: &str| files.insert(name.to_owned(), network.fill(text));
    for (name, text) in scripts(format) {
        add(name, text);
    }
    if format == Format::Mmdet && rows.iter().any(|row| has_res5_head(row.detector)) {
        add("extra_norm.py", include_str!("mmdet/extra_norm.py"));
    }
    for row in rows {
        for (name, text) in bases(format, row.detector) {
            add(name, text);
        }
        let stem = row.stem(network);
        match format {
            Format::Detectron2 => add(&format!("{stem}.yaml"), &detectron2(row, network)),
            Format::Torchvision => add(&format!("{stem}.json"), &torchvision(row, network)),
            Format::Mmdet => add(&format!("{stem}.py"), &mmdet(row, network)),
        };
    }
    files
}

type Text = (&'static str, &'static str);

fn scripts(format: Format) -> &'static [Text] {
    match format {
        Format::Detectron2 => &[
            ("detector.py", include_str!("detectron2/detector.py")),
            ("check.py", include_str!("detectron2/check.py")),
            ("train.py", include_str!("detectron2/train.py")),
        ],
        Format::Torchvision => &[
            ("detector.py", include_str!("torchvision/detector.py")),
            ("data.py", include_str!("torchvision/data.py")),
            ("check.py", include_str!("torchvision/check.py")),
            ("train.py", include_str!("torchvision/train.py")),
        ],
        Format::Mmdet => &[("check.py", include_str!("mmdet/check.py"))],
    }
}

/// The bases of a detector's configs, each before the one that names it.
fn bases(format: Format, detector: Detector) -> &'static [Text] {
    macro_rules! text {
        ($name:literal, $folder:literal) => {
            ($name, include_str!(concat!($folder, "/", $name)))
        };
    }
    const BASE: Text = text!("base.yaml", "detectron2");
    const C4: Text = text!("base-mask-rcnn-c4.yaml", "detectron2");
    const FPN: Text = text!("base-mask-rcnn-fpn.yaml", "detectron2");
    match (format, detector) {
        (Format::Torchvision, _) | (Format::Mmdet, Detector::KeypointFpn) => &[],
        (Format::Detectron2, Detector::MaskC4) => &[BASE, C4],
        (Format::Detectron2, Detector::MaskFpn) => &[BASE, FPN],
        (Format::Detectron2, Detector::RetinaNet) => {
            &[BASE, text!("base-retinanet.yaml", "detectron2")]
        }
        (Format::Detectron2, Detector::KeypointFpn) => {
            &[BASE, FPN, text!("base-keypoint-rcnn-fpn.yaml", "detectron2")]
        }
        (Format::Detectron2, Detector::VocC4) => {
            &[BASE, C4, text!("base-faster-rcnn-voc-c4.yaml", "detectron2")]
        }
        (Format::Detectron2, Detector::Sparse) => {
            &[BASE, text!("base-sparse-rcnn.yaml", "detectron2")]
        }
        (Format::Mmdet, Detector::MaskC4) => &[text!("base-mask-rcnn-c4.py", "mmdet")],
        (Format::Mmdet, Detector::MaskFpn) => &[text!("base-mask-rcnn-fpn.py", "mmdet")],
        (Format::Mmdet, Detector::RetinaNet) => &[text!("base-retinanet.py", "mmdet")],
        (Format::Mmdet, Detector::VocC4) => &[text!("base-faster-rcnn-voc-c4.py", "mmdet")],
        (Format::Mmdet, Detector::Sparse) => &[text!("base-sparse-rcnn.py", "mmdet")],
    }
}

fn has_res5_head(detector: Detector) -> bool {
    matches!(detector, Detector::MaskC4 | Detector::VocC4)
}

fn detectron2(row: &Row, network: Network) -> String {
    let (title, stem, base) = (row.title(network), row.stem(network), row.detector.base());
    let (iterations, [first, second]) = (row.iterations, row.steps);
    let data = match row.percent {
        Some(percent) => format!("DATASETS:\n  TRAIN: [coco_2017_train.{percent}pct.seed0]\n"),
        None => String::new(),
    };
    format!(
        "# {title}.\n_BASE_: base-{base}.yaml\n{data}SOLVER:\n  MAX_ITER: {iterations}\n  STEPS: \
         [{first}, {second}]\nOUTPUT_DIR: runs/{stem}\n"
    )
}

/// A row for `train.py` of the torchvision folder.
#[derive(Serialize)]
struct Torchvision {
    title: String,
    detector: &'static str,
    backbone: String,
    classes: u32,
    train: Set,
    test: Set,
    short_sides: [u32; 6],
    test_short_side: u32,
    long_side: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    proposals: Option<u32>,
    batch: u32,
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    warmup: u32,
    warmup_factor: f64,
    iterations: u32,
    steps: [u32; 2],
    precise_bn: u32,
    workers: u32,
}

/// Images and their annotations, below COCO's folder. A subset's annotations lie in the folder of the config.
#[derive(Serialize)]
struct Set {
    annotations: String,
    images: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    subset: Option<String>,
}

fn torchvision(row: &Row, network: Network) -> String {
    let (detector, annotations, proposals) = match row.detector {
        Detector::KeypointFpn => ("keypoint_rcnn", "person_keypoints", Some(1_500)),
        Detector::RetinaNet => ("retinanet", "instances", None),
        // Others are refused before.
        _ => ("mask_rcnn", "instances", Some(1_000)),
    };
    let set = |name: &str, subset| Set {
        annotations: format!("annotations/{annotations}_{name}.json"),
        images: name.to_owned(),
        subset,
    };
    let (warmup, warmup_factor) = row.detector.warm_up();
    let config = Torchvision {
        title: row.title(network),
        detector,
        backbone: format!("resnet{}", network.depth),
        classes: if row.detector == Detector::KeypointFpn { 1 } else { 80 },
        train: set("train2017", row.subset()),
        test: set("val2017", None),
        short_sides: [640, 672, 704, 736, 768, 800],
        test_short_side: 800,
        long_side: 1_333,
        proposals,
        batch: 16,
        lr: row.detector.rate(),
        momentum: 0.9,
        weight_decay: 1e-4,
        warmup,
        warmup_factor,
        iterations: row.iterations,
        steps: row.steps,
        precise_bn: 200,
        workers: 4,
    };
    // A struct of numbers and text has no way to fail.
    let text = serde_json::to_string_pretty(&config).unwrap_or_default();
    format!("{text}\n")
}

fn mmdet(row: &Row, network: Network) -> String {
    let (title, base, rate) = (row.title(network), row.detector.base(), row.detector.rate());
    let (iterations, [first, second]) = (row.iterations, row.steps);
    let (warm_up, factor) = row.detector.warm_up();
    // The base of Sparse R-CNN counts epochs, and has its own optimizer.
    let (anew, optimizer) = match row.detector {
        Detector::Sparse => ("_delete_=True, ", String::new()),
        _ => (
            "",
            format!(
                "optim_wrapper = dict(\n    type=\"OptimWrapper\",\n    optimizer=dict(type=\"SGD\", \
                 lr={rate}, momentum=0.9, weight_decay=0.0001),\n    \
                 paramwise_cfg=dict(norm_decay_mult=0.0),\n)\n"
            ),
        ),
    };
    let data = match row.subset() {
        Some(subset) => format!(
            "train_dataloader = dict(\n    dataset=dict(\n        data_root=\"\",\n        \
             ann_file=\"{subset}\",\n        data_prefix=dict(img=\"data/coco/train2017/\"),\n    \
             )\n)\n"
        ),
        None => String::new(),
    };
    format!(
        "\"\"\"{title}.\"\"\"\n\n_base_ = \"base-{base}.py\"\n{data}train_cfg = \
         dict({anew}type=\"IterBasedTrainLoop\", max_iters={iterations}, \
         val_interval={iterations})\nval_cfg = dict(type=\"ValLoop\")\ntest_cfg = \
         dict(type=\"TestLoop\")\n{optimizer}param_scheduler = [\n    dict(type=\"LinearLR\", \
         start_factor={factor}, by_epoch=False, begin=0, end={warm_up}),\n    \
         dict(type=\"MultiStepLR\", by_epoch=False, begin=0, end={iterations}, \
         milestones=[{first}, {second}], gamma=0.1),\n]\ndefault_hooks = \
         dict(checkpoint=dict(by_epoch=False, interval=5000))\nlog_processor = \
         dict(by_epoch=False)\n"
    )
}
