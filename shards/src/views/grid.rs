//! Patches: a view is cut into a grid, and a patch is taken from each cell at its own random offset.

use std::collections::{BTreeMap, HashSet};
use std::sync::{PoisonError, RwLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::plan::GridPlan;
use super::rng::Rng;
use super::valid::{RecipeError, within};

/// Cells along a side, at most: the kernels have room for the places of so many patches.
pub(super) const CELLS_MAX: u32 = 3;
/// Patches of a view, at most.
pub(super) const PATCHES_MAX: usize = (CELLS_MAX * CELLS_MAX) as usize;
/// Permutations of a set, at most: ten times what Jigsaw has been found to gain from.
const SET_MAX: u32 = 10_000;

/// A grid of equal cells. From each a patch is cut at its own random offset, and the patches are put
/// in an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Cells along a side, 2 or 3.
    pub cells: u32,
    /// Side of a patch in pixels, at most that of a cell.
    pub patch: u32,
    /// The order of the patches.
    pub shuffle: Shuffle,
}

/// How patches are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    /// As their cells lie, row by row. In a file: `false`.
    No,
    /// Any order, all alike. In a file: `true`.
    Free,
    /// One of a fixed set of so many permutations, all alike; its index is in the view's
    /// [`Note`](super::Note). In a file: the number. See [`permutations`].
    Set(u32),
}

impl Grid {
    /// Patches of a view.
    pub fn patches(&self) -> usize {
        (self.cells * self.cells) as usize
    }

    /// Draws the patches of a view of `size` pixels.
    pub(super) fn draw(&self, size: u32, rng: &mut Rng, into: &mut GridPlan) {
        into.cells = self.cells;
        into.patch = self.patch;
        let room = size / self.cells - self.patch + 1;
        into.offsets.clear();
        into.offsets.extend((0..self.patches()).map(|_| [(); 2].map(|()| rng.below(room))));
        into.order.clear();
        into.permutation = None;
        match self.shuffle {
            Shuffle::No => into.order.extend(0..self.patches() as u8),
            Shuffle::Free => {
                into.order.extend(0..self.patches() as u8);
                rng.shuffle(&mut into.order);
            }
            Shuffle::Set(count) => {
                let index = rng.below(count);
                let set = permutations(self.patches(), count);
                into.order.extend_from_slice(&set[index as usize]);
                into.permutation = Some(index);
            }
        }
    }

    pub(super) fn validate(&self, name: &str, size: u32) -> Result<(), RecipeError> {
        let cells = self.cells;
        let most = f64::from(CELLS_MAX);
        within(&format!("{name}.grid.cells"), f64::from(cells), 2.0, most)?;
        if !size.is_multiple_of(cells) {
            return Err(RecipeError::NotAGrid { name: name.to_owned(), size, cells });
        }
        let (patch, cell) = (self.patch, size / cells);
        within(&format!("{name}.grid.patch"), f64::from(patch), 1.0, f64::from(u32::MAX))?;
        if patch > cell {
            return Err(RecipeError::PatchTooLarge { name: name.to_owned(), patch, cell, size });
        }
        let Shuffle::Set(count) = self.shuffle else { return Ok(()) };
        let all = (1..=self.patches() as u32).product::<u32>();
        let field = format!("{name}.grid.shuffle");
        within(&field, f64::from(count), 1.0, f64::from(SET_MAX.min(all)))
    }
}

type Set = &'static [Vec<u8>];

/// The set of `count` permutations of `patches` patches, at most 9; `count` is at least 1 and at most
/// the number of all permutations.
///
/// Greedy, as Noroozi and Favaro (2016, algorithm 1) choose theirs: the first at random, then always
/// one of those that differ in most places on average from those chosen so far. A smaller set is the
/// beginning of a larger one. The same everywhere and for ever: a run's labels are indices of it.
pub fn permutations(patches: usize, count: u32) -> Set {
    static KNOWN: RwLock<BTreeMap<(usize, u32), Set>> = RwLock::new(BTreeMap::new());
    if let Some(known) = KNOWN.read().unwrap_or_else(PoisonError::into_inner).get(&(patches, count))
    {
        return known;
    }
    let mut all = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
    // Kept for ever: recipes of one process have few such sets.
    all.entry((patches, count)).or_insert_with(|| Vec::leak(choose(patches, count)))
}

/// How often a cell has stood in a slot: the mean distance of a permutation from those chosen is the
/// larger, the smaller the sum of its counts.
type Counts = [[u32; PATCHES_MAX]; PATCHES_MAX];

fn choose(patches: usize, count: u32) -> Vec<Vec<u8>> {
    let mut rng = Rng::at(SEED, 0, patches as u64, 0);
    let mut counts = Counts::default();
    let (mut set, mut used) = (Vec::new(), HashSet::new());
    for _ in 0..count {
        let mut search = Search::new(patches, &counts, &used, &mut rng);
        search.slot(&mut Vec::new(), 0);
        let Some(next) = search.best else { break }; // all of them are in the set
        for (slot, cell) in next.iter().enumerate() {
            counts[slot][usize::from(*cell)] += 1;
        }
        used.insert(next.clone());
        set.push(next);
    }
    set
}

