//! What each cell of the grid is to say.

use tch::Tensor;

use super::head::STRIDE;

/// Cells whose centre lies closer to a box's centre than so many strides, along both axes, may be the box's (FCOS's centre
/// sampling).
pub const RADIUS: f32 = 1.5;

/// Targets of scenes.
#[derive(Debug)]
pub struct Targets {
    /// The class of each cell, -1 for none, `[n, grid, grid]` in int64.
    pub classes: Tensor,
    /// Distances from a cell's centre to the four sides in pixels, `[n, 4, grid, grid]`; 1 in cells of no class.
    pub distances: Tensor,
}

/// Assigns cells to boxes. A cell is a box's where its centre lies within the box, and closer than [`RADIUS`] strides
/// to the box's centre along both axes; of several boxes the smallest one has it, of equal ones the first.
pub fn assign(scenes: &[Vec<([f32; 4], usize)>], grid: i64) -> Targets {
    let edge = grid as usize;
    let cells = edge * edge;
    let mut classes = vec![-1_i64; scenes.len() * cells];
    let mut distances = vec![1.0_f32; scenes.len() * 4 * cells];
    let mut areas = vec![f32::INFINITY; cells];
    let stride = STRIDE as f32;
    for (scene, objects) in scenes.iter().enumerate() {
        areas.fill(f32::INFINITY);
        for (corners, class) in objects {
            let [left, top, right, bottom] = *corners;
            let area = (right - left) * (bottom - top);
            let [middle_x, middle_y] = [(left + right) / 2.0, (top + bottom) / 2.0];
            for cell in 0..cells {
                let [x, y] = [cell % edge, cell / edge].map(|at| (at as f32 + 0.5) * stride);
                let is_inside = x > left && x < right && y > top && y < bottom;
                let is_central = (x - middle_x).abs() < RADIUS * stride
                    && (y - middle_y).abs() < RADIUS * stride;
                if !(is_inside && is_central && area < areas[cell]) {
                    continue;
                }
                areas[cell] = area;
                classes[scene * cells + cell] = *class as i64;
                let sides = [x - left, y - top, right - x, bottom - y];
                for (side, distance) in sides.into_iter().enumerate() {
                    distances[(scene * 4 + side) * cells + cell] = distance;
                }
            }
        }
    }
    let n = scenes.len() as i64;
    Targets {
        classes: Tensor::from_slice(&classes).view([n, grid, grid]),
        distances: Tensor::from_slice(&distances).view([n, 4, grid, grid]),
    }
}
