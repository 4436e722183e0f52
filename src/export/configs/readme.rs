//! The README of a folder of configs.

use std::fmt::Write;

use super::super::{Format, Origin};
use super::Plan;

/// Its text.
pub(super) fn text(plan: &Plan, origin: &Origin) -> String {
    let (template, extension) = match plan.format {
        Format::Detectron2 => (include_str!("detectron2/readme.md"), "yaml"),
        Format::Torchvision => (include_str!("torchvision/readme.md"), "json"),
        Format::Mmdet => (include_str!("mmdet/readme.md"), "py"),
    };
    let mut rows = String::from(
        "| config | iterations (a tenth of the rate after) | random | supervised | MoCo v2 | DetCo | DetCo, RandAugment |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for row in &plan.rows {
        let published = row.published.map(|value| match value {
            Some(value) => format!("{value:.1}"),
            None => "-".into(),
        });
        let (name, [first, second]) = (row.stem(plan.network), row.steps);
        // Writing to a String cannot fail.
        let _ = writeln!(
            rows,
            "| `{name}.{extension}` | {} ({first}, {second}) | {} |",
            row.iterations,
            published.join(" | ")
        );
    }
    if plan.network.depth != 50 {
        let _ = writeln!(
            rows,
            "\nThe published values are for ResNet-50. For ResNet-{} there are none.",
            plan.network.depth
        );
    }
    let mut refused = String::new();
    if !plan.refused.is_empty() {
        refused.push_str("\nNot in this folder:\n\n");
        for (name, why) in &plan.refused {
            let _ = writeln!(refused, "- `{name}`: {why}");
        }
    }
    let first = plan.names().first().map(|name| format!("{name}.{extension}"));
    template
        .replace("@WEIGHTS@", &origin.describe())
        .replace("@FIRST@", &first.unwrap_or_default())
        .replace("@ROWS@", rows.trim_end())
        .replace("@REFUSED@", &refused)
}
