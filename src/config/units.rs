//! Sizes in bytes and shuffle windows: values that are written as numbers or as words.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number of bytes; written as a number, or as text with a unit: `"200GB"`, `"64 GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "BytesForm", into = "BytesForm")]
pub struct Bytes(pub u64);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum BytesForm {
    Number(u64),
    Text(String),
}

impl TryFrom<BytesForm> for Bytes {
    type Error = String;

    fn try_from(form: BytesForm) -> Result<Bytes, String> {
        match form {
            BytesForm::Number(number) => Ok(Bytes(number)),
            BytesForm::Text(text) => text.parse(),
        }
    }
}

impl From<Bytes> for BytesForm {
    fn from(bytes: Bytes) -> BytesForm {
        BytesForm::Number(bytes.0)
    }
}

impl std::str::FromStr for Bytes {
    type Err = String;

    /// `1000`, `256MiB`, `1 GB`.
    fn from_str(text: &str) -> Result<Bytes, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number
            .parse()
            .map_err(|_| "expected a number of bytes, or one with a unit: 200GB, 64 GiB")?;
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "kib" | "k" => 1 << 10,
            "mb" => 1_000_000,
            "mib" | "m" => 1 << 20,
            "gb" => 1_000_000_000,
            "gib" | "g" => 1 << 30,
            "tb" => 1_000_000_000_000,
            "tib" | "t" => 1 << 40,
            unit => {
                return Err(format!("`{unit}` is no unit: B, KB, KiB, MB, MiB, GB, GiB, TB, TiB"));
            }
        };
        Ok(Bytes(number.checked_mul(factor).ok_or("too many bytes for 64 bits")?))
    }
}

/// How much of the data a shuffle mixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WindowForm", into = "WindowForm")]
pub enum Window {
    /// All of it, if it is local or fits the cache; otherwise as many shards as do, twice over. A run
    /// writes down what that came to, and keeps to it.
    Auto,
    /// All of it: the true shuffle.
    All,
    /// Windows of so many shards, at least 1.
    Shards(u32),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WindowForm {
    Number(u32),
    Text(String),
}

impl TryFrom<WindowForm> for Window {
    type Error = &'static str;

    fn try_from(form: WindowForm) -> Result<Window, &'static str> {
        match form {
            WindowForm::Number(number) => number.to_string().parse(),
            WindowForm::Text(text) => text.parse(),
        }
    }
}

impl From<Window> for WindowForm {
    fn from(window: Window) -> WindowForm {
        match window {
            Window::Shards(shards) => WindowForm::Number(shards),
            window => WindowForm::Text(window.to_string()),
        }
    }
}

impl std::str::FromStr for Window {
    type Err = &'static str;

    /// `auto`, `all`, or a number.
    fn from_str(text: &str) -> Result<Window, &'static str> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Window::Auto),
            ("all", _) => Ok(Window::All),
            (_, Ok(0)) => Err("a window of 0 shards"),
            (_, Ok(shards)) => Ok(Window::Shards(shards)),
            _ => Err("expected \"auto\", \"all\" or a number of shards"),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Window::Auto => f.write_str("auto"),
            Window::All => f.write_str("all"),
            Window::Shards(shards) => shards.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn sizes_and_windows_are_numbers_or_words() {
        let load = |set: &str| Config::load("detco-r50", &[set.to_owned()]).map(|c| c.data);
        for (text, bytes) in [("64GiB", 64 << 30), ("1 TB", 1_000_000_000_000), ("77", 77)] {
            assert_eq!(load(&format!("data.cache_size={text}")).unwrap().cache_size, Bytes(bytes));
        }
        for (text, window) in
            [("auto", Window::Auto), ("all", Window::All), ("12", Window::Shards(12))]
        {
            assert_eq!(load(&format!("data.window={text}")).unwrap().window, window);
        }
        for wrong in ["cache_size=many", "cache_size=7 apples", "window=0", "window=most"] {
            assert!(load(&format!("data.{wrong}")).is_err(), "{wrong}");
        }
        assert!("-1".parse::<Bytes>().unwrap_err().contains("or one with a unit: 200GB"));
        assert!("99999999999999GiB".parse::<Bytes>().is_err());
    }
}
