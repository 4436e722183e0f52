//! Weighted k-nearest-neighbour classification (Wu et al., 2018, section 3.4), as MoCo's CIFAR
//! notebook monitors training: k = 200, τ = 0.1.
//!
//! Features of Res5 or of another level's map, pooled and of unit length. Of a query's k most similar memory samples
//! each votes for its class with weight exp(similarity / τ). Exact search: queries and memory meet block
//! by block, so that beside the features only one block of similarities is held. Ties go to the
//! sample that comes first in the shards, then to the class with the lower index: the same weights
//! give the same figure.

use std::ops::ControlFlow;
use std::sync::Arc;

use detco_shards::order::{Order, OrderError};
use detco_shards::stream::ShardSet;
use tch::{Kind, TchError, Tensor};
use thiserror::Error;

use crate::eval::classes::{Classes, NothingInCommon};
use crate::eval::features::{self, FeaturesError, Look, Pool, Rows};
use crate::eval::linear::{self, LinearError};
use crate::eval::rankme;
use crate::model::Encoder;
use crate::shim::ShimError;

/// Rows of a block of similarities: queries.
const QUERY_ROWS: i64 = 256;
/// Columns of a block: memory samples. 256 × 65,536 `f32` are 64 MiB.
const MEMORY_ROWS: i64 = 65_536;

