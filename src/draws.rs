//! Random numbers with an address, equal on every machine and in every order of drawing.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
#[cfg(feature = "train")]
use tch::{Device, Kind, Tensor};

/// A stream of random numbers with an address: the seed of the run, a name, and a position.
#[derive(Clone, Debug)]
pub struct Draws(Xoshiro256PlusPlus);

impl Draws {
    /// The stream at this address.
    pub fn new(seed: u64, name: &str, position: u64) -> Draws {
        // FNV-1a tells names apart; SplitMix64, inside `seed_from_u64`, spreads what is close.
        let name = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut state = seed;
        for word in [name, position] {
            state = Xoshiro256PlusPlus::seed_from_u64(state ^ word).next_u64();
        }
        Draws(Xoshiro256PlusPlus::seed_from_u64(state))
    }

    /// Uniform in 0 to below `end`, which must not be 0 (Lemire's multiply and reject).
    pub fn below(&mut self, end: u64) -> u64 {
        assert!(end > 0, "nothing is below 0");
        let rejected = end.wrapping_neg() % end;
        loop {
            let wide = u128::from(self.0.next_u64()) * u128::from(end);
            if wide as u64 >= rejected {
                return (wide >> 64) as u64;
            }
        }
    }

    /// A uniformly drawn permutation of 0 to below `n` (Fisher-Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<i64> {
        let mut order: Vec<i64> = (0..n as i64).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64 + 1) as usize);
        }
        order
    }
}

#[cfg(feature = "train")]
impl Draws {
    /// Uniform in \[0, 1), 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// A tensor of N(0, `std`²), on the CPU (Box-Muller).
    pub fn normal(&mut self, shape: &[i64], std: f64) -> Tensor {
        filled(shape, || {
            let radius = std * (-2.0 * (1.0 - self.unit()).ln()).sqrt(); // 1 - u is never 0
            let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
            [(radius * cos) as f32, (radius * sin) as f32]
        })
    }

    /// A tensor of U(-`bound`, `bound`), on the CPU.
    pub fn uniform(&mut self, shape: &[i64], bound: f64) -> Tensor {
        filled(shape, || [((2.0 * self.unit() - 1.0) * bound) as f32])
    }
}

#[cfg(feature = "train")]
/// A tensor of float32 on the CPU, filled from its first number to its last. libtorch allocates it: where there
/// is no memory that is an error, and Rust's vectors would end the process.
fn filled<const N: usize>(shape: &[i64], mut draw: impl FnMut() -> [f32; N]) -> Tensor {
    const CHUNK: usize = 1 << 16;
    let tensor = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let flat = tensor.view([-1]);
    let (mut at, n) = (0, tensor.numel());
    let mut values = Vec::with_capacity(CHUNK + N);
    while at < n {
        let length = CHUNK.min(n - at);
        values.clear();
        while values.len() < length {
            values.extend(draw());
        }
        let mut part = flat.narrow(0, at as i64, length as i64);
        part.copy_(&Tensor::from_slice(&values[..length]));
        at += length;
    }
    tensor
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;

    #[test]
    fn an_address_gives_one_stream_and_no_other() {
        let first = |seed, name, position| Draws::new(seed, name, position).0.next_u64();
        assert_eq!(first(1, "a", 0), first(1, "a", 0));
        let streams = [first(1, "a", 0), first(2, "a", 0), first(1, "b", 0), first(1, "a", 1)];
        for (i, a) in streams.iter().enumerate() {
            assert!(streams[i + 1..].iter().all(|b| a != b), "{streams:?}");
        }
    }

    #[test]
    fn normal_and_uniform_have_their_moments() {
        // 10^6 draws: the mean of N(0, 1) lies within 0.005 (five deviations), its variance within 0.01.
        let x = Draws::new(3, "x", 0).normal(&[1000, 1000], 1.0).to_kind(Kind::Double);
        let (var, mean) = x.var_mean(true);
        assert!(mean.double_value(&[]).abs() < 0.005, "{mean:?}");
        assert!((var.double_value(&[]) - 1.0).abs() < 0.01, "{var:?}");
        let within = x.abs().lt(1.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((within - 0.682_689).abs() < 0.003, "{within}");
        let u = Draws::new(3, "u", 0).uniform(&[1000, 1000], 0.5).to_kind(Kind::Double);
        let (var, mean) = u.var_mean(true);
        assert!(mean.double_value(&[]).abs() < 0.002, "{mean:?}");
        assert!((var.double_value(&[]) - 1.0 / 12.0).abs() < 0.001, "{var:?}");
        assert!(u.max().double_value(&[]) <= 0.5 && u.min().double_value(&[]) >= -0.5);
    }

    #[test]
    fn permutations_are_permutations_and_all_come_up() {
        let mut seen = std::collections::HashMap::new();
        for position in 0..6000 {
            let order = Draws::new(5, "shuffle", position).permutation(3);
            *seen.entry(order).or_insert(0) += 1;
        }
        assert_eq!(seen.len(), 6);
        // 1000 expected of each; five standard deviations are 145.
        assert!(seen.values().all(|count| (855..1145).contains(count)), "{seen:?}");
        let mut order = Draws::new(5, "shuffle", 0).permutation(1000);
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<i64>>());
    }
}
