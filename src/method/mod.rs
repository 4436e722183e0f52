//! Methods of self-supervised pre-training: one file each.
//!
//! A method [declares](Design) what it is made of, and does little: which images the student and the teacher
//! see, and the gradients of the loss by the student's outputs. The step ([`crate::step`]) does the rest:
//! passes, collectives, micro-batches, the optimizer, and leaving the state alone when a loss is not finite.
//!
//! A method's type is its table `[method]` of the configuration. To add one: write its file, add its line to
//! `METHODS` and its name to `TRAINED`, write a recipe. A program that uses this crate [`register`]s its own.

mod byol;
mod checks;
mod densecl;
pub mod design;
#[cfg(feature = "train")]
pub mod error;
mod jigsaw;
mod moco;
#[cfg(feature = "train")]
pub mod parts;
mod rotation;
mod simclr;
mod swav;

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, RwLock};

use detco_shards::views::Recipe;
use serde::de::{DeserializeOwned, Error as _};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
#[cfg(feature = "train")]
use tch::Tensor;

#[cfg(feature = "train")]
use crate::batch::Batch;
#[cfg(feature = "train")]
use crate::shim::ShimError;
pub use byol::Byol;
pub use densecl::Densecl;
pub use design::{
    Design, EmaSchedule, FrozenDesign, HeadDesign, Layer, Logits, PassDesign, Reads, TeacherDesign,
    TermDesign,
};
#[cfg(feature = "train")]
pub use error::StepError;
pub use jigsaw::Jigsaw;
pub use moco::{CROPS, GLOBAL, Head, LOCAL, LocalHead, Moco, PATCHES};
#[cfg(feature = "train")]
pub use parts::queue::Queues;
pub use rotation::Rotation;
pub use simclr::Simclr;
pub use swav::{SMALL, Swav};

/// The methods of this program: what their tables are read as.
const METHODS: &[(&str, Read)] = &[
    ("moco", read::<Moco>),
    ("byol", read::<Byol>),
    ("densecl", read::<Densecl>),
    ("jigsaw", read::<Jigsaw>),
    ("rotation", read::<Rotation>),
    ("simclr", read::<Simclr>),
    ("swav", read::<Swav>),
];

/// The same, as training sees them. Apart, so that a program that does not train links no libtorch.
#[cfg(feature = "train")]
const TRAINED: &[Cast] = &[
    cast::<Moco>,
    cast::<Byol>,
    cast::<Densecl>,
    cast::<Jigsaw>,
    cast::<Rotation>,
    cast::<Simclr>,
    cast::<Swav>,
];

/// What a method of pre-training declares: its keys of the configuration, and what they come to.
pub trait Declare: Any + fmt::Debug + Send + Sync {
    /// What it is made of, on a backbone whose Res2 to Res5 have so many channels.
    fn design(&self, channels: [i64; 4]) -> Design;

    /// Changes the weights of its terms, as [`Design::terms`] has them, to those of the update with this number, from
    /// 0. As a rule they stay.
    fn weigh(&self, _step: u64, _terms: &mut [TermDesign]) {}

    /// Checks its keys, and what it needs of the run.
    ///
    /// # Errors
    /// The first key that does not fit.
    fn check(&self, _run: &Around<'_>) -> Result<(), Refused> {
        Ok(())
    }
}

/// What a method of pre-training does.
#[cfg(feature = "train")]
pub trait Method: Declare {
    /// Changes the student's weights before a step, whose names and values (which share their memory) these are. Called
    /// without a graph.
    ///
    /// # Errors
    /// When libtorch fails.
    fn before(&self, _student: &[(String, Tensor)]) -> Result<(), ShimError> {
        Ok(())
    }

    /// What the student sees in this step: the images of each of [`Design::passes`].
    ///
    /// # Errors
    /// When the batch lacks views.
    fn student(&self, batch: &Batch) -> Result<Seen, StepError>;

    /// What the teacher sees: images for the same passes. Never called without [`Design::teacher`].
    ///
    /// # Errors
    /// When the batch lacks views.
    fn teacher(&self, batch: &Batch) -> Result<Seen, StepError> {
        self.student(batch)
    }

