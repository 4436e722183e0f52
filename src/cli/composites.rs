//! What composite scenes are made of, and `detco data composites`.

use std::path::PathBuf;

use crate::cli::CacheArgs;

/// Material of composite scenes.
#[derive(clap::Args, Debug)]
pub struct CompositeArgs {
    /// Composite scenes: labelled shards of small pictures, such as CIFAR-10, to be found.
    #[arg(long, value_name = "SHARDS", num_args = 1..)]
    pub objects: Vec<String>,

    /// Composite scenes: shards of photos, for backgrounds and distractors; every fourth photo is for testing.
    #[arg(long, value_name = "SHARDS", num_args = 1..)]
    pub photos: Vec<String>,

    /// Composite scenes: labelled shards for test scenes [default: every fifth of --objects].
    #[arg(long, value_name = "SHARDS", num_args = 1.., requires = "objects")]
    pub test_objects: Vec<String>,

    /// Composite scenes: paste nothing but objects.
    #[arg(long)]
    pub no_distractors: bool,

    /// Composite scenes: seed that they are drawn from.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub scene_seed: u64,

    /// Where shards from URLs are kept.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// Composite scenes without labels, packed into shards: to pre-train for `detco eval detect --composites`.
///
/// They show what the training scenes of the detection probe show, of the same objects and photos but in other
/// arrangements; nothing of test scenes. Images are JPEGs of quality 95 without chroma subsampling.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CompositesArgs {
    /// What they are made of.
    #[command(flatten)]
    pub material: CompositeArgs,

    /// Number of scenes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub count: u64,

    /// The folder to write to: a new one, or empty.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,

    /// Edge of a scene in pixels; a multiple of 32.
    #[arg(long, value_name = "PIXELS", default_value_t = 128, value_parser = scene_size)]
    pub size: u32,

    /// Scenes of a shard.
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub shard_size: u64,

    /// Threads; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub workers: usize,
}

const EXAMPLES: &str = "\
Examples:
  detco data composites --objects cifar/train --photos photos --count 20000 -o composites
  detco train detco-small --data composites --out runs/a";

/// An edge of scenes: a multiple of 32, so that all maps fit the detector's grid.
pub(crate) fn scene_size(text: &str) -> Result<u32, String> {
    let size = text.parse().ok().filter(|size| (64..=1024).contains(size) && size % 32 == 0);
    size.ok_or_else(|| "expected a multiple of 32 from 64 to 1024".to_owned())
}

#[cfg(feature = "train")]
pub(super) use self::written::run;

#[cfg(feature = "train")]
mod made {
    use std::sync::Arc;

    use anyhow::Context as _;
    use detco_shards::stream::ShardSet;

    use super::CompositeArgs;
    use crate::eval::classes::Classes;
    use crate::eval::detect::composites::{Composites, OBJECTS_MAX, PHOTOS_MAX};
    use crate::eval::detect::layout::{OBJECT, Rules};
    use crate::eval::detect::pictures::Pictures;

    impl CompositeArgs {
        /// The first of the options that is given.
        pub(crate) fn given(&self) -> Option<&'static str> {
            let all = [
                ("--objects", !self.objects.is_empty()),
                ("--photos", !self.photos.is_empty()),
                ("--test-objects", !self.test_objects.is_empty()),
                ("--no-distractors", self.no_distractors),
                ("--scene-seed", self.scene_seed != 0),
            ];
            all.into_iter().find_map(|(name, is_given)| is_given.then_some(name))
        }

        /// Reads the material for scenes of this edge.
        pub(crate) fn read(&self, size: u32, workers: usize) -> anyhow::Result<Composites> {
            let open = |what: &str, spec: &[String]| {
                let open = || {
                    let set = ShardSet::open_with(spec, Some(&self.cache.remote()))?;
                    set.one_numbering()?;
                    set.first_bad().map_or(Ok(Arc::new(set)), Err)
                };
                open().with_context(|| format!("--{what}"))
            };
            let rules = Rules { distractors: !self.no_distractors, ..Rules::of_size(size) };
            let objects = open("objects", &self.objects)?;
            let test = match self.test_objects.is_empty() {
                true => None,
                false => Some(open("test-objects", &self.test_objects)?),
            };
            let photos = open("photos", &self.photos)?;
            let small =
                |which, set| Pictures::read(which, set, (OBJECT, OBJECTS_MAX), true, workers);
            let mut train = small("--objects", &objects)?;
            let mut of_test = test.as_ref().map(|set| small("--test-objects", set)).transpose()?;
            let names = match (&test, &mut of_test) {
                (Some(set), Some(found)) => {
                    let same = Classes::compare(objects.classes(), set.classes())
                        .map_err(crate::eval::knn::KnnError::NothingInCommon)?;
                    same.notes().iter().for_each(|note| note!("{note}"));
                    train.classes.iter_mut().for_each(|class| *class = same.of_train(*class));
                    found.classes.iter_mut().for_each(|class| *class = same.of_test(*class));
                    name(objects.classes(), &mut [&mut train, found])
                }
                _ => name(objects.classes(), &mut [&mut train]),
            };
            let edge = rules.photo();
            let photos = Pictures::read("--photos", &photos, (edge, PHOTOS_MAX), false, workers)?;
            Ok(Composites::new(rules, self.scene_seed, train, of_test, &photos, names)?)
        }
    }

    /// Makes class numbers positions among those that occur, and names them.
    fn name(names: &[String], sets: &mut [&mut Pictures]) -> Vec<String> {
        let mut known: Vec<u32> = sets.iter().flat_map(|set| set.classes.iter().copied()).collect();
        known.sort_unstable();
        known.dedup();
        for class in sets.iter_mut().flat_map(|set| &mut set.classes) {
            *class = known.partition_point(|other| other < class) as u32;
        }
        let name =
            |class: &u32| names.get(*class as usize).cloned().unwrap_or_else(|| class.to_string());
        known.iter().map(name).collect()
    }
}

#[cfg(feature = "train")]
mod written {
    use std::io::Write as _;

    use indicatif::HumanBytes;

    use super::CompositesArgs;
    use crate::cli::eval::bar;
    use crate::console::plural;
    use crate::eval::detect::files::write_shards;

    pub(in crate::cli) fn run(args: &CompositesArgs) -> anyhow::Result<()> {
        let material = &args.material;
        for (name, given) in [("objects", &material.objects), ("photos", &material.photos)] {
            if given.is_empty() {
                anyhow::bail!("--{name} is missing: composite scenes need objects and photos");
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = if args.workers == 0 { cores } else { args.workers };
        let source = material.read(args.size, workers)?;
        let bar = bar("scenes");
        bar.set_length(args.count);
        let tick = |done| bar.set_position(done);
        let counts = (args.count, args.shard_size);
        let written = write_shards(&source, &args.out, counts, workers, &tick);
        bar.finish_and_clear();
        let manifest = written?;
        writeln!(
            crate::console::stdout(),
            "{}: {} in {}, {}",
            args.out.display(),
            plural(manifest.samples, "scene"),
            plural(manifest.shards.len() as u64, "shard"),
            HumanBytes(manifest.bytes),
        )?;
        Ok(())
    }
}
