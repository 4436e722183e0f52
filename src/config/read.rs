//! Reading a configuration: a recipe or file, `--set` on top, a run's own; errors name the nearest key.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Config;
use super::error::ConfigError;
use super::merge::{METHOD, merge, set};
use super::recipes::{DEFAULT, RECIPES, known_recipes, unknown_recipe};

impl Config {
    /// Resolves a recipe name or TOML file plus `--set` overrides, and validates the result.
    pub fn load(recipe: &str, overrides: &[String]) -> Result<Config, ConfigError> {
        let (mut table, base, origin) = read(recipe)?;
        let mut config = from_table(table.clone(), &origin)?;
        if !overrides.is_empty() {
            for text in overrides {
                set(&mut table, text)?;
            }
            // What was right before is wrong by these.
            config = from_table(table, "--set")?;
        }
        config.base = Some(base);
        config.validate()?;
        Ok(config)
    }

    /// Reads the resolved config of a run back.
    pub fn from_toml(text: &str, origin: &str) -> Result<Config, ConfigError> {
        let config = from_table(parse(text, origin)?, origin)?;
        config.validate()?;
        Ok(config)
    }

    /// Reads the resolved config of a checkpoint back: as [`Config::from_toml`], and those of runs from before
    /// methods had a table of their own.
    ///
    /// # Errors
    /// As [`Config::from_toml`].
    pub fn from_checkpoint(text: &str, origin: &str) -> Result<Config, ConfigError> {
        let config = from_table(with_method(parse(text, origin)?), origin)?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration of a run: that of its newest checkpoint, which it goes on by; where there is none yet,
    /// the copy in its folder.
    ///
    /// # Errors
    /// When neither can be read.
    pub fn of_run(run: &Path) -> Result<Config, ConfigError> {
        let is_checkpoint = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix("step-").is_some_and(|step| step.parse::<u64>().is_ok())
        };
        let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
        let newest = entries.map(|entry| entry.path()).filter(is_checkpoint).max();
        let path = match &newest {
            Some(checkpoint) => checkpoint.join("state.json"),
            None => run.join("config.toml"),
        };
        let text = std::fs::read_to_string(&path)
            .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        let origin = path.display().to_string();
        if newest.is_none() {
            return Config::from_checkpoint(&text, &origin);
        }
        let state: Result<serde_json::Value, _> = serde_json::from_str(&text);
        let config = state.as_ref().ok().and_then(|state| state["config"].as_str());
        let config = config.ok_or_else(|| ConfigError::Parse {
            origin: origin.clone(),
            message: "holds no configuration".into(),
            hint: String::new(),
        })?;
        Config::from_checkpoint(config, &origin)
    }

    /// This configuration with `--set` overrides on top, validated.
    pub fn with_overrides(&self, overrides: &[String]) -> Result<Config, ConfigError> {
        let mut table = parse(&self.to_toml(), "config")?;
        for text in overrides {
            set(&mut table, text)?;
        }
        let config = from_table(table, "--set")?;
        config.validate()?;
        Ok(config)
    }
}

