//! Micro-batches: how a rank's samples are cut into parts of whole BN groups, passes over a part, and what batch
//! normalisation saw in them.

use tch::Tensor;

use crate::batch::Batch;
use crate::config::Config;
use crate::dist::Collective;
use crate::method::{Design, Met, Seen, StepError};
use crate::model::{Encoder, Model, Moments};
use crate::shim::ShimError;
use crate::shim::step::Autocast;

/// How a rank's samples are cut into micro-batches of whole BN groups.
#[derive(Debug)]
pub(crate) struct Cut<'a> {
    design: &'a Design,
    /// Samples of this rank.
    pub(crate) samples: i64,
    /// Micro-batches.
    pub(crate) parts: i64,
    /// Samples of a micro-batch.
    rows: i64,
    /// BN groups of a micro-batch.
    groups: i64,
}

impl<'a> Cut<'a> {
    pub(crate) fn new(
        design: &'a Design,
        config: &Config,
        world: &dyn Collective,
        batch: &Batch,
    ) -> Result<Cut<'a>, StepError> {
        let (rank, size) = (world.rank(), world.size());
        let (found, expected) = (batch.len(), config.train.batch / size as i64);
        if found != expected || expected * size as i64 != config.train.batch {
            return Err(StepError::Samples { found, expected, rank, size });
        }
        let (groups, accumulate) = (config.model.bn_splits, config.train.accumulate);
        let shares = size as i64 * accumulate;
        if groups % shares != 0 || config.train.batch % groups != 0 {
            return Err(StepError::Groups { groups, size, accumulate });
        }
        let (rows, groups) = (found / accumulate, groups / shares);
        Ok(Cut { design, samples: found, parts: accumulate, rows, groups })
    }

    /// A part's share of tensors that have a row, or as many rows each, for every sample of this rank.
    pub(crate) fn share(&self, of: &[Tensor], part: i64) -> Vec<Tensor> {
        of.iter().map(|tensor| self.share_of(tensor, part)).collect()
    }

    /// As [`Cut::share`], of one tensor.
    pub(crate) fn share_of(&self, tensor: &Tensor, part: i64) -> Tensor {
        let rows = tensor.size()[0] / self.parts;
        tensor.narrow(0, part * rows, rows)
    }

    /// An encoder's outputs for a part.
    pub(crate) fn embed(
        &self,
        encoder: &Encoder,
        seen: &Seen,
        part: i64,
        statistics: &mut Statistics,
    ) -> Result<Vec<Tensor>, ShimError> {
        // All passes under one autocast: weights that learn are cast once. Those of the key encoder, which
        // autocast does not keep, are cast for each pass: 0.2 ms by their bytes.
        let device = seen.images.first().map(Tensor::device);
        let device = device.filter(|_| encoder.in_bf16());
        let _autocast = device.map(Autocast::enter).transpose()?;
        let rows = |images: &Tensor| images.narrow(0, part * self.rows, self.rows);
        if let (true, Some(pass)) = (self.design.is_joint, self.design.passes.first()) {
            let images: Vec<Tensor> = seen.images.iter().map(rows).collect();
            return encoder.embed_together(&images, &pass.scope, self.groups, &mut statistics.0);
        }
        let passes = self.design.passes.iter().zip(&seen.images).zip(&mut statistics.0);
        let mut outputs = Vec::new();
        for ((pass, images), moments) in passes {
            let rows = rows(images);
            outputs.extend(encoder.embed(&rows, &pass.scope, self.groups, moments)?);
        }
        Ok(outputs)
    }

    /// All parts, one after the other.
    pub(crate) fn embed_all(
        &self,
        encoder: &Encoder,
        seen: &Seen,
        statistics: &mut Statistics,
    ) -> Result<Vec<Tensor>, ShimError> {
        let parts = (0..self.parts).map(|part| self.embed(encoder, seen, part, statistics));
        let parts = parts.collect::<Result<Vec<Vec<Tensor>>, ShimError>>()?;
        let join = |i| Tensor::cat(&parts.iter().map(|part| &part[i]).collect::<Vec<_>>(), 0);
        Ok((0..parts[0].len()).map(join).collect())
    }

    /// Nothing seen yet.
    pub(crate) fn statistics(&self) -> Statistics {
        Statistics(self.design.passes.iter().map(|_| Moments::default()).collect())
    }
}

/// A rank's outputs where rows are coupled: all of them are scored before the first part goes backward. With
/// several parts that takes a pass more, without a graph, of which nothing is kept but the outputs.
#[derive(Debug, Default)]
pub(crate) struct Coupled {
    /// With their graph, where there is one part.
    pub(crate) held: Option<Vec<Tensor>>,
    /// Of the loss by `outputs`, once they are scored.
    pub(crate) gradients: Option<Vec<Tensor>>,
    outputs: Vec<Tensor>,
    all: Vec<Tensor>,
}

impl Coupled {
    /// Makes and gathers them.
    pub(crate) fn look(
        cut: &Cut<'_>,
        student: &Encoder,
        seen: &Seen,
        statistics: &mut Statistics,
        world: &dyn Collective,
    ) -> Result<Coupled, StepError> {
        let (held, outputs) = if cut.parts == 1 {
            let outputs = cut.embed(student, seen, 0, statistics)?;
            let values = outputs.iter().map(Tensor::detach).collect();
            (Some(outputs), values)
        } else {
            // The passes that go backward count.
            (None, tch::no_grad(|| cut.embed_all(student, seen, &mut cut.statistics()))?)
        };
        let gathered = cut.design.outputs().zip(&outputs).filter(|(head, _)| head.is_gathered);
        let all = gathered.map(|(_, output)| world.gather(output));
        let all = all.collect::<Result<Vec<Tensor>, _>>()?;
        Ok(Coupled { held, gradients: None, outputs, all })
    }

    /// For a loss over all of this rank's rows.
    pub(crate) fn met<'a>(
        &'a self,
        seen: &'a Seen,
        world: &dyn Collective,
        rest: Met<'a>,
    ) -> Met<'a> {
        let (outputs, all, labels) = (&self.outputs, &self.all, seen.labels.as_ref());
        Met { outputs, all, labels, share: world.size() as f64, ..rest }
    }

    /// The outputs of all ranks.
    pub(crate) fn into_gathered(self) -> Vec<Tensor> {
        self.all
    }
}

/// What batch normalisation saw in each of an encoder's passes.
#[derive(Debug)]
pub(crate) struct Statistics(Vec<Moments>);

/// Moves the encoders' running statistics towards what their passes saw on all ranks: the mean over all BN
/// groups. Ranks so have the same statistics after every step, whenever a checkpoint is written.
pub(crate) fn settle(
    world: &dyn Collective,
    model: &mut Model,
    statistics: &[Statistics],
    applied: &Tensor,
) -> Result<(), StepError> {
    let encoders = model.encoders().zip(statistics).enumerate();
    let passes = encoders.flat_map(|(i, (encoder, seen))| {
        seen.0.iter().filter_map(move |pass| Some(((i, pass), encoder.seen(pass)?)))
    });
    let (whose, mut means): (Vec<(usize, &Moments)>, Vec<Tensor>) = passes.unzip();
    world.average(&mut means)?; // one collective
    let mut encoders: Vec<&mut Encoder> = model.encoders_mut().collect();
    for ((i, pass), mean) in whose.into_iter().zip(means) {
        encoders[i].settle_if(pass, &mean, applied)?;
    }
    Ok(())
}
