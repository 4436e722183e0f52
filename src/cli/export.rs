//! `detco export`.

use std::path::PathBuf;

use crate::export_format::{Format, Table};

/// Export a run's backbone for other programs.
///
/// The file holds the backbone of the query encoder and nothing else: no heads, no queues, no fc. With --configs it
/// lies in a folder with all that another engine needs to train the detectors of the paper's tables. Either appears
/// whole or not at all.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The run's folder, or a file of weights: .safetensors, .pth (of any torch) or .pkl; ours, torchvision's, MoCo's,
    /// detectron2's and others' (see `detco train --help`, --init).
    pub run: PathBuf,

    /// File to write: .safetensors, .pth or .pt; .pkl for detectron2.
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["configs", "tables"])]
    pub out: Option<PathBuf>,

    /// Names of the tensors: torchvision's, which timm and mmdetection use too, or detectron2's. With --configs the
    /// engine that trains.
    #[arg(long, value_enum, default_value_t = Format::Torchvision)]
    pub format: Format,

    /// Folder to write, not there yet or empty: weights, a config for each row of the paper's tables, check.py, which
    /// compares the stages inside a detector with ours, train.py, and README.md with the published values.
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    pub configs: Option<PathBuf>,

    /// Tables of the paper to write configs of [default: all that the engine and the backbone fit].
    #[arg(
        long,
        value_enum,
        value_name = "N,N",
        value_delimiter = ',',
        requires = "configs",
        conflicts_with = "out"
    )]
    pub tables: Vec<Table>,

    /// Which checkpoint: latest, a name (step-000001200) or a step (1200).
    #[arg(long, value_name = "NAME", default_value = "latest")]
    pub checkpoint: String,

    /// Export the key encoder's backbone (the moving average) instead of the query encoder's.
    #[arg(long, visible_alias = "key")]
    pub key_encoder: bool,

    /// For a file of weights: the prefix of the backbone's names, where the file holds several backbones and you want
    /// another than the trained one (`module.encoder_k.`).
    #[arg(long, value_name = "PREFIX")]
    pub init_prefix: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  detco export runs/a -o backbone.safetensors
  detco export runs/a -o backbone.pth --checkpoint step-000100000
  detco export runs/a -o backbone.pkl --format detectron2
  detco export runs/a --format detectron2 --configs detectors
  detco export moco_v2_200ep.pth.tar --format detectron2 --configs moco --tables 2,7

It prints the lines of torchvision, mmdetection or detectron2 that fit the backbone. For detectron2:
  MODEL.WEIGHTS: backbone.pkl, MODEL.RESNETS.DEPTH: 50, MODEL.RESNETS.STRIDE_IN_1X1: False,
  MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53], MODEL.PIXEL_STD: [58.395, 57.12, 57.375],
  INPUT.FORMAT: RGB; with DEPTH 18 or 34 MODEL.RESNETS.RES2_OUT_CHANNELS: 64 as well.
