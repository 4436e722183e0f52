//! The detector's own layers.

use tch::{Device, Kind, Tensor};

use crate::draws::Draws;

/// Pixels of a scene for a cell of the grid.
pub const STRIDE: i64 = 8;
/// Groups that channels are normalised in.
const GROUPS: i64 = 8;
/// torch's.
const EPS: f64 = 1e-5;
/// Score of every class in every cell before training: the focal loss then begins small (Lin et al., section 4.1).
const PRIOR: f64 = 0.01;
/// Distance of every side in every cell before training, in pixels.
const DISTANCE: f64 = 20.0;
/// Largest logarithm of a distance: 403 pixels.
const LOG_MAX: f64 = 6.0;

/// Layers from maps to scores and distances. Each level goes through a 1x1 convolution and onto one grid of stride 8,
/// where all are added up: group norm, ReLU, a 3x3 convolution, ReLU, then a logit a class and the logarithms of four
/// distances in each cell.
#[derive(Debug)]
pub struct Head {
    levels: Vec<u8>,
    parameters: Vec<(String, Tensor)>,
    grid: i64,
}

/// What a head is made of.
#[derive(Clone, Debug)]
pub struct Shape<'a> {
    /// Levels that it reads, 2 to 5, and their channels.
    pub levels: &'a [(u8, i64)],
    /// Its own channels: a multiple of 8.
    pub width: i64,
    /// Number of classes.
    pub classes: i64,
    /// Edge of the grid in cells.
    pub grid: i64,
}

impl Head {
    /// Draws the weights of a probe seed: He's normal distribution for the layers before a ReLU. Each is drawn from the
    /// seed and its own name, so that all backbones meet the same head.
    pub fn new(shape: &Shape<'_>, seed: u64, device: Device) -> Head {
        let width = shape.width;
        let mut parameters: Vec<(String, Tensor)> = Vec::new();
        let mut put = |name: &str, tensor: Tensor| {
            parameters.push((name.to_owned(), tensor.to_device(device).set_requires_grad(true)));
        };
        let normal = |name: &str, shape: &[i64], std: f64| {
            Draws::new(seed, &format!("detect.{name}"), 0).normal(shape, std)
        };
        let flat =
            |length: i64, value: f64| Tensor::full([length], value, (Kind::Float, Device::Cpu));
        let he = |fan_in: i64| (2.0 / fan_in as f64).sqrt();
        for (level, channels) in shape.levels {
            let name = format!("res{level}.weight");
            put(&name, normal(&name, &[width, *channels, 1, 1], he(*channels)));
            put(&format!("res{level}.bias"), flat(width, 0.0));
        }
        put("norm.weight", flat(width, 1.0));
        put("norm.bias", flat(width, 0.0));
        put("conv.weight", normal("conv.weight", &[width, width, 3, 3], he(9 * width)));
        put("conv.bias", flat(width, 0.0));
        for (name, outputs, bias) in [
            ("classes", shape.classes, (PRIOR / (1.0 - PRIOR)).ln()),
            ("distances", 4, DISTANCE.ln()),
        ] {
            let weight = format!("{name}.weight");
            put(&weight, normal(&weight, &[outputs, width, 1, 1], 0.01));
            put(&format!("{name}.bias"), flat(outputs, bias));
        }
        let levels = shape.levels.iter().map(|(level, _)| *level).collect();
        Head { levels, parameters, grid: shape.grid }
    }

    /// Levels that it reads.
    pub fn levels(&self) -> &[u8] {
        &self.levels
    }

    /// Edge of the grid in cells.
    pub fn grid(&self) -> i64 {
        self.grid
    }

    /// Its tensors by name, sharing memory and gradient with the head.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    fn get(&self, name: &str) -> &Tensor {
        let found = self.parameters.iter().find(|(own, _)| own == name);
        // All names here are put by `new`.
        &found.unwrap_or_else(|| panic!("a head has no {name}")).1
    }

    fn conv(&self, x: &Tensor, name: &str, padding: i64) -> Tensor {
        let (weight, bias) =
            (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")));
        x.conv2d(weight, Some(bias), [1, 1], [padding; 2], [1, 1], 1)
    }

    /// Maps `[n, c, h, h]` of its levels, none larger than the grid, to logits `[n, classes, grid, grid]` and distances
    /// from each cell's centre to the left, upper, right and lower side in pixels, `[n, 4, grid, grid]`.
    pub fn forward(&self, maps: &[Tensor]) -> (Tensor, Tensor) {
        let mut sum: Option<Tensor> = None;
        for (level, map) in self.levels.iter().zip(maps) {
            let z = self.conv(map, &format!("res{level}"), 0);
            let z = enlarged(&z, self.grid);
            sum = Some(match sum {
                Some(sum) => sum + z,
                None => z,
            });
        }
        // A head has at least one level.
        let x = sum.unwrap_or_else(|| panic!("a head without levels"));
        let (scale, shift) = (self.get("norm.weight"), self.get("norm.bias"));
        let x = x.group_norm(GROUPS, Some(scale), Some(shift), EPS, true).relu();
        let x = self.conv(&x, "conv", 1).relu();
        let logits = self.conv(&x, "classes", 0);
        let distances = self.conv(&x, "distances", 0).clamp_max(LOG_MAX).exp();
        (logits, distances)
    }
}

/// A map onto the grid: averaged where it is finer. `None` if the edges do not divide.
pub fn reduced(map: &Tensor, grid: i64) -> Option<Tensor> {
    let edge = map.size()[3];
    match edge {
        _ if edge <= grid => Some(map.shallow_clone()),
        _ if edge % grid == 0 => {
            let kernel = [edge / grid; 2];
            Some(map.avg_pool2d(kernel, kernel, [0, 0], false, true, None::<i64>))
        }
        _ => None,
    }
}

/// A square map enlarged to the grid, bilinearly as torch's `interpolate` without aligned corners: two products of
/// matrices, whose gradient is faster than that of `interpolate`.
pub fn enlarged(map: &Tensor, grid: i64) -> Tensor {
    let edge = map.size()[3];
    if edge == grid {
        return map.shallow_clone();
    }
    let matrix = weights(edge as usize, grid as usize).to_device(map.device()).to_kind(map.kind());
    matrix.matmul(map).matmul(&matrix.tr())
}

/// Weights `[to, from]` of linear interpolation.
fn weights(from: usize, to: usize) -> Tensor {
    let mut rows = vec![0.0_f32; from * to];
    for (row, weights) in rows.chunks_exact_mut(from).enumerate() {
        let at = ((row as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
        let first = (at as usize).min(from - 1);
        let share = (at - first as f64) as f32;
        weights[first] += 1.0 - share;
        weights[(first + 1).min(from - 1)] += share;
    }
    Tensor::from_slice(&rows).view([to as i64, from as i64])
}
