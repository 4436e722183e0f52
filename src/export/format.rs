//! The formats that weights are exported in and the tables whose detectors are configured, as the command line names
//! them. Needs no libtorch.

/// The names of the tensors and the container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// torchvision's names (timm's ResNets have the same): .safetensors, .pth or .pt
    #[default]
    Torchvision,
    /// detectron2's names, in a .pkl that its checkpointer reads
    Detectron2,
    /// mmdetection's names, which are torchvision's, in a .pth
    Mmdet,
}

/// A table of the DetCo paper (ICCV 2021) whose figures are of detectors on top of the backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Table {
    /// COCO, Mask R-CNN C4 and FPN, 12,000 iterations
    #[value(name = "2")]
    Short,
    /// COCO, Mask R-CNN C4 and FPN, 90,000 iterations
    #[value(name = "3")]
    Long,
    /// COCO, Sparse R-CNN, 270,000 iterations
    #[value(name = "4")]
    Sparse,
    /// COCO, RetinaNet and Keypoint R-CNN
    #[value(name = "7")]
    OneStage,
    /// COCO, RetinaNet with 1, 2, 5 and 10 % of the labels
    #[value(name = "8")]
    FewLabels,
    /// PASCAL VOC 07+12, Faster R-CNN C4, 24,000 iterations
    #[value(name = "9")]
    Voc,
}

impl Table {
    /// Its number in the paper.
    pub fn number(self) -> u8 {
        match self {
            Table::Short => 2,
            Table::Long => 3,
            Table::Sparse => 4,
            Table::OneStage => 7,
            Table::FewLabels => 8,
            Table::Voc => 9,
        }
    }
}