/// A recipe's or file's table with its `base` chain merged in, the built-in recipe that it is or
/// builds upon, and a name for error messages.
pub(super) fn read(recipe: &str) -> Result<(toml::Table, String, String), ConfigError> {
    if let Some((name, _, text)) = RECIPES.iter().find(|(name, ..)| *name == recipe) {
        let table = resolve_base(parse(text, name)?, name)?;
        return Ok((table, name.to_string(), format!("recipe {name}")));
    }
    let path = Path::new(recipe);
    if !path.is_file() {
        return Err(unknown_recipe(recipe));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    let mut table = parse(&text, recipe)?;
    // The types' own defaults are detco-r50's as a whole, not table by table: a file that sets a
    // crop's ratio alone must not get torchvision's scale.
    let base = table.entry("base").or_insert_with(|| DEFAULT.into());
    let base = base.as_str().unwrap_or_default().to_string();
    Ok((resolve_base(table, recipe)?, base, recipe.to_string()))
}

/// Puts the table on top of its base; a base is a built-in recipe, so a chain cannot loop through files.
fn resolve_base(mut table: toml::Table, origin: &str) -> Result<toml::Table, ConfigError> {
    let Some(base) = table.remove("base") else { return Ok(table) };
    let name = base.as_str().unwrap_or_default();
    let known = RECIPES.iter().find(|(known, ..)| *known == name && name != origin);
    let (_, _, text) = known.ok_or_else(|| ConfigError::Base {
        origin: origin.to_string(),
        name: name.to_string(),
        known: known_recipes(),
    })?;
    let mut merged = resolve_base(parse(text, name)?, name)?;
    merge(&mut merged, table);
    Ok(merged)
}

pub(super) fn parse(text: &str, origin: &str) -> Result<toml::Table, ConfigError> {
    text.parse::<toml::Table>().map_err(|error| ConfigError::Parse {
        origin: origin.to_string(),
        message: error.to_string(),
        hint: String::new(),
    })
}

/// Where keys of methods stood before methods had a table of their own.
const MOVED: &[(&str, &[&str])] = &[
    ("loss", &["temperature", "level_weights", "queue", "fill_first", "ema"]),
    ("model", &["levels", "local", "head", "local_head", "dim"]),
];

/// Puts the keys of a configuration from before methods had a table where they are now.
fn with_method(mut table: toml::Table) -> toml::Table {
    let mut keys = toml::Table::new();
    for (old, names) in MOVED {
        let Some(toml::Value::Table(from)) = table.get_mut(*old) else { continue };
        let taken = |name: &&str| Some((name.to_string(), from.remove(*name)?));
        keys.extend(names.iter().filter_map(taken));
        if from.is_empty() {
            table.remove(*old);
        }
    }
    if !keys.is_empty() && !table.contains_key(METHOD) {
        keys.insert("name".to_owned(), "moco".into());
        table.insert(METHOD.to_owned(), toml::Value::Table(keys));
    }
    table
}

fn from_table(table: toml::Table, origin: &str) -> Result<Config, ConfigError> {
    let moved = MOVED.iter().find_map(|(old, names)| {
        let from = table.get(*old)?.as_table()?;
        names.iter().find(|name| from.contains_key(**name)).map(|name| (old, name))
    });
    if let Some((old, key)) = moved {
        return Err(ConfigError::Parse {
            origin: origin.to_string(),
            message: format!("{old}.{key} is a key of the method now: method.{key}"),
            hint: format!("\nhint: write {key} = ... under [method]"),
        });
    }
    Config::deserialize(toml::Value::Table(table)).map_err(|error| {
        let message = error.to_string().trim_end().to_string();
        let hint = nearest_key(&message).unwrap_or_default();
        ConfigError::Parse { origin: origin.to_string(), message: plain(message), hint }
    })
}

/// serde's words for types and keys in those of a configuration.
fn plain(message: String) -> String {
    const WORDS: [(&str, &str); 9] = [
        ("unknown field", "unknown key"),
        ("unknown variant", "unknown value"),
        ("expected i64", "expected an integer"),
        ("expected u64", "expected an integer, 0 or more"),
        ("expected u32", "expected an integer, 0 or more"),
        ("expected usize", "expected an integer, 0 or more"),
        ("expected u8", "expected an integer, 0 or more"),
        ("expected f64", "expected a number"),
        ("expected f32", "expected a number"),
    ];
    WORDS.iter().fold(message, |text, (from, to)| text.replace(from, to))
}

/// serde names the unknown field and all valid ones in backticks; picks the nearest.
fn nearest_key(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown field ")?;
    let mut names = rest.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    nearest(unknown, names).map(|name| format!("\nhint: did you mean `{name}`?"))
}

pub(super) fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| (strsim::jaro_winkler(word, name), name))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Stem;
    use crate::method::Moco;
    use detco_shards::views::{Recipe, Region};

    #[test]
    fn a_run_goes_by_its_checkpoint_and_not_by_the_copy() {
        let run = tempfile::tempdir().unwrap();
        let small = Config::load("detco-small", &[]).unwrap();
        let said = Config::of_run(run.path()).unwrap_err().to_string();
        assert!(said.contains("config.toml"), "{said}");
        std::fs::write(run.path().join("config.toml"), Config::default().to_toml()).unwrap();
        assert_eq!(Config::of_run(run.path()).unwrap(), Config::default());
        let newest = run.path().join("checkpoints/step-000000003");
        std::fs::create_dir_all(&newest).unwrap();
        let state = serde_json::json!({ "format": 1, "config": small.to_toml() });
        std::fs::write(newest.join("state.json"), state.to_string()).unwrap();
        assert_eq!(Config::of_run(run.path()).unwrap(), small);
        std::fs::write(newest.join("state.json"), "{").unwrap();
        let said = Config::of_run(run.path()).unwrap_err().to_string();
        assert!(said.contains("state.json") && said.contains("no configuration"), "{said}");
    }

    #[test]
    fn every_recipe_is_valid_and_survives_a_round_trip() {
        for (name, ..) in RECIPES {
            let mut config = Config::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
            config.base = None;
            assert_eq!(Config::from_toml(&config.to_toml(), name).unwrap(), config, "{name}");
        }
    }

    #[test]
    fn the_paper_is_the_default() {
        let mut recipe = Config::load("detco-r50", &[]).unwrap();
        recipe.base = None;
        assert_eq!(recipe, Config::default());
    }

    #[test]
    fn a_file_builds_upon_a_recipe_key_by_key() {
        let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        let load = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Config::load(file.path().to_str().unwrap(), &[])
        };
        let config = load("[[views]]\nname = \"crops\"\ncrop = { ratio = [1.0, 1.0] }\n").unwrap();
        assert_eq!(config.base.as_deref(), Some("detco-r50"));
        let region = Region::Random { scale: [0.2, 1.0], ratio: [1.0, 1.0] };
        assert_eq!(config.views.groups[0].crop.region, region);
        assert_eq!(config.views.groups[1], Recipe::detco().groups[1]);
        let config = load("base = \"moco-v2-small\"\nseed = 7\n").unwrap();
        assert_eq!((config.seed, config.model.width), (7, 16));
        // What a run has written is a recipe as well, for the same run.
        assert_eq!(load(&config.to_toml()).unwrap(), config);
        assert!(load("base = 3\n").is_err());
    }

    #[test]
    fn overrides_reach_every_type() {
        let sets = ["train.batch=64", "method.temperature=0.07", "method.levels=[5]"];
        let more = ["method.level_weights=[1]", "data.shards=[\"a\", \"b\"]", "model.stem=cifar"];
        let sets: Vec<String> = sets.iter().chain(&more).map(|s| s.to_string()).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        let moco = config.method.as_a::<Moco>().unwrap();
        assert_eq!((config.train.batch, moco.levels.clone()), (64, vec![5]));
        assert_eq!((moco.temperature, config.model.stem), (0.07, Stem::Cifar));
        assert_eq!(config.data.shards, ["a", "b"]);
    }

    #[test]
    fn a_file_from_before_views_were_a_list_is_told_what_to_write() {
        let old = "[views.global]\nsize = 160\n";
        let error = Config::from_toml(old, "run/config.toml").unwrap_err().to_string();
        assert!(
            error.starts_with("run/config.toml: views are a list of groups: [[views]]"),
            "{error}"
        );
    }

    #[test]
    fn keys_of_a_method_stand_in_its_table() {
        let load = |sets: &[&str]| {
            Config::load("detco-r50", &sets.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        for (set, reason) in [
            ("loss.queue=512", "loss.queue is a key of the method now: method.queue"),
            ("model.dim=64", "model.dim is a key of the method now: method.dim"),
            ("method.quue=512", "did you mean `queue`"),
            ("method.name=moko", "method.name = \"moko\": there are moco"),
            ("method.name=3", "method.name = 3: expected a name"),
            ("method.rotations=4", "it is a key of rotation"),
            ("method.norm=false", "it is a key of simclr"),
        ] {
            let error = load(&[set]).unwrap_err().to_string();
            assert!(error.contains(reason), "{set}: {error}");
        }
        // A checkpoint's text from before is read for what it says.
        let config = load(&["method.queue=1024", "method.dim=64"]).unwrap();
        let mut older: toml::Table = config.to_toml().parse().unwrap();
        let mut keys = older.remove("method").unwrap().as_table().unwrap().clone();
        keys.remove("name");
        keys.remove("ema_schedule"); // there was one alone
        for (table, names) in MOVED {
            let table = older.entry(*table).or_insert_with(|| toml::Table::new().into());
            let table = table.as_table_mut().unwrap();
            table.extend(names.iter().map(|name| (name.to_string(), keys.remove(*name).unwrap())));
        }
        assert!(keys.is_empty(), "{keys:?}");
        let text = toml::to_string(&older).unwrap();
        assert_eq!(Config::from_checkpoint(&text, "state.json").unwrap(), config);
        assert!(Config::from_toml(&text, "file").is_err());
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let error = Config::load("detco-r50", &["optim.weigth_decay=1".into()]).unwrap_err();
        assert!(error.to_string().contains("did you mean `weight_decay`"), "{error}");
        let error = Config::load("detco-r5", &[]).unwrap_err();
        assert!(error.to_string().contains("did you mean \"detco-r50\""), "{error}");
    }
}
