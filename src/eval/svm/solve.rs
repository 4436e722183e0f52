//! The unique minimum of linear support vector machines with squared hinge loss, many at once.
//!
//! ½ ‖w‖² + Σᵢ cᵢ max(0, 1 − yᵢ f(xᵢ))², f(x) = w·x + b with b in w, as the weight of a constant 1: it is
//! regularised, as liblinear has it (scikit-learn's `LinearSVC`, `intercept_scaling=1`). The function is strictly
//! convex. Its minimum is a sum of rows, w = Σᵢ βᵢ xᵢ, so everything is done on coefficients β `[n]` and the Gram
//! matrix K = X Xᵀ + 1 `[n, n]`, which all machines over the same rows share, whatever their classes, folds and
//! costs: they are columns of one matrix, and rows that a machine must not see have cᵢ = 0.
//!
//! Newton's method on w with the generalised Hessian I + Σ 2 cᵢ xᵢ xᵢᵀ over rows within the margin, its system by
//! conjugate gradients, its step by an exact line search. The function is 1-strongly convex, so the length of the
//! gradient bounds the distance to the minimum: it is the criterion to stop.

use tch::{Kind, Tensor};

use super::SvmError;

/// Length of the gradient, as a share of ‖w‖, at which a machine is done: f is then known to 1.5e-8 ‖w‖.
pub const TOLERANCE: f64 = 1e-8;
/// Newton steps before giving up; the hardest problems that were seen took 13.
const STEPS_MAX: usize = 200;
/// Iterations of conjugate gradients in a step. Where they end early the step is still one downhill.
const ITERATIONS_MAX: usize = 250;
/// Share of the gradient's length that conjugate gradients leave.
const FORCING: f64 = 1e-3;
/// Share of the slope that a line search may leave.
const SLOPE_LEFT: f64 = 0.1;
/// Steps of a line search. The slope is piecewise linear: few are needed.
const SEARCH_MAX: usize = 60;

/// Inner products of rows, X Xᵀ + 1, in float64.
#[derive(Debug)]
pub struct Gram(Tensor);

impl Gram {
    /// Of rows `[n, d]`.
    pub fn of(rows: &Tensor) -> Gram {
        let rows = rows.to_kind(Kind::Double);
        Gram(rows.matmul(&rows.transpose(0, 1)).g_add_scalar_(1.0))
    }

    /// Of some of the rows, by their numbers.
    #[must_use]
    pub fn part(&self, rows: &Tensor) -> Gram {
        Gram(self.0.index_select(0, rows).index_select(1, rows))
    }

