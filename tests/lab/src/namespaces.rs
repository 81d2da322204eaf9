//! The lab's dealings with namespaces: making them, starting a command or opening a socket in
//! those of another process, and who is in one. What of that needs `unsafe` is here and nowhere else.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces};

/// Gives the calling thread a mount namespace of its own.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: file descriptors stay shared (no FILES flag), which is all that can go wrong.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(io::Error::from)
}

/// Makes the next children of the calling process the first of a new process id namespace.
pub(crate) fn unshare_process_ids() -> io::Result<()> {
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.map_err(io::Error::from)
}

/// Gives the calling process every other namespace that a host has of its own.
pub(crate) fn unshare_host() -> io::Result<()> {
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC;
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// Lets the kernel reap every child, adopted ones included.
pub(crate) fn reap_children_automatically() {
    // SAFETY: changes the disposition of one signal, for which no handler exists. The process
    // starts no children itself, so nobody inherits or misses it.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Starts a command in the namespaces of the process behind `target`. The child is an ordinary
/// child of this process: its id is the machine's, it can be waited for and killed.
pub(crate) fn spawn_in(target: &OwnedFd, mut command: Command) -> io::Result<Child> {
    let raw = target.as_raw_fd();
    let kinds = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION;
    let enter = move || {
        // SAFETY: `target` is borrowed until the child has been started, and the fork has a copy
        // of every descriptor.
        let target = unsafe { BorrowedFd::borrow_raw(raw) };
        move_into_thread_name_spaces(target, kinds).map_err(io::Error::from)
    };
    // SAFETY: the closure makes one system call and allocates nothing, so it may run between fork
    // and exec.
    unsafe { command.pre_exec(enter) };
    // A thread chooses the process id namespace of its own children only, hence one for this.
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                move_into_thread_name_spaces(target.as_fd(), ThreadNameSpaceType::PROCESS_ID)?;
                command.spawn()
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the starting thread panicked")))
    })
}

/// A UDP socket in the network of the process behind `target`, for this process to use.
pub(crate) fn udp_socket_in(target: &OwnedFd) -> io::Result<UdpSocket> {
    // A thread that goes there does not come back, hence one for this; the socket stays there.
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                move_into_thread_name_spaces(target.as_fd(), ThreadNameSpaceType::NETWORK)?;
                UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the opening thread panicked")))
    })
}

/// The machine's ids of all processes in the process id namespace of this one.
pub(crate) fn process_ids(of: u32) -> io::Result<Vec<u32>> {
    let namespace = |process: u32| fs::read_link(format!("/proc/{process}/ns/pid"));
    let wanted = namespace(of)?;
    Ok(fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        // One that has ended meanwhile is in none.
        .filter(|process| namespace(*process).is_ok_and(|found| found == wanted))
        .collect())
}
