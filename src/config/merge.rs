//! Tables laid upon tables: a file's over its base's, and `--set` over both.

use std::collections::BTreeMap;

use super::error::ConfigError;

/// The table of the method and its keys.
pub(super) const METHOD: &str = "method";

/// The table of a group's crop.
const CROP: &str = "crop";

/// What a crop has one of: the keys of each.
const REGIONS: [&[&str]; 4] = [&["scale", "ratio"], &["square"], &["center"], &["whole"]];

/// Puts a table on another, key by key. Lists of tables with a `name` go table by table: groups of views.
pub(super) fn merge(under: &mut toml::Table, over: toml::Table) {
    let groups = |list: &[toml::Value]| list.iter().all(|one| one.get("name").is_some());
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            // The keys of one method mean nothing to another.
            (Some(toml::Value::Table(below)), toml::Value::Table(above))
                if key == METHOD && other_name(below, above.get("name")) =>
            {
                *below = above;
            }
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => {
                if key == CROP {
                    above.keys().for_each(|region| make_way(below, region));
                }
                merge(below, above);
            }
            (Some(toml::Value::Array(below)), toml::Value::Array(above))
                if !above.is_empty() && groups(&below[..]) && groups(&above) =>
            {
                above.into_iter().for_each(|one| merge_group(below, one));
            }
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// Puts a group on that of its name, or behind all others.
fn merge_group(list: &mut Vec<toml::Value>, group: toml::Value) {
    let same = |one: &&mut toml::Value| name(one).is_some() && name(one) == name(&group);
    match (list.iter_mut().find(same), group) {
        (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
        (_, group) => list.push(group),
    }
}

/// Takes the regions out of a crop that a key says another one in the place of.
fn make_way(crop: &mut toml::Table, key: &str) {
    if let Some(own) = REGIONS.iter().find(|keys| keys.contains(&key)) {
        let others = REGIONS.iter().filter(|keys| *keys != own);
        others.copied().flatten().for_each(|other| drop(crop.remove(*other)));
    }
}

/// Whether a name is that of another method than the table's.
fn other_name(table: &toml::Table, name: Option<&toml::Value>) -> bool {
    name.is_some_and(|name| table.get("name") != Some(name))
}

/// `train.batch=64` into the table; the value is TOML, or a string if it is not.
pub(super) fn set(table: &mut toml::Table, text: &str) -> Result<(), ConfigError> {
    let fault = |reason: String| ConfigError::Set { text: text.to_string(), reason };
    let (path, value) = text.split_once('=').ok_or_else(|| fault("expected key=value".into()))?;
    let value = value.trim();
    let value = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut one| one.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut keys = path.trim().split('.').peekable();
    let (mut at, mut within) = (table, "");
    while let Some(key) = keys.next() {
        if key.is_empty() {
            return Err(fault("the key is empty".into()));
        }
        if keys.peek().is_none() {
            if path.trim() == "method.name" && other_name(at, Some(&value)) {
                at.clear(); // the keys of one method mean nothing to another
            }
            if within == CROP {
                make_way(at, key);
            }
            at.insert(key.to_string(), value);
            break;
        }
        let mut below = at.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        while let toml::Value::Array(list) = below {
            let one = keys.next().filter(|_| keys.peek().is_some());
            let one = one.ok_or_else(|| {
                fault(format!("{key} is a list: a key of one of its tables is needed"))
            })?;
            below = element(list, one).map_err(fault)?;
        }
        within = key;
        at = below
            .as_table_mut()
            .ok_or_else(|| fault("the key goes through a value that is no table".into()))?;
    }
    Ok(())
}

/// The table of a list that has this name.
fn element<'a>(list: &'a mut [toml::Value], of: &str) -> Result<&'a mut toml::Value, String> {
    let known: Vec<&str> = list.iter().filter_map(name).collect();
    let Some(at) = list.iter().position(|one| name(one) == Some(of)) else {
        let was = match of {
            "global" => "; what was views.global is views.crops",
            "local" => "; what was views.local is views.patches",
            _ => "",
        };
        return Err(format!("`{of}` is none of this list: {}{was}", known.join(", ")));
    };
    Ok(&mut list[at])
}

/// What a table in a list is called: a group of views by its `name`, a step by its `step`.
pub(super) fn name(one: &toml::Value) -> Option<&str> {
    one.get("name").or_else(|| one.get("step"))?.as_str()
}

