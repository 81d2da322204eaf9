//! What fuzz targets build their inputs from.
//!
//! Must not: use the code under test to say what is right, where it can be said apart.

pub mod model;
pub mod session;
