//! The shuffle of the teacher's images (MoCo, section 3.3): keys are normalised in other company than their
//! queries, so that batch statistics do not tell which belong together.

use tch::{Device, Tensor};

use crate::device::is_channels_last;
use crate::dist::{Collective, DistError};
use crate::draws::Draws;
use crate::method::error::StepError;
use crate::shim::ShimError;
use crate::shim::step as shim;

/// One permutation of the global batch: a sample's crop and its nine patches move together, to a
/// place in another BN group, perhaps on another rank. An image is sent to one rank alone.
#[derive(Debug)]
pub(crate) struct Shuffle {
    /// This rank's rows, ordered by the rank they go to and by their place there.
    leaving: Vec<i64>,
    /// How many go to each rank.
    send: Vec<i64>,
    /// How many come from each rank.
    receive: Vec<i64>,
    /// For each place of this rank, its row among those that have come.
    arrange: Vec<i64>,
    /// Where each sample of the global batch went.
    back: Tensor,
}

impl Shuffle {
    /// From seed and step alone, so that all ranks draw the same without a word.
    pub(crate) fn draw(
        seed: u64,
        step: u64,
        samples: i64,
        world: &dyn Collective,
        device: Device,
    ) -> Result<Shuffle, ShimError> {
        let order = permutation(seed, step, samples as usize * world.size());
        let mut back = vec![0_i64; order.len()];
        for (place, &sample) in order.iter().enumerate() {
            back[sample as usize] = place as i64;
        }
        let (mine, ranks) = (world.rank() as i64, 0..world.size() as i64);
        let count = |rows: &mut dyn Iterator<Item = bool>| rows.filter(|row| *row).count() as i64;
        // The samples whose key this rank makes, and the rank that each comes from.
        let here = &order[(mine * samples) as usize..((mine + 1) * samples) as usize];
        let receive: Vec<i64> = ranks
            .clone()
            .map(|rank| count(&mut here.iter().map(|sample| sample / samples == rank)))
            .collect();
        let places: Vec<i64> = (0..order.len() as i64)
            .filter(|place| order[*place as usize] / samples == mine)
            .collect();
        let send = ranks.map(|rank| count(&mut places.iter().map(|p| p / samples == rank)));
        let send = send.collect();
        let leaving = places.iter().map(|p| order[*p as usize] - mine * samples).collect();
        // They come rank by rank, those of one rank in the order of their places.
        let mut come = vec![0; receive.len()];
        let arrange = here
            .iter()
            .map(|sample| {
                let from = (sample / samples) as usize;
                come[from] += 1;
                receive[..from].iter().sum::<i64>() + come[from] - 1
            })
            .collect();
        let back = shim::upload(&Tensor::from_slice(&back), device)?;
        Ok(Shuffle { leaving, send, receive, arrange, back })
    }

    pub(crate) fn send(
        &self,
        world: &dyn Collective,
        images: &Tensor,
    ) -> Result<Tensor, StepError> {
        // Rows are picked as they lie in memory: what is picked otherwise comes out channels first.
        if is_channels_last(images) {
            let come = self.exchange(world, &images.movedim([-3], [-1]))?;
            return Ok(come.movedim([-1], [-3]));
        }
        self.exchange(world, images)
    }

    fn exchange(&self, world: &dyn Collective, rows: &Tensor) -> Result<Tensor, StepError> {
        let come = world.exchange(&pick(rows, &self.leaving)?, &self.send, &self.receive)?;
        // In a world of one they are in their places.
        if self.arrange.is_sorted() { Ok(come) } else { Ok(pick(&come, &self.arrange)?) }
    }

    /// Outputs `[n, d]` of all samples of all ranks, in the order of the batch; one collective for all of them.
    pub(crate) fn bring_back(
        &self,
        world: &dyn Collective,
        outputs: &[Tensor],
    ) -> Result<Vec<Tensor>, DistError> {
        let widths: Vec<i64> = outputs.iter().map(|output| output.size()[1]).collect();
        let all = world.gather(&Tensor::cat(outputs, 1))?;
        let all = all.index_select(0, &self.back);
        Ok(all.split_with_sizes(widths, 1))
    }

    /// Outputs of this rank's samples, in its order, from the ranks that made them; one collective for all of them.
    /// Samples may have several rows each.
    pub(crate) fn send_home(
        &self,
        world: &dyn Collective,
        outputs: &[Tensor],
    ) -> Result<Vec<Tensor>, StepError> {
        let samples = self.arrange.len() as i64;
        let by_sample: Vec<Tensor> =
            outputs.iter().map(|output| output.reshape([samples, -1])).collect();
        let widths: Vec<i64> = by_sample.iter().map(|output| output.size()[1]).collect();
        let made = Tensor::cat(&by_sample, 1);
        // By the rank that each came from, in the order in which it came: the way there, backwards.
        let made = pick(&made, &inverse(&self.arrange))?;
        let home = world.exchange(&made, &self.receive, &self.send)?;
        let home = pick(&home, &inverse(&self.leaving))?.split_with_sizes(widths, 1);
        let shaped = home.iter().zip(outputs).map(|(home, made)| home.reshape(made.size()));
        Ok(shaped.collect())
    }
}

/// Rows by their places.
fn pick(rows: &Tensor, places: &[i64]) -> Result<Tensor, ShimError> {
    Ok(rows.index_select(0, &shim::upload(&Tensor::from_slice(places), rows.device())?))
}

/// Where each of a permutation's places is.
fn inverse(order: &[i64]) -> Vec<i64> {
    let mut inverse = vec![0; order.len()];
    for (place, of) in (0..).zip(order) {
        inverse[*of as usize] = place;
    }
    inverse
}

/// The order in which the key encoder sees the samples of a global batch at a step: place to
/// sample.
pub fn permutation(seed: u64, step: u64, samples: usize) -> Vec<i64> {
    Draws::new(seed, "shuffle", step).permutation(samples)
}