/// Why there is no figure.
#[derive(Debug, Error)]
pub enum KnnError {
    /// Nothing to compare with, or nothing to classify.
    #[error("the {which} set holds no samples")]
    Empty {
        /// `train` (memory) or `test` (queries).
        which: &'static str,
    },
    /// k or τ that make no sense.
    #[error("{name} = {value}: expected a number above 0")]
    Option {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: f64,
    },
    /// A level that a ResNet has no map of.
    #[error("level = {level}: expected 2 to 5, for the map of Res2 to Res5")]
    Level {
        /// What was asked for.
        level: u8,
    },
    /// As many classes as features are needed.
    #[error("{features} feature rows, {classes} classes")]
    Lengths {
        /// Rows of features.
        features: i64,
        /// Classes.
        classes: usize,
    },
    /// A feature is NaN or infinite.
    #[error("feature row {row} of the {which} set is not finite")]
    NotFinite {
        /// `train` (memory) or `test` (queries).
        which: &'static str,
        /// Row.
        row: usize,
    },
    /// Each test sample would count as wrong.
    #[error(
        "no class of the test set is in the train set: {} there, {} here. The names are those of the \
         class folders that the sets were packed from",
        .0.train,
        .0.test
    )]
    NothingInCommon(NothingInCommon),
    /// No batches, or no samples.
    #[error("the {which} set cannot be read: {source}")]
    Order {
        /// `train` (memory) or `test` (queries).
        which: &'static str,
        /// Why.
        source: OrderError,
    },
    /// Samples gave no features.
    #[error(transparent)]
    Features(#[from] FeaturesError),
    /// The linear classifier beside kNN could not be fitted.
    #[error(transparent)]
    Linear(#[from] Box<LinearError>),
    /// libtorch failed, as where memory ends.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// The watcher asked for the end.
    #[error("stopped after {done} of {total} samples")]
    Stopped {
        /// Samples whose features were made.
        done: u64,
        /// Samples of both sets.
        total: u64,
    },
    /// libtorch refused.
    #[error("{0}")]
    Torch(#[from] TchError),
}

/// How to make features, and who votes.
#[derive(Clone, Debug, PartialEq)]
pub struct KnnOptions {
    /// Whether a linear classifier is fitted to the same features too: logistic regression, as `detco eval linear`.
    pub linear: bool,
    /// Neighbours that vote, k.
    pub k: usize,
    /// Temperature of the votes, τ.
    pub temperature: f64,
    /// How samples are looked at.
    pub look: Look,
    /// The level whose map is read, average-pooled: 2 for Res2 to 5 for Res5.
    pub level: u8,
    /// At most this many samples of each set, evenly spaced; 0 means all.
    pub samples_max: u64,
    /// Samples that go through the network together.
    pub batch: u64,
}

impl Default for KnnOptions {
    fn default() -> Self {
        KnnOptions {
            k: 200,
            temperature: 0.1,
            look: Look::default(),
            level: 5,
            linear: false,
            samples_max: 0,
            batch: 128,
        }
    }
}

/// Classifies the samples of `test` by their neighbours in `train`. Holds the features of both sets
/// on the encoder's device: 4 c bytes a sample (10.5 GB for ImageNet on ResNet-50's Res5).
///
/// # Errors
/// [`KnnError`], naming the sample where it is one sample's fault.
pub fn evaluate(
    encoder: &Encoder,
    train: &Arc<ShardSet>,
    test: &Arc<ShardSet>,
    options: &KnnOptions,
) -> Result<Report, KnnError> {
    evaluate_watched(encoder, train, test, options, &mut |_, _| ControlFlow::Continue(()))
}

/// As [`evaluate`]; `watch` hears the samples done and the samples in all, and may ask for the end.
///
/// # Errors
/// As [`evaluate`], and [`KnnError::Stopped`].
pub fn evaluate_watched(
    encoder: &Encoder,
    train: &Arc<ShardSet>,
    test: &Arc<ShardSet>,
    options: &KnnOptions,
    watch: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Report, KnnError> {
    if !(2..=5).contains(&options.level) {
        return Err(KnnError::Level { level: options.level });
    }
    let same = compare(train, test)?;
    let order = |which, set: &ShardSet| {
        let most = if options.samples_max == 0 { set.len() } else { options.samples_max };
        Order::spaced(set.len(), most, options.batch)
            .map_err(|source| KnnError::Order { which, source })
    };
    let [of_train, of_test] = [order("train", train)?, order("test", test)?];
    let total = of_train.samples() + of_test.samples();
    let mut done = 0;
    let mut features = |which, set: &Arc<ShardSet>, order| {
        extract(encoder, which, set, order, options, &mut |n| {
            done += n;
            match watch(done, total) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(KnnError::Stopped { done, total }),
            }
        })
    };
    let memory = features("train", train, of_train)?;
    let queries = features("test", test, of_test)?;
    let [of_train, raw] = [&memory, &queries].map(|rows| rows.levels[0].shallow_clone());
    let [mut memory, mut queries] = [unit(memory, "train")?, unit(queries, "test")?];
    let rankme = (100.0 * rankme::rankme(&raw)?).round() / 100.0;
    memory.classes.iter_mut().for_each(|class| *class = same.of_train(*class));
    queries.classes.iter_mut().for_each(|class| *class = same.of_test(*class));
    let report = classify(&memory, &queries, options.k, options.temperature)?;
    let fit = || {
        let sets = [(&of_train, &memory.classes[..]), (&raw, &queries.classes[..])];
        linear::top1_of_rows(options.level, sets[0], sets[1], &linear::usual_costs())
            .map_err(Box::new)
    };
    let linear = options.linear.then(fit).transpose()?;
    Ok(Report { rankme: Some(rankme), linear, ..report })
}

/// Which class of the test set is which of the training set, and what the user should know of it:
/// without a look at any sample, so that a run can say it before it starts.
///
/// # Errors
/// [`KnnError::NothingInCommon`].
pub fn compare(train: &ShardSet, test: &ShardSet) -> Result<Classes, KnnError> {
    Classes::compare(train.classes(), test.classes()).map_err(KnnError::NothingInCommon)
}

/// Features of the samples of a set, in its order, as the network gives them.
fn extract(
    encoder: &Encoder,
    which: &'static str,
    set: &Arc<ShardSet>,
    order: Order,
    options: &KnnOptions,
    tick: &mut dyn FnMut(u64) -> Result<(), KnnError>,
) -> Result<Rows, KnnError> {
    let asked = (&[options.level][..], Pool::Average);
    let rows = features::rows(encoder, (which, set), order, &options.look, asked, tick)?;
    if rows.levels.is_empty() { Err(KnnError::Empty { which }) } else { Ok(rows) }
}

/// The same of unit length.
fn unit(rows: Rows, which: &'static str) -> Result<Features, KnnError> {
    let [of_level] = &rows.levels[..] else { return Err(KnnError::Empty { which }) };
    Features::new(of_level, rows.classes, which)
}

/// What was found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
    /// Queries whose class got the most votes, in percent.
    pub top1: f64,
    /// Queries whose class is among the five with the most votes, in percent; none up to five
    /// classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Neighbours that voted: what was asked for, but at most the memory.
    pub k: usize,
    /// Temperature of the votes, τ.
    pub temperature: f64,
    /// Samples in memory.
    pub memory: usize,
    /// Samples classified.
    pub queries: usize,
    /// Classes of both together.
    pub classes: usize,
    /// Samples classified whose class no sample in memory has: they count as wrong.
    pub unknown: usize,
    /// RankMe of the queries' features, to two digits: how many dimensions they use. None of features alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rankme: Option<f64>,
    /// Top-1 of the linear classifier, in percent; none where it was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linear: Option<f64>,
    /// Of each query, whether its class got the most votes.
    #[serde(skip)]
    pub hits: Vec<bool>,
}

/// Features `[m, c]` of unit length and their classes.
#[derive(Debug)]
pub struct Features {
    rows: Tensor,
    classes: Vec<u32>,
}

impl Features {
    /// Takes features `[m, c]` of any length and one class a row; `which` names the set in errors.
    ///
    /// # Errors
    /// [`KnnError::Empty`], [`KnnError::Lengths`], [`KnnError::NotFinite`].
    pub fn new(
        rows: &Tensor,
        classes: Vec<u32>,
        which: &'static str,
    ) -> Result<Features, KnnError> {
        let m = rows.size().first().copied().unwrap_or(0);
        if m == 0 {
            return Err(KnnError::Empty { which });
        }
        if usize::try_from(m) != Ok(classes.len()) {
            return Err(KnnError::Lengths { features: m, classes: classes.len() });
        }
        let rows = rows.f_to_kind(Kind::Float)?;
        // A row's squares may overflow where its elements do not, so the norms are looked at too.
        let norms = rows.f_norm_scalaropt_dim(2.0, [1], true)?;
        let finite = Vec::<bool>::try_from(norms.f_isfinite()?.f_flatten(0, -1)?)?;
        if let Some(row) = finite.iter().position(|finite| !finite) {
            return Err(KnnError::NotFinite { which, row });
        }
        // A row of zeros stays one: equally far from everything.
        let rows = rows.f_div(&norms.f_clamp_min(1e-12)?)?;
        Ok(Features { rows, classes })
    }

    /// Samples.
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Whether there are none; a constructed one is never empty.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }
}

