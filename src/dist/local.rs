//! A world of one rank, whose collectives copy nothing.

use tch::Tensor;

use super::{Collective, DistError, Move};

/// The world of a single process, whose caller handles signals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Local;

impl Collective for Local {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn gather(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        Ok(mine.shallow_clone())
    }

    fn exchange(
        &self,
        mine: &Tensor,
        _send: &[i64],
        _receive: &[i64],
    ) -> Result<Tensor, DistError> {
        Ok(mine.shallow_clone())
    }

    fn average(&self, _tensors: &mut [Tensor]) -> Result<(), DistError> {
        Ok(())
    }

    fn backward(&self, loss: &Tensor, _parameters: &[Tensor]) -> Result<(), DistError> {
        loss.f_backward().map_err(|source| DistError::Backward { source })
    }

    fn broadcast(&self, _tensors: &mut [Tensor]) -> Result<(), DistError> {
        Ok(())
    }

    fn after_first(&self) -> Result<(), DistError> {
        Ok(())
    }

    fn at(&self, _step: u64, _what: Move) {}

    fn is_asked_to_stop(&self) -> bool {
        false
    }

    fn bytes_sent(&self) -> u64 {
        0
    }
}
