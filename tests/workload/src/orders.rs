//! What a guest was told to do, read from the kernel command line. Parsing only.

use crate::content::Values;
use crate::workload::Result;

/// What the guest is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Idle,
    Redis,
    Nginx,
    Sqlite,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Idle => "idle",
            Role::Redis => "redis",
            Role::Nginx => "nginx",
            Role::Sqlite => "sqlite",
        }
    }

    fn from_name(name: &str) -> Option<Role> {
        [Role::Idle, Role::Redis, Role::Nginx, Role::Sqlite]
            .into_iter()
            .find(|role| role.name() == name)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orders {
    /// The name used in every report.
    pub id: String,
    pub role: Role,
    /// What makes this guest's data its own.
    pub seed: u64,
    /// What makes the data its own that guests of one group have in common.
    pub group: u64,
    /// Requests of the load per second.
    pub rate: u64,
    /// How much data the role holds.
    pub data_mib: u64,
    /// What redis holds.
    pub values: Values,
    /// How long a complete check takes.
    pub check_seconds: u64,
    /// Milliseconds between two reports.
    pub report_ms: u64,
}

impl Orders {
    /// Reads every `vmgang.` word of a kernel command line.
    pub fn parse(command_line: &str) -> Result<Orders> {
        let mut orders = Orders {
            id: "guest".to_owned(),
            role: Role::Idle,
            seed: 1,
            group: 1,
            rate: 0,
            data_mib: 16,
            values: Values::Mixed,
            check_seconds: 60,
            report_ms: 1000,
        };
        for word in command_line.split_whitespace() {
            let Some(option) = word.strip_prefix("vmgang.") else {
                continue;
            };
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("{key}: {value:?} is not a number"))
            };
            match key {
                "id" => orders.id = value.to_owned(),
                "role" => {
                    orders.role = Role::from_name(value)
                        .ok_or_else(|| format!("role: {value:?} is not known"))?;
                }
                "seed" => orders.seed = number()?,
                "group" => orders.group = number()?,
                "rate" => orders.rate = number()?,
                "data" => orders.data_mib = number()?.max(1),
                "values" => {
                    orders.values = match value {
                        "mixed" => Values::Mixed,
                        "benchmark" => Values::Benchmark,
                        _ => return Err(format!("values: {value:?} is not known")),
                    }
                }
                "check" => orders.check_seconds = number()?.max(1),
                "report_ms" => orders.report_ms = number()?.max(100),
                _ => return Err(format!("unknown option vmgang.{key}")),
            }
        }
        Ok(orders)
    }

    pub fn data_bytes(&self) -> u64 {
        self.data_mib << 20
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_lab_writes() {
        let line = "console=ttyS0 quiet vmgang.id=g vmgang.role=redis vmgang.seed=7 vmgang.group=2 \
                    vmgang.rate=100 vmgang.data=300 vmgang.values=benchmark vmgang.check=20\n";
        let orders = Orders::parse(line).expect("good orders");
        assert_eq!((orders.id.as_str(), orders.role), ("g", Role::Redis));
        assert_eq!((orders.seed, orders.group, orders.rate), (7, 2, 100));
        assert_eq!((orders.data_mib, orders.check_seconds), (300, 20));
        assert_eq!(orders.values, Values::Benchmark);
        assert_eq!(orders.data_bytes(), 300 * 1024 * 1024);
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        for line in [
            "vmgang.role=mysql",
            "vmgang.rate=much",
            "vmgang.values=good",
            "vmgang.fill=zero:5",
        ] {
            assert!(Orders::parse(line).is_err(), "{line}");
        }
    }
}
