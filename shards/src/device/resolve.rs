//! Backend selection: who decodes and renders, by the configuration and the machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

#[cfg(feature = "nvjpeg")]
use super::{Cuda, GpuError};
use crate::pipeline::Views;
use crate::views::{MEAN, STD};

/// The requested decoder and renderer (`data.decode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decode {
    /// nvJPEG where a GPU is there, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// nvJPEG; an error where it cannot.
    Nvjpeg,
}

impl FromStr for Decode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Decode, &'static str> {
        match text {
            "auto" => Ok(Decode::Auto),
            "cpu" => Ok(Decode::Cpu),
            "nvjpeg" => Ok(Decode::Nvjpeg),
            _ => Err("auto, cpu or nvjpeg"),
        }
    }
}

/// The number type of the views on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

impl Number {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Number::F32 => 4,
            Number::Bf16 => 2,
        }
    }
}

/// Settings for opening a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// The GPU, as the driver counts.
    pub ordinal: u32,
    /// Folders with NVIDIA's libraries, looked into before the system's.
    pub folders: Vec<PathBuf>,
    /// Folder for compiled kernels.
    pub cache: PathBuf,
    /// What the views' numbers are.
    pub number: Number,
    /// Means of the channels, of bytes / 255.
    pub mean: [f32; 3],
    /// Deviations of the channels.
    pub std: [f32; 3],
}

impl Setup {
    /// The first GPU, with ImageNet's means and deviations. NVIDIA's libraries are looked for beside
    /// `libtorch`, where there is one, and where the system's loader looks.
    pub fn new(libtorch: Option<&Path>, cache: PathBuf, number: Number) -> Setup {
        #[cfg(feature = "nvjpeg")]
        let folders = libtorch.map(|at| crate::cuda::Search::beside_libtorch(at).folders);
        #[cfg(not(feature = "nvjpeg"))]
        let folders = libtorch.and(None); // nothing is looked for
        let folders = folders.unwrap_or_default();
        Setup { ordinal: 0, folders, cache, number, mean: MEAN, std: STD }
    }
}

/// Why nvJPEG is not available.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// This program was built without it.
    #[error("this program was built without nvJPEG\nhint: `cargo build --features nvjpeg`")]
    NotBuilt,
    /// The kernels do not support these views.
    #[error("the GPU renders no {what}")]
    Views {
        /// What of them.
        what: &'static str,
    },
    /// Driver, library, device or compiler.
    #[cfg(feature = "nvjpeg")]
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// The selected decoder.
#[derive(Debug)]
pub enum Decoding {
    /// The CPU, through [`Loader`](crate::pipeline::Loader).
    Cpu {
        /// What `auto` did not find for a GPU; `None` if the CPU was requested.
        missing: Option<Unavailable>,
    },
    /// nvJPEG, through [`DeviceLoader`](super::DeviceLoader).
    #[cfg(feature = "nvjpeg")]
    Nvjpeg(Box<Cuda>),
}

impl Decode {
    /// Opens the decoder. With `auto` and no GPU it is the CPU, and the reason is kept for one notice.
    ///
    /// # Errors
    /// `nvjpeg` was asked for and something is missing: it is named.
    pub fn resolve(self, setup: &Setup, views: &Views) -> Result<Decoding, Unavailable> {
        if self == Decode::Cpu {
            return Ok(Decoding::Cpu { missing: None });
        }
        match nvjpeg(setup, views) {
            Err(missing) if self == Decode::Auto => Ok(Decoding::Cpu { missing: Some(missing) }),
            outcome => outcome,
        }
    }
}

fn nvjpeg(setup: &Setup, views: &Views) -> Result<Decoding, Unavailable> {
    match views {
        Views::Recipe(recipe) if recipe.groups.iter().any(|group| group.crop.resize.is_some()) => {
            Err(Unavailable::Views { what: "views of images that are resized before the crop" })
        }
        Views::Read => Err(Unavailable::Views { what: "bytes" }),
        Views::Recipe(_) | Views::Decode => open(setup),
    }
}

#[cfg(feature = "nvjpeg")]
fn open(setup: &Setup) -> Result<Decoding, Unavailable> {
    Ok(Decoding::Nvjpeg(Box::new(Cuda::open(setup)?)))
}

#[cfg(not(feature = "nvjpeg"))]
fn open(_: &Setup) -> Result<Decoding, Unavailable> {
    Err(Unavailable::NotBuilt)
}

impl fmt::Display for Decoding {
    /// The decoder's name, and what `auto` did not find.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decoding::Cpu { missing } => {
                write!(f, "{} on the CPU", crate::decode::Decoder::new().name())?;
                match missing {
                    Some(missing) => write!(f, ", since {missing}"),
                    None => Ok(()),
                }
            }
            #[cfg(feature = "nvjpeg")]
            Decoding::Nvjpeg(cuda) => {
                let [major, minor, patch] = cuda.nvjpeg_version();
                write!(f, "nvJPEG {major}.{minor}.{patch} on {}", cuda.device().name())?;
                match cuda.hardware() {
                    Ok([engines, cores]) => write!(f, ", {engines} x {cores} hardware decoders"),
                    Err(error) => write!(f, ", no hardware decoder ({error})"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::Recipe;

    fn setup() -> Setup {
        Setup {
            ordinal: u32::MAX, // no machine has it
            folders: Vec::new(),
            cache: PathBuf::from("unused"),
            number: Number::Bf16,
            mean: [0.5; 3],
            std: [0.5; 3],
        }
    }

    #[test]
    fn auto_goes_on_with_the_cpu_and_names_what_is_missing() {
        let views = Views::Recipe(Recipe::detco());
        let Ok(Decoding::Cpu { missing: Some(missing) }) = Decode::Auto.resolve(&setup(), &views)
        else {
            panic!("no such GPU");
        };
        let text = missing.to_string();
        #[cfg(feature = "nvjpeg")]
        assert!(text.contains("libcuda.so.1") || text.contains("no CUDA device"), "{text}");
        #[cfg(not(feature = "nvjpeg"))]
        assert!(text.contains("--features nvjpeg"), "{text}");
        let line = Decoding::Cpu { missing: Some(missing) }.to_string();
        assert!(line.contains(" on the CPU, since ") && line.ends_with(&text), "{line}");
    }

    #[test]
    fn what_was_asked_for_is_had_or_is_an_error() {
        let views = Views::Recipe(Recipe::detco());
        assert!(Decode::Nvjpeg.resolve(&setup(), &views).is_err());
        let cpu = Decode::Cpu.resolve(&setup(), &views).unwrap();
        assert!(matches!(cpu, Decoding::Cpu { missing: None }));
        assert!(cpu.to_string().ends_with("on the CPU"), "{cpu}");
        assert_eq!(Decode::default(), Decode::Auto);
    }

    #[test]
    fn views_that_the_kernels_lack_are_named_before_a_gpu_is_looked_for() {
        let squash = Views::Recipe(Recipe::squash(256, 224));
        for (views, what) in [(squash, "resized before the crop"), (Views::Read, "bytes")] {
            let error = Decode::Nvjpeg.resolve(&setup(), &views).unwrap_err();
            assert!(error.to_string().ends_with(what), "{error}");
        }
    }
}
