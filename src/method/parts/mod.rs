//! What methods are made of: losses with their gradients in closed form, queues, the shuffle of the teacher's
//! images. Nothing here knows a method.

pub mod cross_entropy;
pub mod images;
pub mod info_nce;
pub mod nt_xent;
pub mod queue;
pub(crate) mod shuffle;
pub mod sinkhorn;
pub mod swapped;