    /// The loss's terms, and its gradients by the student's outputs in closed form. Called without a graph,
    /// once for each micro-batch; where rows are [coupled](Design::is_coupled), once for all of this rank's.
    fn score(&self, met: &Met<'_>) -> Scores;

    /// Logits by the terms' names, by their definition, for whoever wants to look at them.
    fn logits(&self, _met: &Met<'_>) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// Changes the state once the weights have been: enters what was gathered of all ranks into the queues, which are
    /// the outputs of the teacher's [gathered](HeadDesign::is_gathered) heads, or without a teacher those of the
    /// student's where rows are coupled. Where `applied`, a truth value on the device, is false, nothing may change.
    ///
    /// # Errors
    /// When libtorch fails.
    fn after(
        &self,
        _queues: &mut Queues,
        _gathered: &[Tensor],
        _applied: &Tensor,
    ) -> Result<(), ShimError> {
        Ok(())
    }
}

/// What surrounds a method in a configuration.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// `train.batch`: samples of an update over all ranks.
    pub batch: i64,
    /// All groups of views.
    pub views: &'a Recipe,
}

impl Around<'_> {
    /// Checks that a group has so many views that satisfy `holds`.
    ///
    /// # Errors
    /// With what was `expected`.
    pub fn views(
        &self,
        (key, group): (&'static str, &str),
        holds: impl Fn(&detco_shards::views::Group) -> bool,
        expected: &str,
    ) -> Result<(), Refused> {
        let group = self.views.group(group);
        let value =
            group.map_or_else(|| "no group".to_owned(), |group| format!("{} views", group.count));
        refuse_unless(group.is_some_and(holds), key, value, expected)
    }
}

/// A key of the configuration that does not fit a method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Dotted key: `method.queue`.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What was expected.
    pub expected: String,
}

/// An error unless `holds`.
///
/// # Errors
/// That error.
pub fn refuse_unless(
    holds: bool,
    key: &'static str,
    value: impl ToString,
    expected: impl Into<String>,
) -> Result<(), Refused> {
    match holds {
        true => Ok(()),
        false => Err(Refused { key, value: value.to_string(), expected: expected.into() }),
    }
}

/// What an encoder sees in a step.
#[cfg(feature = "train")]
#[derive(Debug)]
pub struct Seen {
    /// Images for each pass: `[n, 3, h, w]`, or of several a sample `[n, images, 3, h, w]`.
    pub images: Vec<Tensor>,
    /// What the samples' images are, `[n]` or `[n, images]` of whole numbers, where a method asks for it.
    pub labels: Option<Tensor>,
}

/// What meets in a loss. Outputs have a tensor `[rows, width]` for each of [`Design::outputs`], targets for each of
/// [`Design::targets`]; the rows of a sample's images, and those of an image's cells, stay together.
#[cfg(feature = "train")]
#[derive(Clone, Copy, Debug)]
pub struct Met<'a> {
    /// Updates before this one.
    pub step: u64,
    /// The student's outputs for these samples, without their history.
    pub outputs: &'a [Tensor],
    /// Where rows are coupled, those of all ranks, in the order of the batch: of the
    /// [gathered](HeadDesign::is_gathered) heads.
    pub all: &'a [Tensor],
    /// The student's weights by name, without their history.
    pub weights: &'a [(String, Tensor)],
    /// Rank whose samples these are: where they stand in `all`.
    pub rank: i64,
    /// The labels of these samples.
    pub labels: Option<&'a Tensor>,
    /// The teacher's outputs for these samples.
    pub targets: &'a [Tensor],
    /// Keys of earlier steps.
    pub queues: &'a Queues,
    /// Gradients are multiplied by it, readings are not. Of a mean over these samples: their share of this
    /// rank's. Where rows are coupled, of the mean over the samples of all ranks: the number of ranks, by which
    /// the sum of their gradients is divided later.
    pub share: f64,
}

