//! What a Debian guest is for, and how much of it unless told otherwise.

use std::fmt;
use std::str::FromStr;

use crate::error::LabError;

/// The role of a Debian guest; the load comes from inside the guest, over its loopback interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// No server; the files below `/usr` are hashed now and then.
    Idle,
    /// redis-server with values of mixed compressibility, under GET and SET.
    Redis,
    /// nginx with a web root of files, under GET.
    Nginx,
    /// A sqlite database in memory-backed files, under small transactions.
    Sqlite,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Idle, Role::Redis, Role::Nginx, Role::Sqlite];

    /// As on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Role::Idle => "idle",
            Role::Redis => "redis",
            Role::Nginx => "nginx",
            Role::Sqlite => "sqlite",
        }
    }

    /// Requests per second that four guests together can serve on two emulating processors, and
    /// still leave time for a migration.
    pub(crate) fn default_rate(self) -> u64 {
        match self {
            Role::Idle => 0,
            Role::Redis => 50,
            Role::Nginx => 20,
            Role::Sqlite => 10,
        }
    }

    /// How much data the guest holds: in a guest of 1 GiB, 300 MiB of redis values.
    pub(crate) fn default_data_mib(self, memory_mib: u64) -> u64 {
        // What the kernel and the userland need themselves.
        let left = memory_mib.saturating_sub(224);
        let share = match self {
            Role::Idle => 0,
            Role::Redis => left * 3 / 8,
            Role::Nginx => left / 16,
            Role::Sqlite => left / 32,
        };
        share.max(1)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = LabError;

    fn from_str(name: &str) -> Result<Role, LabError> {
        Role::ALL
            .into_iter()
            .find(|role| role.name() == name)
            .ok_or_else(|| {
                let known = Role::ALL.map(Role::name).join(", ");
                LabError::Request(format!("{name:?} is not a role; there are {known}"))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_known_by_name() {
        for role in Role::ALL {
            assert_eq!(role.name().parse::<Role>().ok(), Some(role));
        }
        let error = "mysql".parse::<Role>().expect_err("no such role");
        assert!(error.to_string().contains("idle, redis, nginx, sqlite"));
    }

    #[test]
    fn a_guest_of_one_gib_holds_what_is_said() {
        assert_eq!(Role::Redis.default_data_mib(1024), 300);
        assert_eq!(Role::Nginx.default_data_mib(1024), 50);
        assert_eq!(Role::Sqlite.default_data_mib(1024), 25);
        assert_eq!(Role::Redis.default_data_mib(100), 1);
    }
}
