//! The rows of the paper's tables: what is trained, how long, and what was published.
//!
//! Values: the paper (Xie et al., "DetCo", ICCV 2021, tables 2, 3, 4, 7, 8 and 9), its arXiv v1 for DetCo without
//! RandAugment, and the configurations of its detection code (github.com/xieenze/DetCo, `benchmarks/detection`).

use super::super::Format;
use super::network::Network;
use crate::export_format::Table;

/// A detector and the data it is trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detector {
    MaskC4,
    MaskFpn,
    RetinaNet,
    KeypointFpn,
    VocC4,
    Sparse,
}

/// A row of a table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) table: Table,
    pub(super) detector: Detector,
    pub(super) iterations: u32,
    /// After these the learning rate is a tenth.
    pub(super) steps: [u32; 2],
    /// Percentage of the labelled images, where it is not all.
    pub(super) percent: Option<u8>,
    /// Published AP (of boxes; of keypoints for Keypoint R-CNN) from random weights, supervised ones, MoCo v2, DetCo,
    /// and DetCo with RandAugment.
    pub(super) published: [Option<f32>; 5],
}

const fn row(
    table: Table,
    detector: Detector,
    iterations: u32,
    steps: [u32; 2],
    published: [Option<f32>; 5],
) -> Row {
    Row { table, detector, iterations, steps, percent: None, published }
}

/// All five were published.
const fn all(
    random: f32,
    supervised: f32,
    moco: f32,
    detco: f32,
    with_aa: f32,
) -> [Option<f32>; 5] {
    [Some(random), Some(supervised), Some(moco), Some(detco), Some(with_aa)]
}

const fn with_labels(percent: u8, published: [Option<f32>; 5]) -> Row {
    // The paper states 12,000 iterations; that their milestones are table 7's is an assumption.
    let whole = row(Table::FewLabels, Detector::RetinaNet, 12_000, [9_000, 11_000], published);
    Row { percent: Some(percent), ..whole }
}

/// All rows, in the order of the tables.
pub(super) const ROWS: [Row; 14] = [
    row(Table::Short, Detector::MaskC4, 12_000, [9_000, 11_000], all(7.9, 27.1, 27.6, 29.3, 29.8)),
    row(
        Table::Short,
        Detector::MaskFpn,
        12_000,
        [9_000, 11_000],
        all(10.7, 28.4, 26.6, 27.9, 29.6),
    ),
    row(Table::Long, Detector::MaskC4, 90_000, [60_000, 80_000], all(26.4, 38.2, 38.9, 39.4, 39.8)),
    row(
        Table::Long,
        Detector::MaskFpn,
        90_000,
        [60_000, 80_000],
        all(31.0, 38.9, 38.9, 39.5, 40.1),
    ),
    row(
        Table::Sparse,
        Detector::Sparse,
        270_000,
        [210_000, 250_000],
        [None, Some(45.0), None, None, Some(46.5)],
    ),
    row(
        Table::OneStage,
        Detector::RetinaNet,
        12_000,
        [9_000, 11_000],
        all(4.0, 24.3, 22.2, 23.6, 25.3),
    ),
    row(
        Table::OneStage,
        Detector::RetinaNet,
        90_000,
        [60_000, 80_000],
        all(24.5, 37.4, 37.2, 38.0, 38.4),
    ),
    row(
        Table::OneStage,
        Detector::RetinaNet,
        180_000,
        [120_000, 160_000],
        all(32.2, 38.9, 39.3, 39.8, 39.7),
    ),
    row(
        Table::OneStage,
        Detector::KeypointFpn,
        180_000,
        [120_000, 160_000],
        [Some(65.9), Some(65.8), Some(66.8), Some(67.2), None],
    ),
    with_labels(1, all(1.4, 8.2, 8.4, 8.8, 9.9)),
    with_labels(2, all(2.5, 11.2, 12.0, 13.0, 13.5)),
    with_labels(5, all(3.6, 16.5, 16.8, 17.9, 18.7)),
    with_labels(10, all(3.7, 19.6, 20.0, 20.8, 21.9)),
    row(
        Table::Voc,
        Detector::VocC4,
        24_000,
        [18_000, 22_000],
        [Some(33.8), Some(53.5), Some(57.0), Some(57.8), None],
    ),
];

