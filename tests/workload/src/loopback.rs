//! Raising the loopback interface: the one thing here that needs an ioctl of its own.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

pub fn raise() -> io::Result<()> {
    // Any socket will do; one of the address family must exist anyway.
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an `ifreq` is plain data, for which zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, letter) in request.ifr_name.iter_mut().zip(b"lo") {
        *target = *letter as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the descriptor is open, and the request lives and is of the type that this ioctl
    // reads; it writes nothing.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
