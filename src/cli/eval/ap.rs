//! `detco eval ap`.

use std::path::PathBuf;

/// Average precision of detections, whoever made them: COCO's twelve numbers, or PASCAL VOC's.
///
/// COCO's numbers are those of pycocotools for boxes. VOC's boxes hold the pixels at both of their ends,
/// difficult objects do not count, and AP is the mean over the overlaps 0.50 to 0.95, as detectron2 tells it.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct ApArgs {
    /// What was detected: COCO's results (a JSON list of image_id, category_id, bbox, score), or for VOC a
    /// folder of text files, one a category (`comp4_det_test_dog.txt`: image score xmin ymin xmax ymax).
    pub found: PathBuf,

    /// What is there: COCO's annotations (JSON), or a folder such as VOCdevkit/VOC2007.
    #[arg(long, value_name = "FILE|FOLDER")]
    pub truth: PathBuf,

    /// Whose definition [default: coco for a file, voc07 for a folder].
    #[arg(long, value_name = "METRIC")]
    pub metric: Option<Metric>,

    /// For VOC: the images of ImageSets/Main/SPLIT.txt.
    #[arg(long, value_name = "SPLIT", default_value = "test")]
    pub split: String,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Definitions of average precision.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Mean over ten overlaps, 101 points of recall, three sizes.
    Coco,
    /// VOC 2007: eleven points of recall.
    Voc07,
    /// VOC 2010 and later: the area below the curve.
    Voc10,
}

const EXAMPLES: &str = "\
Examples:
  detco eval ap detections.json --truth instances_val2017.json
  detco eval ap results/ --truth VOCdevkit/VOC2007                    VOC 2007's 11 points
  detco eval ap results/ --truth VOCdevkit/VOC2012 --split val --metric voc10";

#[cfg(feature = "train")]
pub(super) use self::measured::run;

#[cfg(feature = "train")]
mod measured {
    use std::io::Write as _;

    use anyhow::bail;

    use super::{ApArgs, Metric};
    use crate::console::plural;
    use crate::eval::ap::{self, Coco, OfCategory, Truth, Voc, Year};

    pub(in crate::cli::eval) fn run(args: &ApArgs) -> anyhow::Result<()> {
        let is_voc = args.truth.is_dir();
        match (args.metric, is_voc) {
            (None | Some(Metric::Coco), false) => {
                let truth = ap::coco_truth(&args.truth)?;
                let (found, unknown) = ap::coco_found(&args.found, &truth)?;
                told(&truth, unknown, "of categories that the truth has not");
                let of = ap::coco(&truth, &found);
                if args.json {
                    return print_json(&of);
                }
                print_coco(&of, &truth, found.len())
            }
            (None | Some(Metric::Voc07 | Metric::Voc10), true) => {
                let truth = ap::voc_truth(&args.truth, &args.split)?;
                let (found, unknown) = ap::voc_found(&args.found, &truth)?;
                told(&truth, unknown, "of images that are not in the split");
                let year =
                    if args.metric == Some(Metric::Voc10) { Year::Voc10 } else { Year::Voc07 };
                let of = ap::voc(&truth, &found, year);
                if args.json {
                    return print_json(&of);
                }
                print_voc(&of, &truth, found.len())
            }
            (Some(Metric::Coco), true) => {
                bail!(
                    "--metric coco needs a file of COCO's annotations, and {} is a folder",
                    args.truth.display()
                )
            }
            (Some(_), false) => {
                let truth = args.truth.display();
                bail!(
                    "--metric voc07 and voc10 need a folder such as VOCdevkit/VOC2007, and {truth} is none"
                )
            }
        }
    }

    fn told(truth: &Truth, unknown: usize, why: &str) {
        if truth.objects.is_empty() {
            note!("note: the truth has no objects: there is nothing to detect");
        }
        if unknown > 0 {
            note!("note: {} {why} left out", plural(unknown as u64, "detection"));
        }
    }

    fn print_json(of: &impl serde::Serialize) -> anyhow::Result<()> {
        writeln!(crate::console::stdout(), "{}", serde_json::to_string(of)?)?;
        Ok(())
    }

    /// A number with two digits, or a dash where there is nothing to detect.
    fn shown(value: Option<f64>) -> String {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
    }

    fn print_coco(of: &Coco, truth: &Truth, found: usize) -> anyhow::Result<()> {
        let mut out = crate::console::stdout();
        let [ap, ap50, ap75] = [of.ap, of.ap50, of.ap75].map(shown);
        let [small, medium, large] = [of.ap_small, of.ap_medium, of.ap_large].map(shown);
        let sizes = size(truth, found);
        writeln!(
            out,
            "AP {ap}, AP50 {ap50}, AP75 {ap75}; small {small}, medium {medium}, large {large}  ({sizes})"
        )?;
        let [one, ten, most] = [of.ar_1, of.ar_10, of.ar_100].map(shown);
        let [small, medium, large] = [of.ar_small, of.ar_medium, of.ar_large].map(shown);
        writeln!(
            out,
            "AR with 1 detection {one}, 10 {ten}, 100 {most}; small {small}, medium {medium}, large {large}"
        )?;
        categories(&mut out, &of.categories)
    }

    fn print_voc(of: &Voc, truth: &Truth, found: usize) -> anyhow::Result<()> {
        let mut out = crate::console::stdout();
        let [ap, ap50, ap75] = [of.ap, of.ap50, of.ap75].map(shown);
        let name = match of.year {
            Year::Voc07 => "voc07",
            Year::Voc10 => "voc10",
        };
        writeln!(out, "AP50 {ap50}, AP {ap}, AP75 {ap75}  ({name}; {})", size(truth, found))?;
        categories(&mut out, &of.categories)
    }

    fn size(truth: &Truth, found: usize) -> String {
        format!(
            "{} for {} in {}, {} categories",
            plural(found as u64, "detection"),
            plural(truth.objects.len() as u64, "object"),
            plural(truth.images.len() as u64, "image"),
            truth.categories.len()
        )
    }

    fn categories(out: &mut impl std::io::Write, of: &[OfCategory]) -> anyhow::Result<()> {
        let width = of.iter().map(|one| one.name.chars().count()).max().unwrap_or(0);
        for OfCategory { name, ap, ap50 } in of {
            writeln!(out, "  {name:<width$}  AP {:>6}  AP50 {:>6}", shown(*ap), shown(*ap50))?;
        }
        Ok(())
    }
}
