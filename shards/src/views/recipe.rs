//! What may be drawn: a list of groups of views.
//!
//! A group says how many views there are of it, their size, which part of an image they show
//! ([`Crop`]), what is done to it ([`Step`], in order), and whether it is cut into patches ([`Grid`]).
//! In a file each group is a `[[views]]` table. The presets are in [`presets`](Recipe::preset).

use serde::{Deserialize, Deserializer, Serialize};

use super::crop::Crop;
use super::grid::Grid;
use super::step::{Step, Steps};
use super::valid::{RecipeError, side, within};
use crate::layout::Section;

/// Views of a group, at most.
const COUNT_MAX: u32 = 64;
/// Views of all groups, at most: a plan is drawn for each sample, and a slab holds them all.
const VIEWS_MAX: u32 = 256;

/// The views of a sample, as a list of groups.
///
/// The order of the list belongs to what is drawn: the first view of the first group has random
/// stream 0, and so on. The default is DetCo's, see [`Recipe::detco`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Recipe {
    /// The groups, in order. Their names differ.
    pub groups: Vec<Group>,
}

/// Views of one kind: they differ only in what was drawn for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name, by which a batch gives its views: small letters, digits, `-` and `_`.
    pub name: String,
    /// Views of a sample. 0 leaves the group out.
    #[serde(default = "one")]
    pub count: u32,
    /// Side of the square view in pixels; with a grid, of the image that is cut.
    pub size: u32,
    /// Which part of the image is resized to `size` x `size`.
    #[serde(default)]
    pub crop: Crop,
    /// What is done to it, in order: a list of steps, or the name of a group whose steps they are.
    #[serde(default)]
    pub steps: Steps,
    /// Cuts the view into patches, after the steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<Grid>,
    /// Whether one of four quarter turns is drawn and told in the view's [`Note`](super::Note). The
    /// pixels are not turned: whoever reads the batch does that.
    #[serde(default, skip_serializing_if = "is_false")]
    pub rotate: bool,
}

