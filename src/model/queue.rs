//! Rings of negative keys, one for each level and scope (DetCo, section 3.2; MoCo, section 3.1).

use tch::{Device, Kind, Tensor};

use super::weights::Draws;
use super::{ModelError, Scope};
use crate::config::Config;
use crate::shim::ShimError;
use crate::shim::step as shim;

/// The pointer's name in a state.
pub(super) const POINTER: &str = "queue.pointer";

/// One ring of k keys `[d, k]` for each level and scope; they move together, so one pointer serves.
#[derive(Debug)]
pub struct Queues {
    levels: Vec<u8>,
    global: Vec<Tensor>,
    local: Vec<Tensor>,
    pointer: i64,
}

impl Queues {
    /// Random directions, until real keys have replaced them.
    pub(super) fn draw(config: &Config, device: Device) -> Queues {
        let shape = [config.model.dim, config.loss.queue];
        let ring = |scope: Scope, level: &u8| {
            let keys = Draws::new(config.seed, &name(scope, *level), 0).normal(&shape, 1.0);
            let lengths = keys.norm_scalaropt_dim(2, [0], true).clamp_min(1e-12);
            (keys / lengths).to_device(device)
        };
        let levels = config.model.levels.clone();
        let global = levels.iter().map(|level| ring(Scope::Global, level)).collect();
        let with_local = levels.iter().filter(|_| config.model.local);
        let local = with_local.map(|level| ring(Scope::Local, level)).collect();
        Queues { levels, global, local, pointer: 0 }
    }

    /// The keys of a scope, one ring `[d, k]` a level: the state before the next enqueue.
    pub fn rings(&self, scope: Scope) -> &[Tensor] {
        match scope {
            Scope::Global => &self.global,
            Scope::Local => &self.local,
        }
    }

    /// Keys in a ring, k.
    pub fn length(&self) -> i64 {
        self.global[0].size()[1]
    }

    /// Where the next keys go.
    pub fn pointer(&self) -> i64 {
        self.pointer
    }

    pub(super) fn set_pointer(&mut self, pointer: i64) -> Result<(), ModelError> {
        let length = self.length();
        if !(0..length).contains(&pointer) {
            return Err(ModelError::Pointer { found: pointer, length });
        }
        self.pointer = pointer;
        Ok(())
    }

    /// Replaces the oldest n keys of every ring by new ones, `[n, d]` for each level. Changes the
    /// rings in place: a graph that still needs them must have run backward.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    ///
    /// # Panics
    /// When n does not divide k; [`Config::validate`] sees to it that it does.
    pub fn enqueue(&mut self, global: &[Tensor], local: &[Tensor]) -> Result<(), ShimError> {
        self.replace(global, local, None)
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
    pub fn enqueue_if(
        &mut self,
        global: &[Tensor],
        local: &[Tensor],
        applied: &Tensor,
    ) -> Result<(), ShimError> {
        self.replace(global, local, Some(applied))
    }

    /// Moves the pointer back over `n` keys that turned out not to have been enqueued.
    pub fn take_back(&mut self, n: i64) {
        self.pointer = (self.pointer - n).rem_euclid(self.length());
    }

    fn replace(
        &mut self,
        global: &[Tensor],
        local: &[Tensor],
        applied: Option<&Tensor>,
    ) -> Result<(), ShimError> {
        let (n, k) = (global[0].size()[0], self.length());
        assert!(n > 0 && k % n == 0, "{n} new keys do not divide a queue of {k}");
        tch::no_grad(|| {
            let rings = self.global.iter().chain(&self.local);
            let places: Vec<Tensor> = rings.map(|ring| ring.narrow(1, self.pointer, n)).collect();
            let keys: Vec<Tensor> = global.iter().chain(local).map(Tensor::tr).collect();
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

    pub(super) fn convert(&mut self, kind: Kind) {
        for ring in self.global.iter_mut().chain(&mut self.local) {
            *ring = ring.to_kind(kind);
        }
    }

    pub(super) fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |scope: Scope| {
            self.rings(scope)
                .iter()
                .zip(&self.levels)
                .map(move |(ring, level)| (name(scope, *level), ring.shallow_clone()))
        };
        let pointer = (POINTER.to_string(), Tensor::from(self.pointer));
        named(Scope::Global).chain(named(Scope::Local)).chain([pointer]).collect()
    }
}

fn name(scope: Scope, level: u8) -> String {
    format!("queue.{scope}.{level}")
}
