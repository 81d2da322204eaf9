//! Which domains make up a gang, from what libvirt says of them right now.
//! Pure over a list of domains; keeps no state, so a missed event cannot make it wrong.

use std::collections::{BTreeMap, HashSet};

use vmgang_engine::MEMBERS_MAX;
use vmgang_libvirt::DomainInfo;

use crate::error::ServiceError;
use crate::request::Selection;

/// One line of `ListGangs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GangSummary {
    pub name: String,
    pub active: u32,
    pub total: u32,
}

/// All gangs by name, and the metadata that could not be read: (domain, problem).
pub fn summarise(domains: &[DomainInfo]) -> (Vec<GangSummary>, Vec<(String, String)>) {
    let mut gangs: BTreeMap<&str, GangSummary> = BTreeMap::new();
    let mut problems = Vec::new();
    for domain in domains {
        match &domain.membership {
            Ok(Some(member)) => {
                let gang = gangs.entry(&member.gang).or_insert_with(|| GangSummary {
                    name: member.gang.clone(),
                    active: 0,
                    total: 0,
                });
                gang.total += 1;
                gang.active += u32::from(domain.active());
            }
            Ok(None) => {}
            Err(problem) => problems.push((domain.name.clone(), problem.to_string())),
        }
    }
    (gangs.into_values().collect(), problems)
}

/// The members of a gang, running or not, by their order and then by name.
pub fn members(gang: &str, domains: &[DomainInfo]) -> Result<Vec<DomainInfo>, ServiceError> {
    let mut members: Vec<(u32, DomainInfo)> = Vec::new();
    for domain in domains {
        match &domain.membership {
            Ok(Some(member)) if member.gang == gang => {
                members.push((member.order.unwrap_or(u32::MAX), domain.clone()));
            }
            Ok(_) => {}
            // It may belong to this gang: going without it could tear the gang apart.
            Err(problem) if problem.gang.as_deref().is_none_or(|named| named == gang) => {
                return Err(ServiceError::InvalidMetadata(problem.to_string()));
            }
            Err(_) => {}
        }
    }
    if members.is_empty() {
        return Err(ServiceError::UnknownGang(format!(
            "no domain on this host belongs to a gang '{gang}'; see `vmgang gang list`, or add domains with `vmgang gang add {gang} DOMAIN...`"
        )));
    }
    members.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
    Ok(members.into_iter().map(|(_, domain)| domain).collect())
}

/// The running domains a request is about, in the order they are to be named.
pub fn select(
    selection: &Selection,
    domains: &[DomainInfo],
) -> Result<Vec<DomainInfo>, ServiceError> {
    let selected = match selection {
        Selection::Gang(gang) => {
            let mut members = members(gang, domains)?;
            members.retain(DomainInfo::active);
            if members.is_empty() {
                return Err(ServiceError::NoRunningMember(format!(
                    "no member of the gang '{gang}' is running, so there is nothing to migrate; start one with `virsh start`"
                )));
            }
            members
        }
        Selection::All => {
            let running: Vec<_> = domains.iter().filter(|d| d.active()).cloned().collect();
            if running.is_empty() {
                return Err(ServiceError::NoRunningMember(
                    "no domain is running on this host, so there is nothing to migrate".into(),
                ));
            }
            running
        }
        Selection::Domains(names) => named(names, domains)?,
    };
    if selected.len() > MEMBERS_MAX {
        return Err(ServiceError::InvalidOption(format!(
            "{} domains are too many for one job, which takes at most {MEMBERS_MAX}; migrate some of them first, with --domains",
            selected.len()
        )));
    }
    Ok(selected)
}

/// Running domains by their names or UUIDs, each named once.
fn named(names: &[String], domains: &[DomainInfo]) -> Result<Vec<DomainInfo>, ServiceError> {
    let mut found: Vec<DomainInfo> = Vec::new();
    let mut seen = HashSet::new();
    for name in names {
        let domain = find(name, domains)?;
        if !domain.active() {
            return Err(ServiceError::NoRunningMember(format!(
                "domain {name} is not running; start it, or leave it out of --domains"
            )));
        }
        if !seen.insert(domain.uuid) {
            return Err(ServiceError::InvalidOption(format!(
                "the option domains names {} twice, the second time as {name}",
                domain.name
            )));
        }
        found.push(domain.clone());
    }
    Ok(found)
}

/// A domain by name or UUID.
pub fn find<'a>(name: &str, domains: &'a [DomainInfo]) -> Result<&'a DomainInfo, ServiceError> {
    domains
        .iter()
        .find(|domain| domain.name == name)
        .or_else(|| {
            let uuid: uuid::Uuid = name.parse().ok()?;
            domains.iter().find(|domain| domain.uuid == uuid)
        })
        .ok_or_else(|| {
            ServiceError::UnknownDomain(format!(
                "there is no domain {name} on this host; `virsh list --all` shows those there are"
            ))
        })
}

