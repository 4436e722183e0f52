//! Whose backbone is measured.

use std::path::PathBuf;

/// Whose backbone is measured: what the subcommands have in common.
#[derive(clap::Args, Debug)]
pub struct BackboneArgs {
    /// The run's folder, or a weights file: .safetensors, .pth (of any torch) or .pkl; ours,
    /// torchvision's, MoCo's, detectron2's and others' (see `detco train --help`, --init).
    pub run: PathBuf,

    /// Which checkpoint: latest, a name (step-000001200) or a step (1200).
    #[arg(long, value_name = "NAME", default_value = "latest", conflicts_with = "init")]
    pub checkpoint: String,

    /// Use the weights that the run started from, before any training, for comparison.
    #[arg(long, conflicts_with = "key")]
    pub init: bool,

    /// For a weights file: the prefix of the backbone's names, where the file holds several backbones and
    /// you want another than the trained one (`module.encoder_k.`).
    #[arg(long, value_name = "PREFIX")]
    pub init_prefix: Option<String>,

    /// Measure the key encoder (the moving average) instead of the query encoder.
    #[arg(long, visible_alias = "key-encoder")]
    pub key: bool,
}

#[cfg(feature = "train")]
pub(super) use self::opened::Backbone;

#[cfg(feature = "train")]
mod opened {
    use anyhow::{Context, anyhow, bail};
    use detco_shards::limits;
    use tch::Device;

    use super::BackboneArgs;
    use crate::checkpoint;
    use crate::config::{self, Config, Stem};
    use crate::device;
    use crate::model::{Encoder, Model};
    use crate::{eval, train, weights};

    /// A backbone to measure.
    pub(in crate::cli::eval) struct Backbone {
        model: Model,
        key: bool,
        /// Edge of the crops that it was trained on, in pixels.
        pub(in crate::cli::eval) size: u32,
        /// What it is, for people.
        pub(in crate::cli::eval) what: String,
        /// The run's configuration; of a weights file only the backbone's shape is its own.
        pub(in crate::cli::eval) config: Config,
    }

    impl Backbone {
        /// The encoder that is measured.
        pub(in crate::cli::eval) fn encoder(&self) -> &Encoder {
            match &self.model.key {
                Some(key) if self.key => key,
                _ => &self.model.query,
            }
        }

        /// The same, to change its statistics.
        pub(in crate::cli::eval) fn encoder_mut(&mut self) -> &mut Encoder {
            match &mut self.model.key {
                Some(key) if self.key => key,
                _ => &mut self.model.query,
            }
        }

        /// SHA-256 of the backbone's tensors, in hexadecimal: what it is, whatever file it came from.
        pub(in crate::cli::eval) fn digest(&self) -> anyhow::Result<String> {
            Ok(eval::digest(&self.encoder().backbone_tensors())?)
        }
    }

    impl BackboneArgs {
        /// Reads the backbone.
        pub(in crate::cli::eval) fn open(&self) -> anyhow::Result<Backbone> {
            device::check_threads().map_err(|error| {
                anyhow!("cannot start a thread: {error}{}", limits::of_threads(&error))
            })?;
            if self.run.is_file() { self.of_file() } else { self.of_run() }
        }

        fn of_file(&self) -> anyhow::Result<Backbone> {
            let run = self.run.display();
            if self.init || self.key || self.checkpoint != "latest" {
                bail!("{run} is a weights file: --init, --key and --checkpoint are for runs");
            }
            let backbone = weights::read_backbone(&self.run, self.init_prefix.as_deref())?;
            note!("{run}: {}", backbone.describe());
            let backbone = backbone.tensors;
            let shape = weights::shape(&backbone)
                .with_context(|| format!("{run}: not the shape of a ResNet-18, 34, 50 or 101"))?;
            let size = if shape.stem == Stem::Cifar { 32 } else { 224 };
            let config = Config { model: shape, ..Config::default() };
            let mut model = Model::bare(&config, device(&config)?)?;
            model.start_from(&backbone).with_context(|| run.to_string())?;
            Ok(Backbone { model, key: false, size, what: run.to_string(), config })
        }

        fn of_run(&self) -> anyhow::Result<Backbone> {
            let run = self.run.display();
            if self.init_prefix.is_some() {
                bail!("{run} is a run: --init-prefix is for weights files");
            }
            let saved = match self.init {
                // There need not be a checkpoint yet.
                true => None,
                false => Some(checkpoint::open(&self.run, Some(&self.checkpoint))?),
            };
            let config = match &saved {
                Some(saved) => saved.state.config.clone(),
                None => Config::of_run(&self.run)?,
            };
            let mut model = Model::new(&config, device(&config)?)?;
            if self.key && model.key.is_none() {
                bail!("--key: the run's method has no key encoder");
            }
            let what = match &saved {
                None => {
                    train::start_from(&mut model, &config.model)?;
                    format!("{run} before training")
                }
                Some(saved) => {
                    model.load(&saved.model_tensors()?)?;
                    let encoder = if self.key { ", key encoder" } else { "" };
                    format!("{run} after step {}{encoder}", saved.state.step)
                }
            };
            Ok(Backbone { model, key: self.key, size: config.crop_size(), what, config })
        }
    }

    /// Evaluation goes where there is a GPU unless the run was told to stay on the CPU: the figure
    /// is the same up to rounding.
    fn device(config: &Config) -> anyhow::Result<Device> {
        let wanted = match config.train.device {
            config::Device::Cpu => config::Device::Cpu,
            config::Device::Auto | config::Device::Cuda => config::Device::Auto,
        };
        Ok(device::find(wanted)?.device)
    }
}
