//! The guides: one text each, shown on this page's modules and by `detco guide TOPIC`.
//!
//! A guide is a Markdown file in `src/guide`. It names another guide as `[data]`; at its end stand the
//! definitions of these links for readers of the file itself, `[data]: data.md`. The documentation has
//! definitions of its own in front, which win, and [`Guide::text`] leaves them out.

/// One guide.
#[derive(Clone, Copy, Debug)]
pub struct Guide {
    /// The topic, as `detco guide` is asked for it.
    pub topic: &'static str,
    /// What it is about, in one line.
    pub about: &'static str,
    /// The Markdown file.
    markdown: &'static str,
}

impl Guide {
    /// The text for a terminal: the Markdown file without its link definitions.
    pub fn text(&self) -> String {
        let is_definition = |line: &&str| line.starts_with('[') && line.contains("]: ");
        let lines: Vec<&str> = self.markdown.lines().filter(|line| !is_definition(line)).collect();
        format!("{}\n", lines.join("\n").trim_end())
    }

    /// The guide of this topic.
    pub fn of(topic: &str) -> Option<&'static Guide> {
        GUIDES.iter().find(|guide| guide.topic == topic)
    }
}

/// Makes [`GUIDES`], and a module for each guide whose documentation it is.
macro_rules! guides {
    ($($topic:ident, $about:literal, $file:literal;)*) => {
        /// All guides, in the order in which they are best read.
        pub const GUIDES: &[Guide] = &[$(Guide {
            topic: stringify!($topic),
            about: $about,
            markdown: include_str!($file),
        }),*];
        $(
            #[doc = definitions!()]
            #[doc = include_str!($file)]
            pub mod $topic {}
        )*
    };
}

/// Link definitions for the documentation. They stand in front of each guide, since Markdown takes the
/// first of two with the same name.
macro_rules! definitions {
    () => {
        "\
[data]: crate::guide::data
[training]: crate::guide::training
[methods]: crate::guide::methods
[cluster]: crate::guide::cluster
[remote]: crate::guide::remote
[gpu]: crate::guide::gpu
[profile]: crate::guide::profile
[evaluation]: crate::guide::evaluation
"
    };
}

guides! {
    data, "images into shards: what goes in, formats, EXIF, bad images, order", "guide/data.md";
    training, "runs: recipes, resuming, exit codes, signals, memory, precision", "guide/training.md";
    methods, "DetCo and MoCo, views as a list, files of your own, a new method", "guide/methods.md";
    cluster, "several GPUs and machines: launchers, what travels, lost ranks, planning", "guide/cluster.md";
    remote, "shards behind URLs: stores, credentials, the cache, failures", "guide/remote.md";
    gpu, "decoding, views and kernels on a GPU, and what has not yet run on one", "guide/gpu.md";
    profile, "what limits the data path, how to read it, and how it compares", "guide/profile.md";
    evaluation, "kNN, linear, VOC 2007, a detection probe, attention, export, detectors", "guide/evaluation.md";
}