#[cfg(feature = "train")]
impl<'a> Met<'a> {
    /// Of these in the first step of a world of one, and nothing else.
    pub fn new(outputs: &'a [Tensor], targets: &'a [Tensor], queues: &'a Queues) -> Met<'a> {
        let (step, rank, share, labels) = (0, 0, 1.0, None);
        Met { step, outputs, all: &[], weights: &[], rank, labels, targets, queues, share }
    }

    /// A weight of the student's.
    ///
    /// # Panics
    /// When there is none of this name: a head that the method has declared has its own.
    pub fn weight(&self, name: &str) -> &Tensor {
        let found = self.weights.iter().find(|(known, _)| known == name);
        &found.expect("a declared head has its weights").1
    }
}

/// What a step wants of a loss.
#[cfg(feature = "train")]
#[derive(Debug)]
pub struct Scores {
    /// `[terms, readings]` in the order of [`Design::terms`] and [`Design::readings`]: means over the samples.
    pub readings: Tensor,
    /// Of the loss, by each of [`Met::outputs`] of a [scored](HeadDesign::is_scored) head, in its shape.
    pub gradients: Vec<Tensor>,
}

/// The method of a configuration: its table `[method]`.
#[derive(Clone, Debug)]
pub struct Chosen {
    name: String,
    keys: toml::Table,
    method: Arc<dyn Declare>,
}

impl Chosen {
    /// By its name and keys; keys that are not there have the method's defaults.
    ///
    /// # Errors
    /// In words: no such method, or a key that it does not have.
    pub fn new(name: &str, keys: toml::Table) -> Result<Chosen, String> {
        let all = all();
        let Some((_, read)) = all.iter().find(|(known, _)| known == name) else {
            let known: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
            return Err(format!("method.name = {name:?}: there are {}", known.join(", ")));
        };
        let (keys, method) = read(keys).map_err(|error| explained(name, &error, &all))?;
        Ok(Chosen { name: name.to_owned(), keys, method })
    }

    /// The name that it is registered under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its keys, if it is of this type.
    pub fn as_a<M: Declare>(&self) -> Option<&M> {
        let method: &dyn Any = &*self.method;
        method.downcast_ref()
    }

    /// What it does in training.
    #[cfg(feature = "train")]
    pub fn trained(&self) -> &dyn Method {
        let method: &dyn Any = &*self.method;
        let others = CASTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let found = TRAINED.iter().chain(others.iter()).find_map(|cast| cast(method));
        found.expect("whatever has a name is in one of both lists")
    }
}

impl Deref for Chosen {
    type Target = dyn Declare;

    fn deref(&self) -> &Self::Target {
        &*self.method
    }
}

impl PartialEq for Chosen {
    fn eq(&self, other: &Chosen) -> bool {
        self.name == other.name && self.keys == other.keys
    }
}

impl From<Moco> for Chosen {
    fn from(moco: Moco) -> Chosen {
        let keys = toml::Table::try_from(&moco).unwrap_or_default();
        Chosen { name: "moco".to_owned(), keys, method: Arc::new(moco) }
    }
}

impl Default for Chosen {
    fn default() -> Chosen {
        Chosen::from(Moco::default())
    }
}

impl Serialize for Chosen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1 + self.keys.len()))?;
        map.serialize_entry("name", &self.name)?;
        for (key, value) in &self.keys {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Chosen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Chosen, D::Error> {
        let mut keys = toml::Table::deserialize(deserializer)?;
        match keys.remove("name") {
            Some(toml::Value::String(name)) => Chosen::new(&name, keys).map_err(D::Error::custom),
            Some(other) => Err(D::Error::custom(format!("method.name = {other}: expected a name"))),
            None => Err(D::Error::missing_field("name")),
        }
    }
}

/// Reads a method's keys; gives them back with all defaults.
type Read = fn(toml::Table) -> Result<(toml::Table, Arc<dyn Declare>), String>;

/// The method, if it is of one type.
#[cfg(feature = "train")]
type Cast = fn(&dyn Any) -> Option<&dyn Method>;

