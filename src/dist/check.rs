//! Checks that tensors are bit-identical on all ranks, by checksums.

use tch::{Device, Kind, Tensor};

use super::{Collective, DistError};

/// Elements that are summed at once: bounds the memory for their integers.
const CHUNK: i64 = 1 << 20;
/// An odd number whose multiples are spread over 64 bits (the golden ratio's, as splitmix uses).
const SPREAD: i64 = 0x9E37_79B9_7F4A_7C15_u64 as i64;

/// Compares tensors that must be equal on all ranks: one small collective.
///
/// # Errors
/// When they are not, with the ranks that differ from rank 0; or as the collective.
pub fn compare(
    world: &dyn Collective,
    step: u64,
    groups: &[(&'static str, Vec<Tensor>)],
) -> Result<(), DistError> {
    let sums: Vec<Tensor> = groups.iter().map(|(_, tensors)| checksum(tensors)).collect();
    let mine = Tensor::stack(&sums, 0).reshape([1, groups.len() as i64]);
    let all = world.gather(&mine)?.to_device(Device::Cpu); // [ranks, groups]
    for (column, (what, _)) in groups.iter().enumerate() {
        let of = |rank: usize| all.int64_value(&[rank as i64, column as i64]) as u64;
        let ranks: Vec<usize> = (1..world.size()).filter(|rank| of(*rank) != of(0)).collect();
        if let Some(&first) = ranks.first() {
            let (found, expected) = (of(first), of(0));
            return Err(DistError::Diverged { step, what, ranks, found, expected });
        }
    }
    Ok(())
}

/// A number of all the tensors' bits and their places, computed where the tensors are: integer sums
/// modulo 2^64, so the order of the additions does not matter.
fn checksum(tensors: &[Tensor]) -> Tensor {
    let device = tensors.first().map_or(Device::Cpu, Tensor::device);
    let mut sum = Tensor::zeros([], (Kind::Int64, device));
    for tensor in tensors {
        let flat = tensor.detach().contiguous().reshape([-1]);
        let bits = match flat.kind().elt_size_in_bytes() {
            8 => flat.view_dtype(Kind::Int64),
            4 => flat.view_dtype(Kind::Int),
            2 => flat.view_dtype(Kind::Int16),
            _ => flat.view_dtype(Kind::Int8),
        };
        for start in (0..bits.size()[0]).step_by(CHUNK as usize) {
            let part = bits.narrow(0, start, CHUNK.min(bits.size()[0] - start));
            let places = Tensor::arange_start(start, start + part.size()[0], (Kind::Int64, device));
            let weights = places.g_mul_scalar(2).g_add_scalar(1).g_mul_scalar(SPREAD);
            let weighed = (part.to_kind(Kind::Int64) + 1) * weights;
            sum = sum.g_mul_scalar(31) + weighed.sum(Kind::Int64);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f32]) -> i64 {
        checksum(&[Tensor::from_slice(values)]).int64_value(&[])
    }

    #[test]
    fn the_checksum_sees_one_bit_and_one_swap() {
        let values = [0.0, 1.5, -2.25, 1e-30];
        assert_eq!(of(&values), of(&values));
        for i in 0..values.len() {
            let mut other = values;
            other[i] = f32::from_bits(other[i].to_bits() ^ 1);
            assert_ne!(of(&values), of(&other), "{i}");
        }
        assert_ne!(of(&[1.0, 2.0]), of(&[2.0, 1.0]));
        assert_ne!(of(&[0.0]), of(&[-0.0]));
        let (a, b) = (Tensor::from_slice(&[1.0_f32]), Tensor::from_slice(&[2.0_f32]));
        let sum = |pair: [&Tensor; 2]| checksum(&pair.map(Tensor::shallow_clone)).int64_value(&[]);
        assert_ne!(sum([&a, &b]), sum([&b, &a]));
    }
}
