//! A permutation of `0..n` that needs no array: a Feistel network over the next even power of two,
//! walked until it lands inside (M. Luby, C. Rackoff 1988; cycle walking: J. Black, P. Rogaway 2002).

/// Rounds: four make a Feistel network pseudo-random, two more cost nothing here.
const ROUNDS: u64 = 6;

/// A permutation of `0..n`, drawn from a seed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shuffle {
    n: u64,
    half: u32,
    seed: u64,
}

impl Shuffle {
    pub(crate) fn new(n: u64, seed: u64) -> Shuffle {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Shuffle { n, half: bits.div_ceil(2).max(1), seed }
    }

    /// Where position `i < n` is sent.
    pub(crate) fn at(self, i: u64) -> u64 {
        assert!(i < self.n, "position {i} of {}", self.n);
        let mut at = self.once(i);
        // Terminates: the network is a permutation and `i` lies inside, so its cycle returns.
        while at >= self.n {
            at = self.once(at);
        }
        at
    }

    fn once(self, i: u64) -> u64 {
        let mask = (1u64 << self.half) - 1;
        let (mut left, mut right) = (i >> self.half, i & mask);
        for round in 0..ROUNDS {
            let key = mix(self.seed ^ mix(round));
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half | right
    }
}

/// SplitMix64's finalizer (G. Steele, D. Lea, C. Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_hit_once() {
        for n in (1..70).chain([255, 256, 257, 1000, 4095, 4097, 50_000]) {
            for seed in 0..3 {
                let shuffle = Shuffle::new(n, seed);
                let mut seen = vec![false; n as usize];
                for i in 0..n {
                    let at = shuffle.at(i) as usize;
                    assert!(!std::mem::replace(&mut seen[at], true), "{n}: {at} twice");
                }
            }
        }
    }

    #[test]
    fn neighbours_are_spread() {
        // Chance of staying a neighbour is 2/n; 100 times that would be a weak network.
        let shuffle = Shuffle::new(100_000, 7);
        let near = (1..100_000).filter(|i| shuffle.at(*i).abs_diff(shuffle.at(i - 1)) == 1).count();
        assert!(near < 200, "{near}");
    }
}