Nobody else has a CIFAR stem (model.stem = \"cifar\"): no config of theirs fits such a backbone.

Configs are for ResNet-18, 34, 50 and 101 of the usual width; C4 detectors need ResNet-50 or 101. detectron2 has every
row (table 4 with the code of Sparse R-CNN), torchvision no C4 and no Sparse R-CNN, mmdetection no Keypoint R-CNN. Those
for mmdetection have not yet been run with mmcv's own operations.";

/// Reads the checkpoint and writes the file or folder.
#[cfg(feature = "train")]
pub fn run(args: &Args) -> anyhow::Result<()> {
    let hint = "export holds the checkpoint's model.safetensors twice";
    super::with_libtorch(hint, || made::export(args))
}

#[cfg(feature = "train")]
mod made {
    use std::io::Write;
    use std::path::Path;

    use anyhow::{Context, bail};
    use tch::Tensor;

    use super::Args;
    use crate::config::Model;
    use crate::console::{self, plural};
    use crate::export::configs::{self, Plan};
    use crate::export::{self, Encoder, Origin, hints};
    use crate::{checkpoint, weights};

    /// A backbone to export.
    struct Backbone {
        tensors: Vec<(String, Tensor)>,
        shape: Model,
        origin: Origin,
        /// Where it is from, for people.
        place: String,
    }

    pub(super) fn export(args: &Args) -> anyhow::Result<()> {
        match (&args.configs, &args.out) {
            (Some(folder), _) => folder_of_configs(args, folder),
            (None, Some(out)) => file(args, out),
            (None, None) => bail!("name a file (-o) or a folder (--configs)"),
        }
    }

    fn file(args: &Args, out: &Path) -> anyhow::Result<()> {
        // Before anything is read: a wrong extension should not cost the reading of a checkpoint.
        export::check(out, args.format)?;
        crate::cli::check_folder(out)?;
        let backbone = read(args)?;
        export::write(out, args.format, &backbone.tensors, &backbone.origin)?;
        note!("{}", hints::hint(args.format, &backbone.shape, out));
        say(out, &backbone)
    }

    fn folder_of_configs(args: &Args, folder: &Path) -> anyhow::Result<()> {
        configs::check(folder)?;
        crate::cli::check_folder(folder)?;
        let Backbone { shape, tensors, origin, .. } = &read(args)?;
        let plan = Plan::new(args.format, shape, &args.tables)?;
        plan.write(folder, shape, tensors, origin)?;
        for (name, why) in plan.refused() {
            note!("no {name}: {why}");
        }
        let count = plural(plan.names().len() as u64, "config");
        writeln!(
            console::stdout(),
            "{}: {count} for {}; README.md there says how to go on",
            folder.display(),
            origin.backbone
        )?;
        Ok(())
    }

    fn say(out: &Path, backbone: &Backbone) -> anyhow::Result<()> {
        let Backbone { tensors, origin, place, .. } = backbone;
        let elements: usize = tensors.iter().map(|(_, tensor)| tensor.numel()).sum();
        let encoder = match origin.encoder.as_str() {
            "" => String::new(),
            encoder => format!("{encoder} "),
        };
        writeln!(
            console::stdout(),
            "{}: {} {encoder}backbone, {} tensors, {elements} numbers, from {place}",
            out.display(),
            origin.backbone,
            tensors.len(),
        )?;
        Ok(())
    }

    fn read(args: &Args) -> anyhow::Result<Backbone> {
        if args.run.is_file() { of_file(args) } else { of_run(args) }
    }

    fn of_file(args: &Args) -> anyhow::Result<Backbone> {
        let place = args.run.display().to_string();
        if args.key_encoder || args.checkpoint != "latest" {
            bail!("{place} is a weights file: --key-encoder and --checkpoint are for runs");
        }
        let read = weights::read_backbone(&args.run, args.init_prefix.as_deref())?;
        note!("{place}: {}", read.describe());
        let shape = weights::shape(&read.tensors)
            .with_context(|| format!("{place}: not the shape of a ResNet-18, 34, 50 or 101"))?;
        let origin = Origin { file: Some(place.clone()), ..origin(&shape) };
        Ok(Backbone { tensors: read.tensors, shape, origin, place })
    }

    fn of_run(args: &Args) -> anyhow::Result<Backbone> {
        if args.init_prefix.is_some() {
            bail!("{} is a run: --init-prefix is for weights files", args.run.display());
        }
        let saved = checkpoint::open(&args.run, Some(&args.checkpoint))?;
        let (encoder, name) = match args.key_encoder {
            false => (Encoder::Query, "query"),
            true => (Encoder::Key, "key"),
        };
        let tensors = export::backbone(&saved.model_tensors()?, encoder)?;
        let (state, shape) = (&saved.state, saved.state.config.model.clone());
        let origin = Origin {
            encoder: name.into(),
            recipe: state.config.base.clone(),
            epoch: state.cursor.epoch,
            step: state.step,
            ..origin(&shape)
        };
        Ok(Backbone { tensors, shape, origin, place: saved.folder.display().to_string() })
    }

    fn origin(shape: &Model) -> Origin {
        Origin {
            detco: env!("CARGO_PKG_VERSION").into(),
            backbone: format!("{:?}", shape.backbone).to_lowercase(),
            ..Origin::default()
        }
    }
}
