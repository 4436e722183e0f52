//! The environment: the only place that reads variables.

use std::path::{Path, PathBuf};

use detco_shards::device::{Number, Setup};

/// A variable of the environment; one that is empty, or no text, counts as not set.
#[expect(clippy::disallowed_methods, reason = "this is the place that reads the environment")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// What a GPU is opened with to decode and render: NVIDIA's libraries beside the libtorch of LIBTORCH,
/// or else beside the one given, or the one that this program was built with; compiled kernels in the
/// user's cache.
pub fn gpu(number: Number, libtorch: Option<&Path>) -> Setup {
    let folder = |name| std::env::var_os(name).filter(|text| !text.is_empty()).map(PathBuf::from);
    let home = || folder("HOME").map(|home| home.join(".cache"));
    let cache = folder("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir);
    let named = folder("LIBTORCH");
    let built_with = option_env!("DETCO_LIBTORCH").map(Path::new);
    Setup::new(named.as_deref().or(libtorch).or(built_with), cache.join("detco/kernels"), number)
}

/// Where fetched shards are kept when nobody says: `detco` in `$XDG_CACHE_HOME`, in `~/.cache`, or
/// else in the folder for temporary files.
pub fn cache_folder() -> PathBuf {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || folder("HOME").map(|home| home.join(".cache"));
    folder("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir).join("detco")
}

/// The variables that stores are configured by: `AWS_*`, `GOOGLE_*`, `AZURE_*`, and for HTTP
/// `DETCO_HTTP_*`, Hugging Face's, and those that lead to `.netrc`.
pub fn store_environment() -> Vec<(String, String)> {
    let groups = ["AWS_", "GOOGLE_", "AZURE_", "DETCO_HTTP_"];
    let single = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "NETRC", "HOME"];
    let ours =
        |name: &str| single.contains(&name) || groups.iter().any(|group| name.starts_with(group));
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).filter(|(name, _)| ours(name)).collect()
}