    /// Rows.
    pub fn len(&self) -> usize {
        usize::try_from(self.0.size()[0]).unwrap_or(0)
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Machines at their minimum.
#[derive(Debug)]
pub struct Fit {
    /// Coefficients β `[n, m]`, a column a machine.
    pub dual: Tensor,
    /// Decision values f `[n, m]` of all rows, those of weight 0 too.
    pub decisions: Tensor,
    /// Newton steps of the machine that took most.
    pub steps: usize,
}

impl Fit {
    /// Decision values `[k, m]` of other rows `[k, d]`, where `rows` `[n, d]` are those of the Gram matrix.
    pub fn decide(&self, rows: &Tensor, others: &Tensor) -> Tensor {
        let weights = rows.to_kind(Kind::Double).transpose(0, 1).matmul(&self.dual); // [d, m]
        let bias = sum(&self.dual);
        others.to_kind(Kind::Double).matmul(&weights) + bias
    }
}

/// Sums of columns, `[m]`.
fn sum(of: &Tensor) -> Tensor {
    of.sum_dim_intlist(0, false, Kind::Double)
}

/// Brings machines to their minimum. `targets` `[n, m]` are 1 and -1; `weights` `[n, m]` are the cᵢ, 0 for rows
/// that a machine does not see. `start` are coefficients to begin with, such as those of a lower cost.
///
/// # Errors
/// [`SvmError::Shape`], [`SvmError::NotFinite`], and [`SvmError::NotConverged`] where rounding keeps a machine from
/// its minimum.
pub fn minimise(
    gram: &Gram,
    targets: &Tensor,
    weights: &Tensor,
    start: Option<&Tensor>,
) -> Result<Fit, SvmError> {
    let n = gram.0.size()[0];
    let shape = targets.size();
    if shape.len() != 2 || shape[0] != n || weights.size() != shape {
        return Err(SvmError::Shape { rows: n, targets: shape, weights: weights.size() });
    }
    let finite = |of: &Tensor| of.isfinite().all().int64_value(&[]) == 1;
    if !finite(&gram.0) || !finite(weights) {
        return Err(SvmError::NotFinite);
    }
    let seen = weights.gt(0.0).to_kind(Kind::Double);
    let mut dual = start.map_or_else(|| targets.zeros_like(), |start| start * &seen);
    let mut open = Tensor::arange(shape[1], (Kind::Int64, targets.device()));
    let mut steps = 0;
    loop {
        let of = |all: &Tensor| all.index_select(1, &open);
        let state = State::new(gram, of(targets), of(weights), of(&dual));
        let left = state.squared.gt_tensor(&(&state.norm * (TOLERANCE * TOLERANCE)));
        let left = left.nonzero().flatten(0, -1);
        if left.size()[0] == 0 {
            break;
        }
        if steps == STEPS_MAX {
            let worst = (state.squared / state.norm.clamp_min(f64::MIN_POSITIVE)).max().sqrt();
            return Err(SvmError::NotConverged { steps, left: worst.double_value(&[]) });
        }
        let state = state.only(&left);
        open = open.index_select(0, &left);
        let _ = dual.index_copy_(1, &open, &state.stepped(gram));
        steps += 1;
    }
    let decisions = gram.0.matmul(&dual);
    Ok(Fit { dual, decisions, steps })
}

/// Where machines stand: `[n, m]` each, and `[m]`.
struct State {
    targets: Tensor,
    weights: Tensor,
    dual: Tensor,
    decisions: Tensor,
    /// Coefficients of the gradient, and its inner products with rows.
    gradient: Tensor,
    along: Tensor,
    /// Squared lengths of gradient and w.
    squared: Tensor,
    norm: Tensor,
}

impl State {
    fn new(gram: &Gram, targets: Tensor, weights: Tensor, dual: Tensor) -> State {
        let decisions = gram.0.matmul(&dual);
        let slack = (1.0_f64 - &targets * &decisions).clamp_min(0.0);
        let gradient = &dual - 2.0_f64 * &weights * &targets * slack;
        let along = gram.0.matmul(&gradient);
        let squared = sum(&(&gradient * &along)).clamp_min(0.0);
        let norm = sum(&(&dual * &decisions)).clamp_min(0.0);
        State { targets, weights, dual, decisions, gradient, along, squared, norm }
    }

    /// Some of the machines.
    fn only(&self, machines: &Tensor) -> State {
        let of = |all: &Tensor| all.index_select(1, machines);
        State {
            targets: of(&self.targets),
            weights: of(&self.weights),
            dual: of(&self.dual),
            decisions: of(&self.decisions),
            gradient: of(&self.gradient),
            along: of(&self.along),
            squared: self.squared.index_select(0, machines),
            norm: self.norm.index_select(0, machines),
        }
    }

    /// Coefficients after a Newton step.
    fn stepped(&self, gram: &Gram) -> Tensor {
        let (direction, change) = self.direction(gram);
        let length = self.length(&direction, &change);
        &self.dual + length * direction
    }

    /// Newton's direction by conjugate gradients, and what it changes of the decisions. Inner products are those of
    /// vectors `Σ vᵢ xᵢ`, vᵀ K v: a product of K with a block of machines each iteration.
    fn direction(&self, gram: &Gram) -> (Tensor, Tensor) {
        let within = (&self.targets * &self.decisions).lt(1.0).to_kind(Kind::Double);
        let curvature = 2.0_f64 * &self.weights * within; // [n, m], 0 beyond the margin
        let (mut found, mut change) = (self.dual.zeros_like(), self.dual.zeros_like());
        let mut open = Tensor::arange(self.dual.size()[1], (Kind::Int64, self.dual.device()));
        let mut block = Block {
            residual: -&self.gradient,
            residual_k: -&self.along,
            direction: -&self.gradient,
            direction_k: -&self.along,
            squared: self.squared.shallow_clone(),
        };
        let goal = &self.squared * (FORCING * FORCING);
        for _ in 0..ITERATIONS_MAX {
            let pulled = curvature.index_select(1, &open) * &block.direction_k;
            let image = &block.direction + &pulled;
            let image_k = &block.direction_k + gram.0.matmul(&pulled);
            let length = &block.squared / sum(&(&block.direction * &image_k));
            let _ = found.index_add_(1, &open, &(&length * &block.direction));
            let _ = change.index_add_(1, &open, &(&length * &block.direction_k));
            block.advance(&length, &image, &image_k);
            let left = block.squared.gt_tensor(&goal.index_select(0, &open)).nonzero();
            let left = left.flatten(0, -1);
            match left.size()[0] {
                0 => break,
                some if some < open.size()[0] => {
                    block = block.only(&left);
                    open = open.index_select(0, &left);
                }
                _ => {}
            }
        }
        (found, change)
    }

    /// How far to go, `[m]`: where the slope of the piecewise quadratic function has all but vanished.
    fn length(&self, direction: &Tensor, change: &Tensor) -> Tensor {
        let linear = sum(&(&self.dual * change));
        let square = sum(&(direction * change));
        let pull = &self.weights * &self.targets * change;
        let bend = &self.weights * change * change;
        let slope = |length: &Tensor| {
            let slack = 1.0_f64 - &self.targets * (&self.decisions + length * change);
            let slope = &linear + length * &square - 2.0_f64 * sum(&(&pull * slack.clamp_min(0.0)));
            let within = slack.gt(0.0).to_kind(Kind::Double);
            (slope, &square + 2.0_f64 * sum(&(&bend * within)))
        };
        let mut length = square.ones_like();
        let small = slope(&square.zeros_like()).0.abs() * SLOPE_LEFT;
        let (mut low, mut high) = (square.zeros_like(), square.full_like(f64::INFINITY));
        for _ in 0..SEARCH_MAX {
            let (slope, bend) = slope(&length);
            let open = slope.abs().gt_tensor(&small);
            if open.any().int64_value(&[]) == 0 {
                break;
            }
            low = length.where_self(&slope.lt(0.0), &low);
            high = length.where_self(&slope.gt(0.0), &high);
            let newton = &length - slope / bend;
            let inside = newton.gt_tensor(&low).logical_and(&newton.lt_tensor(&high));
            let middle = (&low + &high) / 2.0;
            let other = middle.where_self(&high.isfinite(), &(&length * 2.0));
            let next = newton.where_self(&inside, &other);
            length = next.where_self(&open, &length);
        }
        length
    }
}

/// Machines whose conjugate gradients go on: vectors, and their products with K.
struct Block {
    residual: Tensor,
    residual_k: Tensor,
    direction: Tensor,
    direction_k: Tensor,
    squared: Tensor,
}

impl Block {
    fn advance(&mut self, length: &Tensor, image: &Tensor, image_k: &Tensor) {
        self.residual -= length * image;
        self.residual_k -= length * image_k;
        let squared = sum(&(&self.residual * &self.residual_k)).clamp_min(0.0);
        let turn = &squared / &self.squared;
        self.direction = &self.residual + &turn * &self.direction;
        self.direction_k = &self.residual_k + turn * &self.direction_k;
        self.squared = squared;
    }

    fn only(&self, machines: &Tensor) -> Block {
        let of = |all: &Tensor| all.index_select(1, machines);
        Block {
            residual: of(&self.residual),
            residual_k: of(&self.residual_k),
            direction: of(&self.direction),
            direction_k: of(&self.direction_k),
            squared: self.squared.index_select(0, machines),
        }
    }
}
