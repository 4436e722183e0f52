//! The permutation of an order: a Feistel network over a power of four, cut to any number of elements.

/// Eight rounds of a strong mixing function: four suffice for a pseudo-random permutation (Luby and
/// Rackoff, 1988); the rest is margin and costs nanoseconds.
const ROUNDS: usize = 8;

/// Least size of the permutation, 256 elements, so that even three samples are shuffled well.
const HALF_BITS_MIN: u32 = 4;

/// Where `position` of `0..n` goes under the permutation that `key` selects: a bijection of `0..n`.
///
/// # Panics
/// When `position` is not below `n`.
pub fn permute(position: u64, n: u64, key: u64) -> u64 {
    assert!(position < n, "position {position} of {n}");
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2).max(HALF_BITS_MIN);
    let mask = (1u64 << half) - 1;
    let mut at = position;
    // The network permutes 0..4^half, of which 0..n is at least a quarter (or 1/256 for tiny n):
    // following its cycle from inside comes back inside, after four steps on average at most.
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        for round in 0..ROUNDS {
            let turned = left ^ (mix(right ^ mix(key.wrapping_add(round as u64))) & mask);
            (left, right) = (right, turned);
        }
        at = left << half | right;
        if at < n {
            return at;
        }
    }
}

/// splitmix64's output function (Steele, Lea and Flood, 2014) on `state + golden ratio`.
pub(crate) fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
