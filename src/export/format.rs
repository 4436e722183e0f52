//! The formats that weights are exported in, as the command line names them. Needs no libtorch.

/// The names of the tensors and the container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// torchvision's names (timm's ResNets have the same): .safetensors, .pth or .pt
    #[default]
    Torchvision,
    /// detectron2's names, in a .pkl that its checkpointer reads
    Detectron2,
}
