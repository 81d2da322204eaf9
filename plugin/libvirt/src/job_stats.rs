//! Statistics of a running or completed migration job, read without trusting their types.
//! Fields libvirt did not give, or gave with another type, are `None`.

use crate::raw::TypedValue;

/// The part of `virDomainGetJobStats` that vmgang reports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobStats {
    /// A job runs now (or, for completed statistics, did).
    pub active: bool,
    /// It takes the domain to another host.
    pub outgoing: bool,
    pub elapsed_ms: Option<u64>,
    pub downtime_ms: Option<u64>,
    pub iterations: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    /// What QEMU wrote to its socket, not what crossed the wire.
    pub memory_processed_bytes: Option<u64>,
    pub memory_remaining_bytes: Option<u64>,
}

/// `VIR_DOMAIN_JOB_NONE`.
const JOB_NONE: i32 = 0;
/// `VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT`.
const MIGRATION_OUT: u64 = 5;

impl JobStats {
    pub(crate) fn from_params(kind: i32, params: &[(String, TypedValue)]) -> JobStats {
        let number = |name: &str| {
            params
                .iter()
                .find(|(field, _)| field == name)
                .and_then(|(_, value)| match value {
                    TypedValue::Unsigned(number) => Some(*number),
                    TypedValue::Integer(number) => u64::try_from(*number).ok(),
                    _ => None,
                })
        };
        JobStats {
            active: kind != JOB_NONE,
            outgoing: number("operation") == Some(MIGRATION_OUT),
            elapsed_ms: number("time_elapsed"),
            downtime_ms: number("downtime"),
            iterations: number("memory_iteration"),
            memory_total_bytes: number("memory_total"),
            memory_processed_bytes: number("memory_processed"),
            memory_remaining_bytes: number("memory_remaining"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_types_are_ignored_not_fatal() {
        let params = [
            ("downtime".to_owned(), TypedValue::Text("soon".into())),
            ("time_elapsed".to_owned(), TypedValue::Integer(-1)),
            ("memory_iteration".to_owned(), TypedValue::Integer(4)),
            ("memory_total".to_owned(), TypedValue::Unsigned(1 << 30)),
            ("memory_bps".to_owned(), TypedValue::Double(1.0)),
            ("success".to_owned(), TypedValue::Boolean(true)),
        ];
        let stats = JobStats::from_params(3, &params);
        assert!(stats.active);
        assert_eq!(stats.downtime_ms, None);
        assert_eq!(stats.elapsed_ms, None);
        assert_eq!(stats.iterations, Some(4));
        assert_eq!(stats.memory_total_bytes, Some(1 << 30));
        assert!(!stats.outgoing);
        assert!(!JobStats::from_params(JOB_NONE, &[]).active);
    }

    #[test]
    fn a_migration_is_told_from_other_jobs() {
        // A save, a migration to here, and one to another host.
        for (operation, outgoing) in [(2, false), (4, false), (5, true)] {
            let params = [("operation".to_owned(), TypedValue::Integer(operation))];
            assert_eq!(JobStats::from_params(2, &params).outgoing, outgoing);
        }
    }
}