#[cfg(test)]
mod tests {
    use vmgang_libvirt::{DomainState, Membership, MetadataError};

    use super::*;

    fn domain(name: &str, active: bool, gang: Option<(&str, Option<u32>)>) -> DomainInfo {
        DomainInfo {
            name: name.into(),
            uuid: uuid::Uuid::new_v4(),
            id: active.then_some(1),
            state: if active {
                DomainState::Running
            } else {
                DomainState::ShutOff
            },
            persistent: true,
            memory_bytes: 1 << 30,
            membership: Ok(gang.map(|(gang, order)| Membership {
                gang: gang.into(),
                order,
            })),
        }
    }

    fn broken(name: &str, gang: Option<&str>) -> DomainInfo {
        let mut domain = domain(name, true, None);
        domain.membership = Err(MetadataError {
            domain: name.into(),
            reason: "bad".into(),
            gang: gang.map(str::to_owned),
        });
        domain
    }

    fn names(domains: &[DomainInfo]) -> Vec<&str> {
        domains.iter().map(|domain| domain.name.as_str()).collect()
    }

    #[test]
    fn members_come_in_order_then_by_name() {
        let domains = [
            domain("a", true, Some(("web", None))),
            domain("b", false, Some(("web", Some(2)))),
            domain("c", true, Some(("web", Some(1)))),
            domain("d", true, Some(("db", None))),
            domain("e", true, None),
        ];
        assert_eq!(
            names(&members("web", &domains).expect("there")),
            ["c", "b", "a"]
        );
        let running = select(&Selection::Gang("web".into()), &domains).expect("running");
        assert_eq!(names(&running), ["c", "a"]);
        let all = select(&Selection::All, &domains).expect("running");
        assert_eq!(names(&all), ["a", "c", "d", "e"]);
        let (gangs, problems) = summarise(&domains);
        assert_eq!(gangs.len(), 2);
        assert_eq!((gangs[1].active, gangs[1].total), (2, 3));
        assert!(problems.is_empty());
    }

    #[test]
    fn refusals() {
        let domains = [domain("b", false, Some(("web", None)))];
        let refuse = |selection| select(&selection, &domains).expect_err("refused");
        assert!(matches!(
            refuse(Selection::Gang("no".into())),
            ServiceError::UnknownGang(_)
        ));
        assert!(matches!(
            refuse(Selection::Gang("web".into())),
            ServiceError::NoRunningMember(_)
        ));
        assert!(matches!(
            refuse(Selection::All),
            ServiceError::NoRunningMember(_)
        ));
        assert!(matches!(
            refuse(Selection::Domains(vec!["b".into()])),
            ServiceError::NoRunningMember(_)
        ));
        assert!(matches!(
            refuse(Selection::Domains(vec!["x".into()])),
            ServiceError::UnknownDomain(_)
        ));
    }

    #[test]
    fn one_domain_is_named_once_and_a_job_takes_so_many() {
        let mut domains: Vec<_> = (0..=MEMBERS_MAX)
            .map(|n| domain(&format!("vm{n}"), true, None))
            .collect();
        let twice = vec!["vm1".to_owned(), domains[1].uuid.to_string()];
        let error = select(&Selection::Domains(twice), &domains).expect_err("refused");
        assert!(error.sentence().contains("vm1 twice"), "{error:?}");

        let names = domains.iter().map(|d| d.name.clone()).collect();
        for selection in [Selection::All, Selection::Domains(names)] {
            let error = select(&selection, &domains).expect_err("refused");
            assert!(matches!(error, ServiceError::InvalidOption(_)));
            assert!(error.sentence().contains("1025 domains"), "{error:?}");
        }
        domains.pop();
        assert!(select(&Selection::All, &domains).is_ok());
    }

    #[test]
    fn unreadable_metadata_stops_the_gang_it_may_belong_to() {
        let web = domain("a", true, Some(("web", None)));
        let stopped = |broken| members("web", &[web.clone(), broken]);
        assert!(matches!(
            stopped(broken("x", None)),
            Err(ServiceError::InvalidMetadata(_))
        ));
        assert!(matches!(
            stopped(broken("x", Some("web"))),
            Err(ServiceError::InvalidMetadata(_))
        ));
        assert!(stopped(broken("x", Some("db"))).is_ok());
        let (_, problems) = summarise(&[broken("x", None)]);
        assert_eq!(problems[0].0, "x");
    }
}
