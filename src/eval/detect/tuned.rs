//! A backbone that is trained with the detector.

use tch::{Device, Tensor};

use super::DetectError;
use super::features::{Standard, grid, on_grid};
use super::fit::Body;
use super::sources::Scenes;
use crate::batch;
use crate::config::Config;
use crate::model::{Model, Moments};

/// A copy of a backbone that learns: its batch normalisation uses the batch's statistics, as in pre-training. Maps are
/// standardised by what the backbone was before, so that a detector begins as on a frozen one.
#[derive(Debug)]
pub struct Tuned<'a> {
    model: Model,
    device: Device,
    scenes: &'a Scenes,
    standard: &'a Standard,
    levels: &'a [u8],
    moments: Moments,
}

impl<'a> Tuned<'a> {
    /// A copy of these tensors, of a backbone of this configuration.
    ///
    /// # Errors
    /// When the tensors are not of this configuration, or libtorch cannot use the device.
    pub fn copy(
        (config, backbone): (&Config, &[(String, Tensor)]),
        device: Device,
        scenes: &'a Scenes,
        standard: &'a Standard,
        levels: &'a [u8],
    ) -> Result<Tuned<'a>, DetectError> {
        let mut model = Model::bare(config, device)?;
        model.start_from(backbone)?;
        let moments = Moments::default();
        Ok(Tuned { model, device, scenes, standard, levels, moments })
    }

    /// The detector's levels of all maps, standardised.
    fn wanted(&self, maps: &[Tensor]) -> Result<Vec<Tensor>, DetectError> {
        let maps = on_grid(maps, grid(self.scenes))?;
        let of = |level: &u8| self.standard.apply(*level, &maps[usize::from(*level) - 2]);
        Ok(self.levels.iter().map(of).collect())
    }

    /// Maps of scenes from a number on, with running statistics and without gradients.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn after(
        &self,
        scenes: &Scenes,
        first: usize,
        count: usize,
    ) -> Result<Vec<Tensor>, DetectError> {
        let edge = scenes.size as usize;
        let images = batch::images(scenes.bytes(first, count), count, edge, self.device)?;
        self.wanted(&self.model.query.maps(&images)?)
    }
}

impl Body for Tuned<'_> {
    fn maps(&mut self, rows: &[i64]) -> Result<Vec<Tensor>, DetectError> {
        let bytes: Vec<&[u8]> =
            rows.iter().map(|row| self.scenes.bytes(*row as usize, 1)).collect();
        let edge = self.scenes.size as usize;
        let images = batch::images(&bytes.concat(), rows.len(), edge, self.device)?;
        self.moments = Moments::default();
        let maps = self.model.query.maps_of_batch(&images, &mut self.moments)?;
        self.wanted(&maps)
    }

    fn trained(&self) -> Vec<Tensor> {
        self.model.query.parameters().into_iter().map(|(_, tensor)| tensor).collect()
    }

    fn settle(&mut self) -> Result<(), DetectError> {
        Ok(self.model.query.settle(&self.moments)?)
    }
}