#[cfg(feature = "train")]
fn cast<M: Method>(method: &dyn Any) -> Option<&dyn Method> {
    method.downcast_ref::<M>().map(|method| method as &dyn Method)
}

fn read<M: Declare + Serialize + DeserializeOwned>(
    keys: toml::Table,
) -> Result<(toml::Table, Arc<dyn Declare>), String> {
    let method = M::deserialize(toml::Value::Table(keys));
    let method = method.map_err(|error| error.to_string().trim_end().to_owned())?;
    let keys = toml::Table::try_from(&method).map_err(|error| error.to_string())?;
    Ok((keys, Arc::new(method)))
}

/// Methods of other crates.
static REGISTERED: RwLock<Vec<(String, Read)>> = RwLock::new(Vec::new());
#[cfg(feature = "train")]
static CASTS: RwLock<Vec<Cast>> = RwLock::new(Vec::new());

/// Adds a method of another crate under a name for `method.name`. Its fields are its keys, with defaults for
/// all (`#[serde(default, deny_unknown_fields)]`).
///
/// # Errors
/// With the name, if there is a method of that name.
#[cfg(feature = "train")]
pub fn register<M: Method + Serialize + DeserializeOwned>(name: &str) -> Result<(), NameTaken> {
    let mut registered = REGISTERED.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let taken = METHODS.iter().any(|(known, _)| *known == name)
        || registered.iter().any(|(known, _)| known == name);
    if taken {
        return Err(NameTaken { name: name.to_owned() });
    }
    CASTS.write().unwrap_or_else(|poisoned| poisoned.into_inner()).push(cast::<M>);
    registered.push((name.to_owned(), read::<M>));
    Ok(())
}

/// Two methods cannot have one name.
#[cfg(feature = "train")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is a method {name:?} already")]
pub struct NameTaken {
    /// The name.
    pub name: String,
}

fn all() -> Vec<(String, Read)> {
    let registered = REGISTERED.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let own = METHODS.iter().map(|(name, read)| (name.to_string(), *read));
    own.chain(registered.iter().cloned()).collect()
}

/// A fault of a method's table; a key of another method is called so.
fn explained(name: &str, error: &str, all: &[(String, Read)]) -> String {
    let message = format!("in [method] of {name:?}: {error}");
    let unknown = error.split_once("unknown field `").and_then(|(_, rest)| rest.split('`').next());
    let Some(key) = unknown else { return message };
    let has = |read: &Read| read(toml::Table::new()).is_ok_and(|(keys, _)| keys.contains_key(key));
    let others = all.iter().filter(|(other, read)| other != name && has(read));
    let others: Vec<&str> = others.map(|(other, _)| other.as_str()).collect();
    match others.as_slice() {
        [] => message,
        others => format!("{message}; it is a key of {}", others.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_defaults_for_all_keys_and_survives_a_round_trip() {
        for (name, read) in METHODS {
            let (keys, _) = read(toml::Table::new()).unwrap();
            assert!(!keys.is_empty());
            let chosen = Chosen::new(name, keys.clone()).unwrap();
            let text = toml::to_string(&chosen).unwrap();
            assert_eq!(toml::from_str::<Chosen>(&text).unwrap(), chosen);
            let design = chosen.design([64, 128, 256, 512]);
            assert_eq!(design.readings[0], "loss");
            assert!(!design.terms.is_empty() && !design.groups.is_empty());
            assert!(design.outputs().count() > 0);
            let widths: Vec<i64> =
                design.outputs().filter(|head| head.unit).map(|head| head.width).collect();
            assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{name}: {widths:?}");
        }
    }

    #[test]
    fn a_name_or_key_that_is_unknown_is_explained() {
        let said = Chosen::new("moko", toml::Table::new()).unwrap_err();
        assert!(said.starts_with("method.name = \"moko\": there are moco"), "{said}");
        let keys: toml::Table = "quue = 3".parse().unwrap();
        let said = Chosen::new("moco", keys).unwrap_err();
        assert!(said.contains("in [method] of \"moco\": unknown field `quue`"), "{said}");
    }
}
