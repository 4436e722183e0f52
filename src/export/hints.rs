//! Configuration lines with which other programs build the network of an exported backbone.

use std::fmt::Write;
use std::path::Path;

use super::Format;
use crate::config::{Backbone, Model, Stem};

/// Channels of the standard networks' first stage.
const WIDTH: i64 = 64;

/// The configuration lines of other programs for this backbone, or why none fits.
pub fn hint(format: Format, model: &Model, file: &Path) -> String {
    let (name, depth, bottleneck) = match model.backbone {
        Backbone::Resnet18 => ("resnet18", 18, false),
        Backbone::Resnet34 => ("resnet34", 34, false),
        Backbone::Resnet50 => ("resnet50", 50, true),
        Backbone::Resnet101 => ("resnet101", 101, true),
    };
    let own = "only `detco eval` and `detco train --init` take these weights";
    if model.stem == Stem::Cifar {
        return format!(
            "no configuration of detectron2, mmdetection or torchvision fits: the stem is CIFAR's, a \
             3x3 convolution and no max pool; {own}"
        );
    }
    match format {
        Format::Detectron2 if !bottleneck && model.width != WIDTH => format!(
            "no configuration of detectron2 fits: it has ResNet-{depth} with 64 channels alone, this one \
             has {}; {own}",
            model.width
        ),
        Format::Detectron2 => detectron2(depth, bottleneck, model.width, file),
        Format::Torchvision => torchvision((name, depth), model.width, file),
        Format::Mmdet => mmdetection(depth, model.width, file),
    }
}

fn detectron2(depth: u32, bottleneck: bool, width: i64, file: &Path) -> String {
    let mut text = format!(
        "in detectron2's config:\n  MODEL.WEIGHTS: {}\n  MODEL.RESNETS.DEPTH: {depth}\n",
        file.display()
    );
    let mut line = |key: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {key}: {value}");
    };
    if !bottleneck || width != WIDTH {
        let channels = if bottleneck { 4 * width } else { width };
        line("MODEL.RESNETS.RES2_OUT_CHANNELS", channels.to_string());
    }
    if width != WIDTH {
        line("MODEL.RESNETS.STEM_OUT_CHANNELS", width.to_string());
        line("MODEL.RESNETS.WIDTH_PER_GROUP", width.to_string());
    }
    line("MODEL.RESNETS.STRIDE_IN_1X1", "False".into());
    line("MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]".into());
    line("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]".into());
    text.push_str("  INPUT.FORMAT: RGB");
    text
}

fn torchvision((name, depth): (&str, u32), width: i64, path: &Path) -> String {
    let file = path.display();
    let other = mmdetection(depth, width, path);
    if width != WIDTH {
        return format!("no {name} of torchvision fits: the width is {width}, not 64\n{other}");
    }
    let load = match file.to_string().ends_with(".safetensors") {
        true => format!("safetensors.torch.load_file(\"{file}\")"),
        false => format!("torch.load(\"{file}\", weights_only=True)"),
    };
    format!(
        "in torchvision:\n  net = torchvision.models.{name}()\n  net.load_state_dict({load}, \
         strict=False)  # all but fc\n{other}"
    )
}

fn mmdetection(depth: u32, width: i64, file: &Path) -> String {
    let file = file.display();
    let more = match width {
        WIDTH => String::new(),
        width => format!(", base_channels={width}"),
    };
    format!(
        "in mmdetection's config (a .pth):\n  backbone=dict(type='ResNet', depth={depth}, \
         style='pytorch'{more},\n    init_cfg=dict(type='Pretrained', checkpoint='{file}'))\n  \
         data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], \
         bgr_to_rgb=True)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(backbone: Backbone, stem: Stem, width: i64, format: Format) -> String {
        let model = Model { backbone, stem, width, ..Model::default() };
        hint(format, &model, Path::new("b.pkl"))
    }

    #[test]
    fn detectron2_is_told_depth_and_channels() {
        let d2 = |backbone, width| of(backbone, Stem::Imagenet, width, Format::Detectron2);
        let fifty = d2(Backbone::Resnet50, 64);
        for line in ["WEIGHTS: b.pkl", "DEPTH: 50\n", "STRIDE_IN_1X1: False\n", "FORMAT: RGB"] {
            assert!(fifty.contains(line), "{fifty}");
        }
        assert!(fifty.contains("PIXEL_MEAN: [123.675, 116.28, 103.53]\n"), "{fifty}");
        assert!(!fifty.contains("RES2_OUT_CHANNELS"), "its default, 256, is right: {fifty}");
        for (backbone, depth) in [(Backbone::Resnet18, 18), (Backbone::Resnet34, 34)] {
            let small = d2(backbone, 64);
            assert!(small.contains(&format!("DEPTH: {depth}\n")), "{small}");
            assert!(small.contains("RES2_OUT_CHANNELS: 64\n"), "{small}");
            assert!(d2(backbone, 32).starts_with("no configuration of detectron2 fits"));
        }
        let narrow = d2(Backbone::Resnet101, 32);
        for line in ["RES2_OUT_CHANNELS: 128\n", "STEM_OUT_CHANNELS: 32\n", "WIDTH_PER_GROUP: 32\n"]
        {
            assert!(narrow.contains(line), "{narrow}");
        }
    }

    #[test]
    fn nobody_has_a_cifar_stem() {
        for format in [Format::Detectron2, Format::Torchvision, Format::Mmdet] {
            let said = of(Backbone::Resnet18, Stem::Cifar, 64, format);
            assert!(said.starts_with("no configuration") && said.contains("CIFAR"), "{said}");
        }
        let wide = of(Backbone::Resnet50, Stem::Imagenet, 128, Format::Torchvision);
        assert!(wide.contains("no resnet50 of torchvision") && wide.contains("base_channels=128"));
        let stock = of(Backbone::Resnet34, Stem::Imagenet, 64, Format::Torchvision);
        assert!(stock.contains("models.resnet34()") && stock.contains("depth=34,"), "{stock}");
        let only = of(Backbone::Resnet34, Stem::Imagenet, 64, Format::Mmdet);
        assert!(only.starts_with("in mmdetection") && stock.ends_with(&only), "{only}");
    }
}
