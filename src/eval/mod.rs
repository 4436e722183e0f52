//! How good is the backbone: kNN.
