//! Logistic regression on features that are made once.

use detco_shards::order::Order;
use tch::{Kind, Tensor};

use super::newton::{Problem, Until};
use super::{
    LinearError, LinearOptions, Numbering, Outcome, Sets, Tried, Watch, check_finite, hits, percent,
};
use crate::eval::features::{self, Rows};
use crate::model::Encoder;

/// Samples that go through the network together.
const BATCH: u64 = 128;
/// Of this many training samples one is held out to choose the cost.
const HELD_OUT: usize = 10;
/// So many costs in a row that are no better than the best end the search.
const PATIENCE: usize = 3;
/// Good enough to choose a cost.
const ROUGH: Until = Until { gradient: 1e-5, steps: 50 };
/// The minimum.
const EXACT: Until = Until { gradient: 1e-9, steps: 200 };

pub(super) fn run(
    encoder: &Encoder,
    sets: &Sets,
    options: &LinearOptions,
    costs: &[f64],
    watch: Watch<'_>,
) -> Result<Vec<Outcome>, LinearError> {
    let order = |which, len: u64| {
        let most = if options.samples_max == 0 { len } else { options.samples_max };
        Order::spaced(len, most, BATCH).map_err(|source| LinearError::Order { which, source })
    };
    let orders = [order("train", sets.train.len())?, order("test", sets.test.len())?];
    let total: u64 = orders.iter().map(Order::samples).sum();
    let mut done = 0;
    let mut rows = |which, set, order| -> Result<Rows, LinearError> {
        let asked = (&options.levels[..], options.pool);
        features::rows(encoder, (which, set), order, &options.look, asked, &mut |n| {
            done += n;
            watch("features", done, total);
            Ok::<_, LinearError>(())
        })
    };
    let [of_train, of_test] = orders;
    let mut train = rows("train", &sets.train, of_train)?;
    let mut test = rows("test", &sets.test, of_test)?;
    train.classes.iter_mut().for_each(|class| *class = sets.classes.of_train(*class));
    test.classes.iter_mut().for_each(|class| *class = sets.classes.of_test(*class));
    let numbering = Numbering::of(train.classes.iter().copied())?;
    let place = |classes: &[u32]| -> Vec<i64> {
        classes.iter().map(|class| numbering.place(*class)).collect()
    };
    let (classes, of_test) = (place(&train.classes), place(&test.classes));
    let fits = (options.levels.len() * (costs.len() + 1)) as u64;
    let mut outcomes = Vec::new();
    for (i, level) in options.levels.iter().enumerate() {
        let before = (i * (costs.len() + 1)) as u64;
        let mut tick = |n: usize| watch("fits", before + n as u64, fits);
        let sets = [(&train.levels[i], &classes[..]), (&test.levels[i], &of_test[..])];
        outcomes.push(of_level(*level, sets, numbering.len(), costs, &mut tick)?);
    }
    Ok(outcomes)
}

/// Top-1 on the test rows, in percent, of a classifier fitted to the training rows, whose classes are any numbers; the
/// cost is chosen as `detco eval linear` does.
///
/// # Errors
/// As [`super::evaluate`].
pub fn top1_of_rows(
    level: u8,
    (train, classes): (&Tensor, &[u32]),
    (test, of_test): (&Tensor, &[u32]),
    costs: &[f64],
) -> Result<f64, LinearError> {
    let numbering = Numbering::of(classes.iter().copied())?;
    let place = |classes: &[u32]| -> Vec<i64> {
        classes.iter().map(|class| numbering.place(*class)).collect()
    };
    let (classes, of_test) = (place(classes), place(of_test));
    let sets = [(train, &classes[..]), (test, &of_test[..])];
    Ok(of_level(level, sets, numbering.len(), costs, &mut |_| ())?.top1())
}

/// Chooses a cost, fits all training rows at it and measures the test rows; `tick` hears of the fits done.
fn of_level(
    level: u8,
    [(rows, classes), (test_rows, of_test)]: [(&Tensor, &[i64]); 2],
    count: i64,
    costs: &[f64],
    tick: &mut dyn FnMut(usize),
) -> Result<Outcome, LinearError> {
    check_finite(rows, level, "train")?;
    check_finite(test_rows, level, "test")?;
    let (mut tried, chosen) = choose(rows, classes, count, costs, tick)?;
    let cost = tried[chosen].value;
    let all = Tensor::from_slice(classes).f_to_device(rows.device())?;
    let fitted = Problem { rows, classes: &all, count, cost }.fit(None, EXACT)?;
    tick(costs.len() + 1);
    if fitted.gradient > 1e-6 {
        note!(
            "note: Res{level}: the fit at C = {cost} ended with a gradient of {:.1e} after {} steps",
            fitted.gradient,
            fitted.steps
        );
    }
    let (first, five) = hits(&fitted.logits(test_rows)?, of_test)?;
    tried[chosen].top1 = Some(percent(&first));
    tried[chosen].loss = fitted.objective;
    Ok(Outcome {
        level,
        width: rows.size()[1],
        tried,
        chosen,
        top5: (count > 5).then(|| percent(&five)),
        hits: first,
        best: None,
    })
}

/// Fits at each cost on all samples but every tenth, from the minimum of the cost before, and chooses the cost that is
/// best on those; of equally good ones the lowest.
fn choose(
    rows: &Tensor,
    classes: &[i64],
    count: i64,
    costs: &[f64],
    tick: &mut dyn FnMut(usize),
) -> Result<(Vec<Tried>, usize), LinearError> {
    if let [cost] = costs {
        return Ok((vec![Tried { value: *cost, held_out: None, top1: None, loss: 0.0 }], 0));
    }
    if classes.len() < HELD_OUT {
        let (samples, one_in) = (classes.len(), HELD_OUT as u64);
        return Err(LinearError::Few { samples, one_in, what: "costs" });
    }
    let part = |held: bool| -> Vec<i64> {
        (0..classes.len())
            .filter(|i| (i % HELD_OUT == HELD_OUT - 1) == held)
            .map(|i| i as i64)
            .collect()
    };
    let of = |at: &[i64]| -> Vec<i64> { at.iter().map(|i| classes[*i as usize]).collect() };
    let (fit_at, held_at) = (part(false), part(true));
    let device = rows.device();
    let select = |at: &[i64]| rows.f_index_select(0, &Tensor::from_slice(at).f_to_device(device)?);
    let (fit_rows, held_rows) = (select(&fit_at)?, select(&held_at)?);
    let fit_classes =
        Tensor::from_slice(&of(&fit_at)).f_to_kind(Kind::Int64)?.f_to_device(device)?;
    let held_classes = of(&held_at);
    let (mut tried, mut best, mut theta): (Vec<Tried>, usize, Option<Tensor>) =
        (Vec::new(), 0, None);
    for (i, cost) in costs.iter().enumerate() {
        let problem = Problem { rows: &fit_rows, classes: &fit_classes, count, cost: *cost };
        let fitted = problem.fit(theta.as_ref(), ROUGH)?;
        let (first, _) = hits(&fitted.logits(&held_rows)?, &held_classes)?;
        let held_out = Some(percent(&first));
        tried.push(Tried { value: *cost, held_out, top1: None, loss: fitted.objective });
        if held_out > tried[best].held_out {
            best = i;
        }
        theta = Some(fitted.theta);
        tick(i + 1);
        if i - best >= PATIENCE {
            break;
        }
    }
    Ok((tried, best))
}
