//! What every role does for the worker: one request at a time, and reading its data back.

/// Errors are one sentence for the serial console; there is nobody to handle them.
pub type Result<T> = std::result::Result<T, String>;

/// A request of the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Read,
    Wrote,
}

/// An item that is not what it was when it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub item: usize,
    pub what: String,
}

/// A role, running, with all its data in place.
pub trait Workload {
    /// How many items a complete check reads.
    fn items(&self) -> usize;

    /// Makes one request of the load, chosen by a random number. An error ends the guest's work.
    fn request(&mut self, random: u64) -> Result<Done>;

    /// Reads some items back and compares each with what it must be.
    fn check(&mut self, first: usize, count: usize) -> Result<Vec<Damage>>;

    /// What remains to be checked once all items were read.
    fn end_of_pass(&mut self) -> Result<Vec<Damage>> {
        Ok(Vec::new())
    }

    /// Damage that was met by requests of the load since the last call.
    fn take_damage(&mut self) -> Vec<Damage> {
        Vec::new()
    }
}

/// Compares an item with what it must be.
pub fn compare(item: usize, expected: &[u8], found: &[u8]) -> Option<Damage> {
    let what = if expected.len() == found.len() {
        let offset = expected
            .iter()
            .zip(found)
            .position(|(expected, found)| expected != found)?;
        format!("offset={offset}")
    } else {
        format!("length={} expected={}", found.len(), expected.len())
    };
    Some(Damage { item, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_told_with_its_place() {
        assert_eq!(compare(3, b"abc", b"abc"), None);
        let what = |found: &[u8]| compare(3, b"abc", found).map(|damage| damage.what);
        assert_eq!(what(b"abd").as_deref(), Some("offset=2"));
        assert_eq!(what(b"ab").as_deref(), Some("length=2 expected=3"));
    }
}