/// One of a query's neighbours: similarity, row in memory.
type Neighbour = (f32, usize);

/// Classifies `queries` by their `k` nearest in `memory` at temperature `temperature`. With fewer
/// than `k` in memory all of them vote; the report says so.
///
/// # Errors
/// [`KnnError::Option`] for k or τ of 0, [`KnnError::Torch`] when features do not match.
pub fn classify(
    memory: &Features,
    queries: &Features,
    k: usize,
    temperature: f64,
) -> Result<Report, KnnError> {
    if k == 0 {
        return Err(KnnError::Option { name: "k", value: 0.0 });
    }
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(KnnError::Option { name: "t", value: temperature });
    }
    let k = k.min(memory.len());
    // Class numbers are foreign: counted, not used as lengths.
    let mut known: Vec<u32> = memory.classes.iter().chain(&queries.classes).copied().collect();
    known.sort_unstable();
    known.dedup();
    let place = |class: &u32| known.partition_point(|other| other < class);
    let voters: Vec<usize> = memory.classes.iter().map(place).collect();
    let mut votes = vec![0.0; known.len()];
    let mut in_memory = vec![false; known.len()];
    voters.iter().for_each(|class| in_memory[*class] = true);
    let (mut hits, mut five) = (Vec::with_capacity(queries.len()), 0_u64);
    let mut row = 0;
    for block in queries.rows.f_split(QUERY_ROWS, 0)? {
        for neighbours in nearest(&memory.rows, &block, k)? {
            vote(&neighbours, &voters, temperature, &mut votes);
            let rank = rank(&votes, place(&queries.classes[row]));
            hits.push(rank == Some(0));
            five += u64::from(rank.is_some_and(|rank| rank < 5));
            row += 1;
        }
    }
    let percent = |hits: u64| 100.0 * hits as f64 / queries.len() as f64;
    Ok(Report {
        top1: percent(hits.iter().filter(|hit| **hit).count() as u64),
        top5: (known.len() > 5).then(|| percent(five)),
        k,
        temperature,
        memory: memory.len(),
        queries: queries.len(),
        classes: known.len(),
        unknown: queries.classes.iter().filter(|class| !in_memory[place(class)]).count(),
        rankme: None,
        linear: None,
        hits,
    })
}

/// The `k` nearest of each query, nearest first, equal ones in the order of memory.
fn nearest(memory: &Tensor, queries: &Tensor, k: usize) -> Result<Vec<Vec<Neighbour>>, KnnError> {
    let n = usize::try_from(queries.size()[0]).unwrap_or(0);
    let mut best: Vec<Vec<Neighbour>> = vec![Vec::with_capacity(2 * k); n];
    let mut start = 0;
    for block in memory.f_split(MEMORY_ROWS, 0)? {
        let width = block.size()[0];
        let similar = queries.f_matmul(&block.f_transpose(0, 1)?)?; // [n, c] x [c, m] -> [n, m]
        let most = width.min(k as i64);
        let (values, columns) = similar.f_topk(most, 1, true, true)?;
        // topk may take any of several equal ones at its end: rows where it had the choice are
        // settled by hand.
        let worst = values.f_narrow(1, most - 1, 1)?;
        let contested = similar.f_ge_tensor(&worst)?.f_sum_dim_intlist(1, false, Kind::Int64)?;
        let contested = Vec::<i64>::try_from(contested)?;
        let values = Vec::<f32>::try_from(values.f_contiguous()?.f_view(-1)?)?;
        let columns = Vec::<i64>::try_from(columns.f_contiguous()?.f_view(-1)?)?;
        let most = most as usize;
        for (row, best) in best.iter_mut().enumerate() {
            if contested[row] > most as i64 {
                let all = Vec::<f32>::try_from(similar.f_get(row as i64)?)?;
                let worst = values[row * most + most - 1];
                let above = all.iter().enumerate().filter(|(_, value)| **value > worst);
                let equal = all.iter().enumerate().filter(|(_, value)| **value == worst);
                let chosen = above.chain(equal).take(most);
                best.extend(chosen.map(|(column, value)| (*value, start + column)));
            } else {
                let range = row * most..(row + 1) * most;
                let pairs = values[range.clone()].iter().zip(&columns[range]);
                best.extend(pairs.map(|(value, column)| (*value, start + *column as usize)));
            }
            best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            best.truncate(k);
        }
        start += width as usize;
    }
    Ok(best)
}

