//! Whole sessions over loopback TCP, with these tests in the place of both QEMUs.

mod connections;
mod endings;
mod handshake;
mod held;
mod hostile;
mod libvirt;
mod pair;
mod stages;
mod streams;
