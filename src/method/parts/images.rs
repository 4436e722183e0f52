//! Several images of a sample, side by side, as the encoders want them in memory.

use tch::Tensor;

use crate::device::is_channels_last;

/// Images `[n, 3, h, w]`, each the next of every sample, to `[n, images, 3, h, w]`; channels stay innermost where they
/// are.
pub fn side_by_side(images: &[Tensor]) -> Tensor {
    match images.first() {
        Some(first) if is_channels_last(first) => {
            let pixels = images.iter().map(|image| image.permute([0, 2, 3, 1]));
            let all = Tensor::stack(&pixels.collect::<Vec<_>>(), 1); // [n, images, h, w, 3]
            all.permute([0, 1, 4, 2, 3])
        }
        _ => Tensor::stack(images, 1),
    }
}

/// Square images `[n, 3, h, h]`, turned by so many quarters against the clock.
pub fn turned(images: &Tensor, quarters: i64) -> Tensor {
    match quarters {
        0 => images.shallow_clone(), // libtorch would lay them channels first
        _ => images.rot90(quarters, [2, 3]),
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_quarter_turn_is_against_the_clock() {
        let image = Tensor::arange(4, (Kind::Float, Device::Cpu)).view([1, 1, 2, 2]);
        let found = turned(&image, 1).flatten(0, -1);
        // The right column, from its top down, becomes the top row.
        assert!(found.equal(&Tensor::from_slice(&[1.0_f32, 3.0, 0.0, 2.0])), "{found:?}");
        assert!(turned(&turned(&image, 3), 1).equal(&image));
    }

    #[test]
    fn channels_stay_where_they_are() {
        let pixels = Tensor::arange(2 * 4 * 4 * 3, (Kind::Float, Device::Cpu)).view([2, 4, 4, 3]);
        let last = pixels.permute([0, 3, 1, 2]);
        let first = last.contiguous();
        let of = |image: &Tensor| side_by_side(&[0, 1, 2].map(|k| turned(image, k)));
        let (a, b) = (of(&first), of(&last));
        assert_eq!(a.size(), [2, 3, 3, 4, 4]);
        assert!(a.equal(&b) && is_channels_last(&b) && !is_channels_last(&a));
        assert!(b.get(1).get(2).equal(&turned(&last, 2).get(1)));
    }
}
