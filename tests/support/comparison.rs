//! What differs between two trainers that do the same, tensor by tensor and step by step, and what of it is a fault.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::numerical::error;
use super::reference::STEPS;

/// What a crossed threshold changes: gradients, and what a step makes of them. Key weights and queues are made
/// before, from the reference's own state.
const CROSSED: [&str; 3] = ["gradients", "momentum", "query weights"];
/// float32's own errors after one step of a deep network.
pub(crate) const ROUNDING: f64 = 1e-4;
/// Five free steps amplify float64's 1e-15 to 1e-9.
const ROUNDING_IN_FLOAT64: f64 = 1e-7;

/// What is allowed in float32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    /// Of an element, relative to the largest of its tensor, where no threshold was crossed.
    pub(crate) rounding: f64,
    /// How much of all gradients, in length, crossings may change in a step.
    pub(crate) crossings: f64,
    /// Steps of [`STEPS`] in which no crossing may reach a tensor.
    pub(crate) clean_steps: usize,
}

impl Allowed {
    /// Two programs that call the same libtorch, whose kernels round alike but for a few: on Intel and AMD processors,
    /// held to SSE4, AVX2 and AVX-512, crossings touched at most one step of five. A fault of a term, a weight or
    /// the momentum's decay is there in four or five.
    pub(crate) const SAME_KERNELS: Allowed =
        Allowed { rounding: ROUNDING, crossings: 0.02, clean_steps: 2 };
    /// Pixels that differ in their last bits, so that every kernel rounds otherwise and everything crosses that can:
    /// more than any other processor does. All gradients moved together by 0.005 on an AMD processor and 0.031 on an
    /// Intel one; logits by 6e-5.
    pub(crate) const OTHER_PIXELS: Allowed =
        Allowed { rounding: ROUNDING, crossings: 0.1, clean_steps: 0 };
}

/// What differs in the tensors of a kind.
#[derive(Default)]
pub(crate) struct Differences {
    /// [`error`] of each tensor after each step.
    errors: BTreeMap<String, [f64; STEPS as usize]>,
    /// Squares of `|a - b|` and of `|b|`, of all tensors together, after each step.
    squares: [(f64, f64); STEPS as usize],
}

impl Differences {
    pub(crate) fn worst_of(&self, step: usize) -> f64 {
        self.errors.values().map(|by_step| by_step[step]).fold(0.0, f64::max)
    }
}

/// All differences of a comparison, by kind.
#[derive(Default)]
pub(crate) struct Comparison(pub(crate) BTreeMap<String, Differences>);

impl Comparison {
    pub(crate) fn note(
        &mut self,
        kind: &str,
        name: &str,
        step: u64,
        ours: &Tensor,
        theirs: &Tensor,
    ) {
        let (step, error) = (step as usize, error(ours, theirs));
        assert!(!error.is_nan(), "{kind} {name} is not a number");
        let differences = self.0.entry(kind.to_string()).or_default();
        differences.errors.entry(name.to_string()).or_default()[step] = error;
        let square =
            |t: Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
        let (off, all) = &mut differences.squares[step];
        *off += square(ours.detach().to_kind(Kind::Double) - theirs.to_kind(Kind::Double));
        *all += square(theirs.detach());
    }

    /// What is not as it should be, a line each.
    pub(crate) fn faults(&self, kind_of_numbers: Kind, allowed: Allowed) -> Vec<String> {
        let double = kind_of_numbers == Kind::Double;
        let mut faults = Vec::new();
        for (kind, Differences { errors, squares }) in &self.0 {
            let bound = match kind.as_str() {
                "counters" => 0.0,
                _ if double => ROUNDING_IN_FLOAT64,
                _ => allowed.rounding,
            };
            let crosses = !double && CROSSED.contains(&kind.as_str());
            let needed = if crosses { allowed.clean_steps } else { STEPS as usize };
            for (name, by_step) in errors {
                let clean = by_step.iter().filter(|error| **error <= bound).count();
                if clean < needed {
                    let by_step = by_step.map(|error| format!("{error:.1e}")).join(" ");
                    faults.push(format!("{kind}: {name} is off by {by_step}, step by step"));
                }
            }
            for (step, (off, all)) in squares.iter().enumerate() {
                let share = (off / all.max(f64::MIN_POSITIVE)).sqrt();
                if crosses && share > allowed.crossings {
                    let step = step + 1;
                    faults
                        .push(format!("{kind} together are off by {share:.1e} after step {step}"));
                }
            }
        }
        faults
    }
}