/// Adds up each class's votes.
fn vote(neighbours: &[Neighbour], classes: &[usize], temperature: f64, votes: &mut [f64]) {
    votes.fill(0.0);
    // Relative to the nearest: the same order of classes, and no overflow at a small τ.
    let nearest = neighbours.first().map_or(0.0, |(similarity, _)| f64::from(*similarity));
    for (similarity, row) in neighbours {
        votes[classes[*row]] += ((f64::from(*similarity) - nearest) / temperature).exp();
    }
}

/// How many classes come before `class`; none when nobody voted for it.
fn rank(votes: &[f64], class: usize) -> Option<usize> {
    let own = votes[class];
    let before =
        |(other, votes): &(usize, &f64)| **votes > own || (**votes == own && *other < class);
    (own > 0.0).then(|| votes.iter().enumerate().filter(before).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(rows: &[[f32; 2]], classes: &[u32]) -> Features {
        let flat: Vec<f32> = rows.iter().flatten().copied().collect();
        let rows = Tensor::from_slice(&flat).view([-1, 2]);
        Features::new(&rows, classes.to_vec(), "train").unwrap()
    }

    #[test]
    fn the_nearer_of_two_outvotes_until_it_is_hot() {
        let memory = features(&[[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]], &[1, 0, 0]);
        let query = features(&[[3.0, 0.0]], &[1]);
        // exp(0) against 2 exp(-0.4 / t): the one wins below t = 0.4 / ln 2 = 0.577.
        assert_eq!(classify(&memory, &query, 3, 0.5).unwrap().top1, 100.0);
        assert_eq!(classify(&memory, &query, 3, 0.6).unwrap().top1, 0.0);
        assert_eq!(classify(&memory, &query, 1, 0.6).unwrap().top1, 100.0);
        assert_eq!(classify(&memory, &query, 200, 1e-6).unwrap().k, 3);
    }

    #[test]
    fn equal_ones_vote_in_the_order_of_memory() {
        // Fifty copies, of which only the first three may vote: classes 2, 2, 1.
        let rows = vec![[1.0, 0.0]; 50];
        let classes: Vec<u32> = (0..50).map(|i| if i < 2 { 2 } else { 1 }).collect();
        let memory = features(&rows, &classes);
        let query = features(&[[1.0, 0.0]], &[2]);
        let found = nearest(&memory.rows, &query.rows, 3).unwrap();
        assert_eq!(found, [[(1.0, 0), (1.0, 1), (1.0, 2)]]);
        assert_eq!(classify(&memory, &query, 3, 0.1).unwrap().top1, 100.0);
        assert_eq!(classify(&memory, &query, 50, 0.1).unwrap().top1, 0.0);
    }

    #[test]
    fn a_class_without_votes_is_no_hit() {
        assert_eq!(rank(&[0.0, 0.5, 0.0, 0.5], 0), None);
        assert_eq!(rank(&[0.0, 0.5, 0.0, 0.5], 1), Some(0));
        assert_eq!(rank(&[0.0, 0.5, 0.0, 0.5], 3), Some(1));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let rows = Tensor::from_slice(&[1.0_f32, f32::NAN]).view([2, 1]);
        let error = Features::new(&rows, vec![0, 0], "test").unwrap_err();
        assert_eq!(error.to_string(), "feature row 1 of the test set is not finite");
        assert!(Features::new(&rows, vec![0], "test").is_err());
        assert!(Features::new(&Tensor::zeros([0, 4], tch::kind::FLOAT_CPU), vec![], "x").is_err());
        let one = features(&[[1.0, 0.0]], &[0]);
        assert!(classify(&one, &one, 0, 0.1).is_err());
        assert!(classify(&one, &one, 1, f64::NAN).is_err());
    }
}
