//! Which sample comes when: (seed, epoch, cursor) to sample ids, integers only.
