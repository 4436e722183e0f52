//! `detco export`.

use std::path::PathBuf;

use crate::export_format::Format;

/// Export a run's backbone for other programs.
///
/// The file holds the backbone of the query encoder and nothing else: no heads, no queues, no fc.
/// It appears whole or not at all.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The run's folder.
    pub run: PathBuf,

    /// File to write: .safetensors, .pth or .pt; .pkl for detectron2.
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,

    /// Names of the tensors: torchvision's, which timm and mmdetection use too, or detectron2's.
    #[arg(long, value_enum, default_value_t = Format::Torchvision)]
    pub format: Format,

    /// Which checkpoint: latest, a name (step-000001200) or a step (1200).
    #[arg(long, value_name = "NAME", default_value = "latest")]
    pub checkpoint: String,

    /// Export the key encoder's backbone (the moving average) instead of the query encoder's.
    #[arg(long, visible_alias = "key")]
    pub key_encoder: bool,
}

const EXAMPLES: &str = "\
Examples:
  detco export runs/a -o backbone.safetensors
  detco export runs/a -o backbone.pth --checkpoint step-000100000
  detco export runs/a -o backbone.pkl --format detectron2

It prints the lines of torchvision, mmdetection or detectron2 that fit the backbone. For detectron2:
  MODEL.WEIGHTS: backbone.pkl, MODEL.RESNETS.DEPTH: 50, MODEL.RESNETS.STRIDE_IN_1X1: False,
  MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53], MODEL.PIXEL_STD: [58.395, 57.12, 57.375],
  INPUT.FORMAT: RGB; with DEPTH 18 or 34 MODEL.RESNETS.RES2_OUT_CHANNELS: 64 as well.
Nobody else has a CIFAR stem (model.stem = \"cifar\"): no config of theirs fits such a backbone.";

/// Reads the checkpoint and writes the file.
#[cfg(feature = "train")]
pub fn run(args: &Args) -> anyhow::Result<()> {
    let hint = "export holds the checkpoint's model.safetensors twice";
    super::with_libtorch(hint, || export(args))
}

#[cfg(feature = "train")]
fn export(args: &Args) -> anyhow::Result<()> {
    use std::io::Write;

    use crate::checkpoint;
    use crate::export::{self, Encoder, Origin};

    // Before anything is read: a wrong extension should not cost the reading of a checkpoint.
    export::check(&args.out, args.format)?;
    super::check_folder(&args.out)?;
    let saved = checkpoint::open(&args.run, Some(&args.checkpoint))?;
    let (encoder, name) = match args.key_encoder {
        false => (Encoder::Query, "query"),
        true => (Encoder::Key, "key"),
    };
    let backbone = export::backbone(&saved.model_tensors()?, encoder)?;
    let state = &saved.state;
    let origin = Origin {
        detco: env!("CARGO_PKG_VERSION").into(),
        backbone: format!("{:?}", state.config.model.backbone).to_lowercase(),
        encoder: name.into(),
        recipe: state.config.base.clone(),
        epoch: state.cursor.epoch,
        step: state.step,
    };
    export::write(&args.out, args.format, &backbone, &origin)?;
    note!("{}", export::hints::hint(args.format, &state.config.model, &args.out));
    let elements: usize = backbone.iter().map(|(_, tensor)| tensor.numel()).sum();
    writeln!(
        crate::console::stdout(),
        "{}: {} {name} backbone, {} tensors, {elements} numbers, from {}",
        args.out.display(),
        origin.backbone,
        backbone.len(),
        saved.folder.display()
    )?;
    Ok(())
}
