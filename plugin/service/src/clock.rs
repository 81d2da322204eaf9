//! Whether this host's clock is synchronised, as the kernel knows it.

/// More than so many microseconds of possible error are taken for no synchronisation, as systemd does.
const ERROR_MAX_US: libc::c_long = 16_000_000;

/// `None` if the kernel does not tell.
pub fn synchronised() -> Option<bool> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut time: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: with no modes set, it only writes what it knows into `time`.
    let state = unsafe { libc::adjtimex(&mut time) };
    (state >= 0).then_some(time.maxerror < ERROR_MAX_US)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_answers() {
        assert!(super::synchronised().is_some());
    }
}