impl Detector {
    /// Its name, for people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Detector::MaskC4 => "Mask R-CNN C4",
            Detector::MaskFpn => "Mask R-CNN FPN",
            Detector::RetinaNet => "RetinaNet",
            Detector::KeypointFpn => "Keypoint R-CNN FPN",
            Detector::VocC4 => "Faster R-CNN C4 (VOC)",
            Detector::Sparse => "Sparse R-CNN",
        }
    }

    /// The base config's name: `base-` before it, the engine's extension behind it.
    pub(super) fn base(self) -> &'static str {
        match self {
            Detector::MaskC4 => "mask-rcnn-c4",
            Detector::MaskFpn => "mask-rcnn-fpn",
            Detector::RetinaNet => "retinanet",
            Detector::KeypointFpn => "keypoint-rcnn-fpn",
            Detector::VocC4 => "faster-rcnn-voc-c4",
            Detector::Sparse => "sparse-rcnn",
        }
    }

    /// Learning rate for a batch of 16.
    pub(super) fn rate(self) -> f64 {
        match self {
            Detector::RetinaNet => 0.01,
            Detector::Sparse => 0.000_025,
            _ => 0.02,
        }
    }

    /// Iterations over which the rate rises from `factor` of it.
    pub(super) fn warm_up(self) -> (u32, f64) {
        match self {
            Detector::VocC4 => (100, 0.001),
            Detector::Sparse => (1_000, 0.01),
            _ => (1_000, 0.001),
        }
    }
}

impl Row {
    /// The name of its config, without the extension.
    pub(super) fn stem(&self, network: Network) -> String {
        let (table, depth, thousand) =
            (self.table.number(), network.depth, self.iterations / 1_000);
        let detector = match self.detector {
            Detector::MaskC4 => format!("mask-rcnn-r{depth}-c4"),
            Detector::MaskFpn => format!("mask-rcnn-r{depth}-fpn"),
            Detector::RetinaNet => format!("retinanet-r{depth}-fpn"),
            Detector::KeypointFpn => format!("keypoint-rcnn-r{depth}-fpn"),
            Detector::VocC4 => format!("faster-rcnn-r{depth}-c4-voc"),
            Detector::Sparse => format!("sparse-rcnn-r{depth}-fpn"),
        };
        match self.percent {
            Some(percent) => format!("table{table}-{detector}-{percent}pct"),
            None => format!("table{table}-{detector}-{thousand}k"),
        }
    }

    /// What it is, for people.
    pub(super) fn title(&self, network: Network) -> String {
        let of = self.percent.map(|percent| format!(", {percent} % of the labels"));
        format!(
            "Table {}: {}, ResNet-{}, {},000 iterations{}",
            self.table.number(),
            self.detector.name(),
            network.depth,
            self.iterations / 1_000,
            of.unwrap_or_default()
        )
    }

    /// The file of a subset's annotations, as `detco data subset` names it, beside the configs.
    pub(super) fn subset(&self) -> Option<String> {
        Some(format!("subsets/instances_train2017.{}pct.seed0.json", self.percent?))
    }

    /// Why an engine cannot have it with this network.
    pub(super) fn refusal(&self, format: Format, network: Network) -> Option<&'static str> {
        match (format, self.detector) {
            (Format::Torchvision, Detector::MaskC4 | Detector::VocC4) => {
                Some("torchvision has no C4 detector")
            }
            (Format::Torchvision, Detector::Sparse) => Some("torchvision has no Sparse R-CNN"),
            (Format::Mmdet, Detector::KeypointFpn) => Some("mmdetection has no Keypoint R-CNN"),
            (_, Detector::MaskC4 | Detector::VocC4) if !network.bottleneck => {
                Some("the head of a C4 detector has bottleneck blocks: ResNet-50 and 101 only")
            }
            _ => None,
        }
    }
}
