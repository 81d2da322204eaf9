//! Progress as virsh shows it: one line for the whole gang, rewritten, on standard error.

use std::io::Write;

use crate::snapshot::{Member, Snapshot};

/// As virsh writes it, in hundredths of a percent.
pub fn show(hundredths: u64) {
    let mut stderr = std::io::stderr().lock();
    // A closed standard error is no reason to end.
    let _ = write!(
        stderr,
        "\rMigration: [{:>2}.{:02} %]",
        hundredths / 100,
        hundredths % 100
    );
    let _ = stderr.flush();
}

/// All there is.
pub const WHOLE: u64 = 10_000;

/// How far a gang is; nothing before libvirt has said how much there is.
pub fn of_gang(snapshot: &Snapshot) -> Option<u64> {
    let total: u64 = snapshot.members.iter().map(total).sum();
    let remaining: u64 = snapshot.members.iter().map(remaining).sum();
    if remaining >= total {
        return None;
    }
    let done = u128::from(total - remaining) * u128::from(WHOLE) / u128::from(total);
    // It is whole when the job has ended so.
    Some(u64::try_from(done).unwrap_or(WHOLE).min(WHOLE - 1))
}

/// Before its turn a member has all its memory to send.
fn total(member: &Member) -> u64 {
    match member.total_bytes {
        0 => member.memory_bytes,
        bytes => bytes,
    }
}

fn remaining(member: &Member) -> u64 {
    match (member.state.as_str(), member.total_bytes) {
        ("migrated", _) => 0,
        (_, 0) => member.memory_bytes,
        (_, total) => member.remaining_bytes.min(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gang_is_as_far_as_its_bytes() {
        let member = |state: &str, total_bytes, remaining_bytes| Member {
            state: state.into(),
            total_bytes,
            remaining_bytes,
            memory_bytes: 1000,
            ..Member::default()
        };
        let far = |members: Vec<Member>| {
            of_gang(&Snapshot {
                members,
                ..Snapshot::default()
            })
        };
        assert_eq!(far(vec![]), None);
        assert_eq!(
            far(vec![member("waiting", 0, 0), member("copying", 0, 0)]),
            None
        );
        assert_eq!(
            far(vec![member("copying", 1000, 875), member("waiting", 0, 0)]),
            Some(625)
        );
        assert_eq!(
            far(vec![
                member("migrated", 1000, 1000),
                member("held", 1000, 500)
            ]),
            Some(7500)
        );
        assert_eq!(far(vec![member("held", 1000, 0)]), Some(9999));
        assert_eq!(far(vec![member("migrated", 0, 0)]), Some(9999));
        assert_eq!(far(vec![member("copying", u64::MAX / 2, 1)]), Some(9999));
    }
}
