//! Queues of negative keys, one for each head (MoCo, section 3.1; DetCo, section 3.2).

use tch::{Kind, Tensor};

use crate::shim::ShimError;
use crate::shim::step as shim;

/// The pointer's name in a state.
pub(crate) const POINTER: &str = "queue.pointer";

/// A queue of k keys `[d, k]` for each head, used as a ring; they move together, so one pointer serves.
#[derive(Debug, Default)]
pub struct Queues {
    names: Vec<String>,
    queues: Vec<Tensor>,
    pointer: i64,
}

impl Queues {
    /// Of the heads with these names, with these keys `[d, k]`.
    pub(crate) fn new(queues: Vec<(String, Tensor)>) -> Queues {
        let (names, queues) = queues.into_iter().unzip();
        Queues { names, queues, pointer: 0 }
    }

    /// The keys of all heads, a queue `[d, k]` each: the state before the next enqueue.
    pub fn all(&self) -> &[Tensor] {
        &self.queues
    }

    /// The queues of a scope's heads.
    pub fn of(&self, scope: &str) -> &[Tensor] {
        let is_of = |name: &String| name.split('.').next() == Some(scope);
        let start = self.names.iter().position(is_of).unwrap_or(0);
        let count = self.names[start..].iter().take_while(|name| is_of(name)).count();
        &self.queues[start..start + count]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Keys in a queue, k.
    pub fn length(&self) -> i64 {
        self.queues.first().map_or(0, |queue| queue.size()[1])
    }

    /// Where the next keys go.
    pub fn pointer(&self) -> i64 {
        self.pointer
    }

    /// Sets where the next keys go: 0 to below the length.
    pub(crate) fn set_pointer(&mut self, pointer: i64) {
        self.pointer = pointer;
    }

    /// Replaces the oldest n keys of every queue by new ones, `[n, d]` for each head. Changes the
    /// queues in place: a graph that still needs them must have run backward.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    ///
    /// # Panics
    /// When n does not divide k; the check of a method with queues sees to it that it does.
    pub fn enqueue(&mut self, keys: &[Tensor]) -> Result<(), ShimError> {
        self.replace(keys, None)
    }

    /// As [`Queues::enqueue`], but where `applied`, a truth value on the device, is false, the keys
    /// stay as they are. The pointer moves in any case, since the host does not know: see
    /// [`Queues::take_back`].
    ///
    /// # Errors
    /// When libtorch fails.
    ///
    /// # Panics
    /// As [`Queues::enqueue`].
    pub fn enqueue_if(&mut self, keys: &[Tensor], applied: &Tensor) -> Result<(), ShimError> {
        self.replace(keys, Some(applied))
    }

    /// Moves the pointer back over `n` keys that turned out not to have been enqueued.
    pub fn take_back(&mut self, n: i64) {
        if !self.is_empty() {
            self.pointer = (self.pointer - n).rem_euclid(self.length());
        }
    }

    fn replace(&mut self, keys: &[Tensor], applied: Option<&Tensor>) -> Result<(), ShimError> {
        let Some(first) = keys.first() else { return Ok(()) };
        let (n, k) = (first.size()[0], self.length());
        assert!(n > 0 && k % n == 0, "{n} new keys do not divide a queue of {k}");
        tch::no_grad(|| {
            let places: Vec<Tensor> =
                self.queues.iter().map(|queue| queue.narrow(1, self.pointer, n)).collect();
            let keys: Vec<Tensor> = keys.iter().map(Tensor::tr).collect();
            let keys = match applied {
                None => keys,
                // Not a product: what is not finite times 0 is not finite.
                Some(applied) => {
                    let old = Tensor::stack(&places, 0);
                    Tensor::stack(&keys, 0).where_self(applied, &old).unbind(0)
                }
            };
            shim::copy(&places, &keys)
        })?;
        self.pointer = (self.pointer + n) % k;
        Ok(())
    }

    pub(crate) fn convert(&mut self, kind: Kind) {
        for queue in &mut self.queues {
            *queue = queue.to_kind(kind);
        }
    }

    /// Queues as `queue.<head>`, and `queue.pointer`; nothing where there are none.
    pub(crate) fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = self.names.iter().zip(&self.queues);
        let queues = named.map(|(name, queue)| (format!("queue.{name}"), queue.shallow_clone()));
        let pointer = (!self.is_empty()).then(|| (POINTER.to_string(), Tensor::from(self.pointer)));
        queues.chain(pointer).collect()
    }
}
