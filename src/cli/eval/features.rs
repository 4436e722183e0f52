//! `detco eval features`.

use std::path::PathBuf;

use super::{BackboneArgs, workers};
use crate::cli::CacheArgs;

/// The features of a frozen backbone as a file, for anybody's probe.
///
/// Of each sample the network sees the centre, and the maps of the levels asked for are pooled to rows. The file is
/// .safetensors: res2 to res5, float32, a row a sample; labels, int64, -1 without a class; keys as bytes, each ended by
/// a zero.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct FeaturesArgs {
    /// Whose backbone.
    #[command(flatten)]
    pub backbone: BackboneArgs,

    /// Shards, with or without labels: folders, globs, brace lists, tars, or URLs of those.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub data: Vec<String>,

    /// The file to write: .safetensors.
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    /// Levels, from 2 for Res2 to 5 for Res5.
    #[arg(long, value_name = "L,L", value_delimiter = ',', default_value = "5",
          value_parser = clap::value_parser!(u8).range(2..=5))]
    pub levels: Vec<u8>,

    /// How a map becomes a row.
    #[arg(long, value_name = "HOW", default_value = "average")]
    pub pool: Pooling,

    /// Edge of the images in pixels [default: the run's global crops; for a file 224, or 32 with a
    /// CIFAR stem].
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(8..=4096))]
    pub size: Option<u32>,

    /// At most this many samples, evenly spaced; 0 means all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub samples: u64,

    /// Decode threads; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = workers)]
    pub workers: usize,

    /// Where shards from URLs are kept.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// How a map becomes a row.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The average over all places.
    Average,
    /// Averages over a grid, about 9,000 numbers a map: the windows of VISSL and OpenSelfSup.
    Grid,
}

const EXAMPLES: &str = "\
Examples:
  detco eval features runs/a --data shards/val -o val.safetensors
  detco eval features runs/a --data shards/train --levels 2,3,4,5 --pool grid -o train.safetensors";

#[cfg(feature = "train")]
pub(super) use self::made::run;

#[cfg(feature = "train")]
mod made {
    use std::io::Write as _;

    use anyhow::bail;
    use serde_json::{Map, json};

    use super::{FeaturesArgs, Pooling};
    use crate::cli::eval::{bar, labelled};
    use crate::eval::features::{self, Look, Pool, Wanted};

    impl From<Pooling> for Pool {
        fn from(pooling: Pooling) -> Pool {
            match pooling {
                Pooling::Average => Pool::Average,
                Pooling::Grid => Pool::Grid,
            }
        }
    }

    pub(in crate::cli::eval) fn run(args: &FeaturesArgs) -> anyhow::Result<()> {
        if args.output.extension().is_none_or(|extension| extension != "safetensors") {
            bail!("-o {}: features are written as .safetensors", args.output.display());
        }
        let backbone = args.backbone.open()?;
        let set = labelled("data", &args.data, &args.cache)?;
        let mut levels = args.levels.clone();
        levels.sort_unstable();
        levels.dedup();
        let size = args.size.unwrap_or(backbone.size);
        let look = Look { size, workers: args.workers, ..Look::default() };
        let pool = Pool::from(args.pool);
        let digest = backbone.digest()?;
        let about = Map::from_iter([
            ("weights".into(), json!(backbone.what)),
            ("sha256".into(), json!(digest)),
            ("size".into(), json!(size)),
            ("share".into(), json!(look.share())),
            ("pool".into(), json!(pool.name())),
        ]);
        let wanted = Wanted { levels: &levels, pool, look, samples_max: args.samples, about };
        let bar = bar("features");
        let written =
            features::write(&args.output, backbone.encoder(), &set, &wanted, &mut |done, total| {
                bar.set_length(total);
                bar.set_position(done);
            });
        bar.finish_and_clear();
        let (n, widths) = written?;
        let shapes = levels.iter().zip(widths).map(|(level, width)| format!("res{level} {width}"));
        let shapes = shapes.collect::<Vec<_>>().join(", ");
        let (path, what) = (args.output.display(), &backbone.what);
        let n = crate::console::plural(n, "sample");
        writeln!(
            crate::console::stdout(),
            "{path}: {n}, numbers of each: {shapes}  ({what}; {} pooled, images of {size} px)",
            pool.name()
        )?;
        Ok(())
    }
}