fn one() -> u32 {
    1
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Default for Group {
    /// One view of 224 pixels, by torchvision's `RandomResizedCrop`, without steps.
    fn default() -> Self {
        Group {
            name: "image".to_owned(),
            count: 1,
            size: 224,
            crop: Crop::default(),
            steps: Steps::default(),
            grid: None,
            rotate: false,
        }
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe::detco()
    }
}

impl Group {
    /// What one view of it is in a batch: `[size, size, 3]`, or `[patches, patch, patch, 3]`.
    pub fn shape(&self) -> Vec<usize> {
        match &self.grid {
            None => vec![self.size as usize, self.size as usize, 3],
            Some(grid) => {
                let patch = grid.patch as usize;
                vec![grid.patches(), patch, patch, 3]
            }
        }
    }

    /// Images of one view and their side in pixels: one, or its patches.
    pub fn images(&self) -> (usize, u32) {
        self.grid.as_ref().map_or((1, self.size), |grid| (grid.patches(), grid.patch))
    }
}

impl Recipe {
    /// A group by its name.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// A group by its name, to be changed.
    pub fn group_mut(&mut self, name: &str) -> Option<&mut Group> {
        self.groups.iter_mut().find(|group| group.name == name)
    }

    /// The groups of these names alone, in the recipe's order. Steps of a group that is left out and
    /// whose steps another takes over are that one's own now.
    #[must_use]
    pub fn only(&self, names: &[&str]) -> Recipe {
        let kept = self.groups.iter().filter(|group| names.contains(&group.name.as_str()));
        let owned = |group: &Group| {
            let steps = match &group.steps {
                Steps::Of(other) if !names.contains(&other.as_str()) => {
                    Steps::Own(self.steps(group).to_vec())
                }
                steps => steps.clone(),
            };
            Group { steps, ..group.clone() }
        };
        Recipe { groups: kept.map(owned).collect() }
    }

    /// What is done to the views of a group of this recipe.
    pub fn steps<'a>(&'a self, group: &'a Group) -> &'a [Step] {
        match &group.steps {
            Steps::Own(steps) => steps,
            Steps::Of(name) => match self.group(name).map(|other| &other.steps) {
                Some(Steps::Own(steps)) => steps,
                _ => &[], // refused by `validate`
            },
        }
    }

    /// Views of a sample, of all groups.
    pub fn views(&self) -> usize {
        self.groups.iter().map(|group| group.count as usize).sum()
    }

    /// Bytes of all views of a sample.
    pub fn bytes(&self) -> usize {
        self.sections().iter().map(|section| section.views * section.bytes()).sum()
    }

    /// What a batch holds of each group that has views.
    pub fn sections(&self) -> Vec<Section> {
        let groups = self.groups.iter().filter(|group| group.count > 0);
        groups.map(|group| Section::new(&group.name, group.count as usize, group.shape())).collect()
    }

    /// The same recipe at another size of its first group; the others' sizes, and patches, change in
    /// proportion, rounded so that grids still divide their images.
    #[must_use]
    pub fn with_size(mut self, size: u32) -> Recipe {
        let first = self.groups.first().map_or(size, |group| group.size);
        let scaled = |side: u32| (side * size + first / 2) / first;
        for group in &mut self.groups {
            let cells = group.grid.as_ref().map_or(1, |grid| grid.cells);
            group.size = (scaled(group.size) / cells).max(1) * cells;
            if let Some(grid) = &mut group.grid {
                grid.patch = scaled(grid.patch).clamp(1, group.size / cells);
            }
            group.crop.resize = group.crop.resize.map(|side| scaled(side).max(1));
        }
        self
    }

    /// Checks every number of the recipe.
    ///
    /// # Errors
    /// [`RecipeError`] names the first field that is out of range, in the spelling of a recipe file.
    pub fn validate(&self) -> Result<(), RecipeError> {
        for (at, group) in self.groups.iter().enumerate() {
            group.validate()?;
            let (name, before) = (&group.name, &self.groups[..at]);
            if before.iter().any(|other| other.name == *name) {
                return Err(RecipeError::RepeatedName { name: name.clone() });
            }
            if let Steps::Of(of) = &group.steps
                && !matches!(self.group(of), Some(Group { steps: Steps::Own(_), .. }))
            {
                return Err(RecipeError::StepsOf { name: name.clone(), of: of.clone() });
            }
        }
        let views = self.groups.iter().map(|group| group.count).sum::<u32>();
        within("count of all groups", f64::from(views), 0.0, f64::from(VIEWS_MAX))
    }
}

impl Group {
    fn validate(&self) -> Result<(), RecipeError> {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
        if self.name.is_empty() || !self.name.chars().all(legal) {
            return Err(RecipeError::Name { name: self.name.clone() });
        }
        let name = &self.name;
        within(&format!("{name}.count"), f64::from(self.count), 0.0, f64::from(COUNT_MAX))?;
        side(&format!("{name}.size"), self.size, 1)?;
        self.crop.validate(&format!("{name}.crop"))?;
        self.steps.validate(&format!("{name}.steps"))?;
        self.grid.as_ref().map_or(Ok(()), |grid| grid.validate(name, self.size))
    }
}

impl<'de> Deserialize<'de> for Recipe {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Recipe, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Recipe;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of groups of views, each a [[views]] table")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, list: A) -> Result<Recipe, A::Error> {
                let list = serde::de::value::SeqAccessDeserializer::new(list);
                Vec::deserialize(list).map(|groups| Recipe { groups })
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, _: A) -> Result<Recipe, A::Error> {
                Err(serde::de::Error::custom(TABLES))
            }
        }
        from.deserialize_any(Visitor)
    }
}

/// Of recipes as they were written before views were a list.
const TABLES: &str = "views are a list of groups: [[views]] with name = \"crops\" takes the place of \
    [views.global], one with name = \"patches\" that of [views.local], and what was under \
    `photometric` and `flip` is its list of steps. `detco-r50` shows all of it";