/// Of the sets, and not of any run.
const SEED: u64 = 0x4A_16_5A_77;

/// Looks for the unused permutation with the least sum of counts; of several the first one, in an
/// order of the cells that was drawn.
struct Search<'a> {
    counts: &'a Counts,
    used: &'a HashSet<Vec<u8>>,
    /// By slot: in which order cells are tried.
    tries: Vec<Vec<u8>>,
    /// By slot: no less than this can come of it and those after it.
    least: Vec<u32>,
    best_sum: u32,
    best: Option<Vec<u8>>,
}

impl<'a> Search<'a> {
    fn new(
        patches: usize,
        counts: &'a Counts,
        used: &'a HashSet<Vec<u8>>,
        rng: &mut Rng,
    ) -> Search<'a> {
        let tries = (0..patches).map(|slot| {
            let mut cells: Vec<u8> = (0..patches as u8).collect();
            rng.shuffle(&mut cells);
            // Those that cost least first: a good one is found soon, and most others need no look.
            cells.sort_by_key(|cell| counts[slot][usize::from(*cell)]);
            cells
        });
        let tries: Vec<Vec<u8>> = tries.collect();
        let mut least = vec![0; patches + 1];
        for slot in (0..patches).rev() {
            least[slot] = least[slot + 1] + counts[slot][usize::from(tries[slot][0])];
        }
        Search { counts, used, tries, least, best_sum: u32::MAX, best: None }
    }

    fn slot(&mut self, chosen: &mut Vec<u8>, sum: u32) {
        let slot = chosen.len();
        if sum + self.least[slot] >= self.best_sum {
            return;
        }
        if slot == self.tries.len() {
            if !self.used.contains(chosen) {
                (self.best_sum, self.best) = (sum, Some(chosen.clone()));
            }
            return;
        }
        for at in 0..self.tries.len() {
            let cell = self.tries[slot][at];
            if !chosen.contains(&cell) {
                chosen.push(cell);
                self.slot(chosen, sum + self.counts[slot][usize::from(cell)]);
                chosen.pop();
            }
        }
    }
}

impl Serialize for Shuffle {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Shuffle::No => to.serialize_bool(false),
            Shuffle::Free => to.serialize_bool(true),
            Shuffle::Set(count) => to.serialize_u32(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Shuffle {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Shuffle, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Shuffle;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("true, false, or the number of permutations to choose from")
            }

            fn visit_bool<E>(self, free: bool) -> Result<Shuffle, E> {
                Ok(if free { Shuffle::Free } else { Shuffle::No })
            }

            fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<Shuffle, E> {
                let known = u32::try_from(count).map(Shuffle::Set);
                known.map_err(|_| E::custom("more permutations than there are"))
            }

            fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<Shuffle, E> {
                let count = u64::try_from(count);
                count.map_or_else(|_| Err(E::custom("a negative number")), |n| self.visit_u64(n))
            }
        }
        from.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distance(a: &[u8], b: &[u8]) -> usize {
        a.iter().zip(b).filter(|(a, b)| a != b).count()
    }

    #[test]
    fn a_set_is_far_apart_and_the_beginning_of_a_larger_one() {
        let set = permutations(9, 2000);
        assert_eq!(set.len(), 2000);
        assert_eq!(set.iter().collect::<HashSet<_>>().len(), 2000);
        assert_eq!(permutations(9, 100), &set[..100]);
        for permutation in set {
            let mut sorted = permutation.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
        // Nine that agree nowhere, then nine again: no set of as many is further apart. Much later the one
        // that would complete a nine may be in the set already.
        for nine in set[..99].chunks(9) {
            for (at, permutation) in nine.iter().enumerate() {
                assert!(nine[..at].iter().all(|other| distance(other, permutation) == 9));
            }
        }
        let pairs = (0..2000).flat_map(|a| (0..a).map(move |b| (a, b)));
        let sum: usize = pairs.map(|(a, b)| distance(&set[a], &set[b])).sum();
        // A cell of 9 agrees with chance 1/9; those of the same nine never do.
        assert!(sum as f64 / (2000.0 * 1999.0 / 2.0) >= 8.0);
    }

    #[test]
    fn a_set_may_be_all_there_are() {
        let all = permutations(4, 24);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 24);
        // Pinned: an index means the same permutation in ten years.
        assert_eq!(permutations(9, 3), PINNED);
    }

    const PINNED: [[u8; 9]; 3] =
        [[0, 6, 3, 1, 7, 5, 2, 4, 8], [6, 4, 7, 8, 0, 1, 3, 2, 5], [1, 7, 0, 6, 2, 3, 8, 5, 4]];
}
