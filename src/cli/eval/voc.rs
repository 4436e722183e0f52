//! What `detco eval svm` and `detco eval lowshot` share: a folder of PASCAL VOC to labels and features.

use std::path::PathBuf;

use super::backbone::BackboneArgs;

/// Options of both.
#[derive(clap::Args, Debug)]
pub struct VocArgs {
    /// Whose backbone.
    #[command(flatten)]
    pub backbone: BackboneArgs,

    /// Folder of PASCAL VOC as it comes, with JPEGImages and ImageSets/Main: trainval trains, test tests.
    #[arg(long, value_name = "VOC2007")]
    pub voc: PathBuf,

    /// Stages whose maps are classified, each by itself: 2 to 5.
    #[arg(
        long, value_name = "N,…", value_delimiter = ',', default_value = "5",
        value_parser = clap::value_parser!(u8).range(2..=5)
    )]
    pub levels: Vec<u8>,

    /// Costs C of the machines: openselfsup has 19 (1, 10, 100, 0.5^4 … 0.5^19), vissl 11 (0.01 … 1000).
    #[arg(long, value_name = "LIST", default_value = "openselfsup")]
    pub costs: Costs,

    /// Print the report as JSON, for `detco eval compare`.
    #[arg(long)]
    pub json: bool,
}

/// Lists of costs.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Costs {
    /// OpenSelfSup's and mmselfsup's.
    Openselfsup,
    /// VISSL's.
    Vissl,
}

#[cfg(feature = "train")]
pub(super) use self::prepared::{Prepared, prepare, settings};

#[cfg(feature = "train")]
mod prepared {
    use std::ops::ControlFlow;
    use std::path::PathBuf;

    use anyhow::{Context, bail};
    use detco_shards::views::Recipe;
    use serde_json::{Map, Value, json};
    use tch::Tensor;

    use super::{Costs, VocArgs};
    use crate::cli::eval::backbone::Backbone;
    use crate::console::plural;
    use crate::eval::features::Pool;
    use crate::eval::pictures;
    use crate::eval::svm::{COSTS_VISSL, costs_openselfsup};
    use crate::eval::voc::{IMAGES_2007, Split};

    /// Short side that images are resized to, and the edge that they are then squashed to.
    const SQUASH: [u32; 2] = [256, 224];

    impl Costs {
        /// The name in reports.
        pub(in crate::cli::eval) fn name(self) -> &'static str {
            match self {
                Costs::Openselfsup => "openselfsup",
                Costs::Vissl => "vissl",
            }
        }

        /// The costs, in the list's order.
        pub(in crate::cli::eval) fn list(self) -> Vec<f64> {
            match self {
                Costs::Openselfsup => costs_openselfsup(),
                Costs::Vissl => COSTS_VISSL.to_vec(),
            }
        }
    }

    /// Labels, features, and what they came from.
    pub(in crate::cli::eval) struct Prepared {
        pub(in crate::cli::eval) train: Split,
        pub(in crate::cli::eval) test: Split,
        /// Level, rows of train, rows of test.
        pub(in crate::cli::eval) rows: Vec<(u8, Tensor, Tensor)>,
        pub(in crate::cli::eval) what: String,
        pub(in crate::cli::eval) sha256: String,
        /// Counts and splits, for the report.
        pub(in crate::cli::eval) data: Map<String, Value>,
    }

    /// What changes a figure, for the report.
    pub(in crate::cli::eval) fn settings(args: &VocArgs) -> Map<String, Value> {
        let [short, edge] = SQUASH;
        let all = json!({
            "images": format!("short side {short}, squashed to {edge}, Pillow's bilinear"),
            "pool": Pool::Grid.name(),
            "rows": "over their length + 1e-5",
            "machine": "squared hinge, l2 with the bias, positive samples twice as heavy, at its minimum",
            "costs": args.costs.list(),
        });
        match all {
            Value::Object(all) => all,
            _ => Map::new(),
        }
    }

    /// Reads labels, checks the sets, and makes features of all images.
    pub(in crate::cli::eval) fn prepare(args: &VocArgs) -> anyhow::Result<Prepared> {
        let [train, test] = IMAGES_2007.map(|(split, images)| {
            let read = Split::read(&args.voc, split)?;
            let found = read.images.len();
            if found != images {
                note!(
                    "note: {split} has {}, and VOC 2007's has {images}: figures do not compare with published ones",
                    plural(found as u64, "image")
                );
            }
            anyhow::Ok(read)
        });
        let (train, test) = (train?, test?);
        if train.classes != test.classes {
            let missing = |a: &Split, b: &Split| {
                a.classes.iter().find(|class| !b.classes.contains(class)).cloned()
            };
            let (class, has, lacks) = match missing(&train, &test) {
                Some(class) => (class, "trainval", "test"),
                None => (missing(&test, &train).unwrap_or_default(), "test", "trainval"),
            };
            let lists = args.voc.join("ImageSets/Main");
            bail!(
                "{}: there is {class}_{has}.txt and no {class}_{lacks}.txt: expected the same classes in both",
                lists.display()
            );
        }
        let files = [train.files(&args.voc), test.files(&args.voc)];
        pictures::check_apart(&files[0], &files[1])?;
        let backbone = args.backbone.open()?;
        let sha256 = backbone.digest()?;
        let mut levels = args.levels.clone();
        levels.sort_unstable();
        levels.dedup();
        let [of_train, of_test] = rows(&backbone, &files, &levels)?;
        if backbone.digest()? != sha256 {
            bail!("the backbone's tensors changed while features were made");
        }
        let rows = of_train.into_iter().zip(of_test);
        let rows = rows.map(|((level, train), (_, test))| (level, train, test)).collect();
        let data = json!({
            "folder": args.voc.file_name().map(|name| name.to_string_lossy().into_owned()),
            "train": { "split": "trainval", "images": train.images.len() },
            "test": { "split": "test", "images": test.images.len() },
            "classes": train.classes,
        });
        let data = data.as_object().cloned().unwrap_or_default();
        Ok(Prepared { train, test, rows, what: backbone.what.clone(), sha256, data })
    }

    type Levels = Vec<(u8, Tensor)>;

    fn rows(
        backbone: &Backbone,
        files: &[Vec<PathBuf>; 2],
        levels: &[u8],
    ) -> anyhow::Result<[Levels; 2]> {
        let bar = crate::cli::eval::bar("features");
        bar.set_length(files.iter().map(|files| files.len() as u64).sum());
        let encoder = backbone.encoder();
        let recipe = Recipe::squash(SQUASH[0], SQUASH[1]);
        let mut before = 0;
        let mut of = |files: &[PathBuf]| {
            let mut watch = |done: usize| {
                bar.set_position((before + done) as u64);
                ControlFlow::Continue(())
            };
            let wanted = (levels, Pool::Grid);
            let rows = pictures::features(encoder, files, &recipe, wanted, &mut watch)?;
            before += files.len();
            rows.context("stopped")
        };
        let both = [of(&files[0])?, of(&files[1])?];
        bar.finish_and_clear();
        Ok(both)
    }
}