/// Values by their keys. Of a list of tables with names, or of steps, each is a table by its name.
pub(super) fn flatten(prefix: &str, value: &toml::Value, to: &mut BTreeMap<String, String>) {
    let join =
        |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
    match value {
        toml::Value::Table(table) => {
            table.iter().for_each(|(key, value)| flatten(&join(key), value, to));
        }
        toml::Value::Array(list)
            if !list.is_empty() && list.iter().all(|one| name(one).is_some()) =>
        {
            for one in list {
                flatten(&join(name(one).unwrap_or_default()), one, to);
            }
        }
        value => {
            to.insert(prefix.to_string(), value.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use detco_shards::views::{Crop, Group, Recipe, Region, Step};

    #[test]
    fn overrides_reach_groups_of_views_and_their_steps_by_name() {
        let load = |set: &str| Config::load("detco-r50", &[set.to_owned()]);
        let crops = |set: &str| load(set).unwrap().views.groups.remove(0);
        assert_eq!(crops("views.crops.size=160").size, 160);
        let gray = crops("views.crops.steps.gray.p=0.5").steps;
        let gray = Recipe { groups: vec![Group { steps: gray, ..Group::default() }] };
        assert_eq!(gray.steps(&gray.groups[0])[1], Step::Gray { p: 0.5 });
        assert_eq!(load("views.patches.grid.patch=48").unwrap().patch_size(), Some(48));
        let steps = load("views.patches.steps=[{step=\"flip\", p=0.1}]").unwrap().views;
        assert_eq!(steps.steps(&steps.groups[1]), [Step::Flip { p: 0.1 }]);
        for (set, reason) in [
            ("views.global.size=160", "what was views.global is views.crops"),
            ("views.crop.size=160", "`crop` is none of this list: crops, patches"),
            ("views.crops=3", "views is a list"),
            ("views.crops.steps.blurr.p=0.5", "none of this list: jitter, gray, blur, flip"),
            ("views.crops.size.x=3", "no table"),
            ("views.crops.sise=3", "unknown key `sise`"),
            ("views.crops.steps.gray.q=3", "unknown key `q`"),
            ("views.crops.steps.gray.p=3", "views.crops.steps.gray.p = 3: must lie in [0, 1]"),
            ("views.crops.count=1", "views.crops = 1 views: expected two views without a grid"),
            ("views.patches.count=0", "views.patches = 0 views: expected two views with a grid"),
        ] {
            let error = load(set).unwrap_err().to_string();
            assert!(error.contains(reason), "{set}: {error}");
        }
        // Of no use to MoCo, and no fault.
        let moco = Config::load("moco-v2-r50", &["views.patches.count=0".to_owned()]).unwrap();
        assert_eq!((moco.training_views().groups.len(), moco.patch_size()), (1, None));
    }

    /// A recipe names another kind of crop than its base in a key, and so does `--set`; two at once are refused.
    #[test]
    fn a_crop_named_above_takes_the_place_of_another_kind_below() {
        let load = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
            Config::load("detco-r50", &sets)
        };
        let crop = |sets: &[&str]| load(sets).unwrap().views.groups.remove(0).crop;
        assert_eq!(crop(&["views.crops.crop.square=0.5"]).region, Region::Square(0.5));
        let half = ["views.crops.crop.square=0.5", "views.crops.crop.resize=64"];
        assert_eq!(crop(&half), Crop { resize: Some(64), ..crop(&half[..1]) });
        let back = [&half[..], &["views.crops.crop.scale=[0.3, 1.0]"]].concat();
        let ratio = [0.75, 1.0 / 0.75];
        assert_eq!(crop(&back).region, Region::Random { scale: [0.3, 1.0], ratio });
        assert_eq!(crop(&back).resize, Some(64), "what is no kind of crop stays");
        let folder = tempfile::tempdir().unwrap();
        let file = |crop: &str| {
            let path = folder.path().join("recipe.toml");
            let text =
                format!("base = \"detco-r50\"\n[[views]]\nname = \"crops\"\ncrop = {crop}\n");
            std::fs::write(&path, text).unwrap();
            Config::load(path.to_str().unwrap(), &[])
        };
        let region = |crop: &str| file(crop).unwrap().views.groups.remove(0).crop.region;
        assert_eq!(region("{ whole = true }"), Region::Whole);
        assert_eq!(region("{ center = 0.875 }"), Region::Center(0.875));
        assert_eq!(region("{ scale = [0.1, 0.2] }"), Region::Random { scale: [0.1, 0.2], ratio });
        let error = file("{ whole = true, square = 0.5 }").unwrap_err().to_string();
        assert!(error.contains("a crop has one of"), "{error}");
    }

    #[test]
    fn values_have_keys_by_name() {
        let flat = Config::default().flat();
        assert_eq!(flat["views.crops.steps.gray.p"], "0.2");
        assert_eq!((&*flat["views.patches.steps"], &*flat["train.batch"]), ("\"crops\"", "256"));
    }
}
