//! The network of a backbone in the terms of other programs' configs.

use crate::config::{Backbone, Model};

/// A standard ResNet, 64 channels wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) depth: u32,
    pub(super) bottleneck: bool,
}

impl Network {
    pub(super) fn of(model: &Model) -> Network {
        let (depth, bottleneck) = match model.backbone {
            Backbone::Resnet18 => (18, false),
            Backbone::Resnet34 => (34, false),
            Backbone::Resnet50 => (50, true),
            Backbone::Resnet101 => (101, true),
        };
        Network { depth, bottleneck }
    }

    /// Channels of Res2's map. Each later stage has twice as many.
    pub(super) fn res2(self) -> u32 {
        if self.bottleneck { 256 } else { 64 }
    }

    /// A template with this network's depth and channels in the places for them.
    pub(super) fn fill(self, template: &str) -> String {
        let channels: Vec<String> = (0..4).map(|i| (self.res2() << i).to_string()).collect();
        template
            .replace("@DEPTH@", &self.depth.to_string())
            .replace("@RES2@", &self.res2().to_string())
            .replace("@CHANNELS@", &format!("[{}]", channels.join(", ")))
    }
}
