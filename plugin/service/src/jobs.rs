//! All jobs this daemon knows, and which gangs and domains they hold.
//! A gang is in one job at a time, and so is a domain; nothing else is decided here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use vmgang_libvirt::DomainInfo;

use crate::error::ServiceError;
use crate::job::Job;

#[derive(Default)]
struct Inner {
    /// The newest first.
    jobs: Vec<Arc<Job>>,
    /// Job ids by the gang or domain they hold.
    gangs: HashMap<String, String>,
    domains: HashMap<Uuid, String>,
    closing: bool,
}

#[derive(Default)]
pub struct Jobs {
    inner: Mutex<Inner>,
}

/// Holds a gang and its domains until it is dropped.
pub struct Reservation {
    jobs: Arc<Jobs>,
    gang: Option<String>,
    domains: Vec<Uuid>,
}

impl Inner {
    fn check_free(&self, gang: Option<&str>, domains: &[DomainInfo]) -> Result<(), ServiceError> {
        if self.closing {
            return Err(stopping());
        }
        if let Some(gang) = gang
            && let Some(other) = self.gangs.get(gang)
        {
            return Err(busy(&format!("the gang '{gang}'"), other));
        }
        for domain in domains {
            if let Some(other) = self.domains.get(&domain.uuid) {
                return Err(busy(&format!("domain {}", domain.name), other));
            }
        }
        Ok(())
    }
}

impl Jobs {
    /// Fails where [`Jobs::reserve`] would, and takes nothing.
    pub fn check_reservable(
        &self,
        gang: Option<&str>,
        domains: &[DomainInfo],
    ) -> Result<(), ServiceError> {
        self.lock().check_free(gang, domains)
    }

    /// Takes the gang and the domains for one job, or says which job has them.
    pub fn reserve(
        self: &Arc<Self>,
        job: Uuid,
        gang: Option<&str>,
        domains: &[DomainInfo],
    ) -> Result<Reservation, ServiceError> {
        let mut inner = self.lock();
        inner.check_free(gang, domains)?;
        let id = job.simple().to_string();
        if let Some(gang) = gang {
            inner.gangs.insert(gang.to_owned(), id.clone());
        }
        for domain in domains {
            inner.domains.insert(domain.uuid, id.clone());
        }
        Ok(Reservation {
            jobs: self.clone(),
            gang: gang.map(str::to_owned),
            domains: domains.iter().map(|domain| domain.uuid).collect(),
        })
    }

    /// Fails if a job holds the domain: its metadata cannot be written before that ends.
    pub fn check_free(&self, domain: &DomainInfo) -> Result<(), ServiceError> {
        match self.lock().domains.get(&domain.uuid) {
            Some(job) => Err(busy(&format!("domain {}", domain.name), job)),
            None => Ok(()),
        }
    }

    /// Adds a job as the newest. Once closed it refuses: nobody would abort that job.
    pub fn add(&self, job: Arc<Job>) -> Result<(), ServiceError> {
        let mut inner = self.lock();
        if inner.closing {
            return Err(stopping());
        }
        inner.jobs.insert(0, job);
        Ok(())
    }

    pub fn remove(&self, id: &str) {
        self.lock().jobs.retain(|job| job.id != id);
    }

    /// All jobs, the newest first.
    pub fn list(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.clone()
    }

    /// Refuses new jobs from now on.
    pub fn close(&self) {
        self.lock().closing = true;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is one insert or remove, whole even if a thread died around it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut inner = self.jobs.lock();
        if let Some(gang) = &self.gang {
            inner.gangs.remove(gang);
        }
        for domain in &self.domains {
            inner.domains.remove(domain);
        }
    }
}

fn stopping() -> ServiceError {
    ServiceError::Busy("vmgangd is stopping; try again when it runs".into())
}

fn busy(what: &str, job: &str) -> ServiceError {
    ServiceError::Busy(format!(
        "{what} is being migrated by the job {job}; wait for it (`vmgang status {job}`) or stop it (`vmgang abort {job}`)"
    ))
}

#[cfg(test)]
mod tests {
    use vmgang_libvirt::DomainState;

    use super::*;

    fn domain(name: &str) -> DomainInfo {
        DomainInfo {
            name: name.into(),
            uuid: Uuid::new_v4(),
            id: Some(1),
            state: DomainState::Running,
            persistent: true,
            memory_bytes: 0,
            membership: Ok(None),
        }
    }

    #[test]
    fn a_gang_and_a_domain_are_in_one_job_only() {
        let jobs = Arc::new(Jobs::default());
        let (a, b) = (domain("a"), domain("b"));
        let refused = |gang, domains: &[DomainInfo]| {
            matches!(
                jobs.reserve(Uuid::new_v4(), gang, domains),
                Err(ServiceError::Busy(_))
            )
        };
        let first = jobs
            .reserve(Uuid::new_v4(), Some("web"), std::slice::from_ref(&a))
            .expect("free");
        assert!(refused(Some("web"), std::slice::from_ref(&b)));
        assert!(refused(None, &[b.clone(), a.clone()]));
        assert!(jobs.check_free(&a).is_err() && jobs.check_free(&b).is_ok());
        let second = jobs.reserve(Uuid::new_v4(), None, std::slice::from_ref(&b));
        assert!(second.is_ok(), "a refusal holds nothing");
        drop(first);
        assert!(jobs.check_free(&a).is_ok());
        jobs.close();
        assert!(refused(None, std::slice::from_ref(&a)));
        let (job, _control) = Job::start(Uuid::new_v4(), None, "b", &[a], false);
        assert!(
            jobs.add(Arc::new(job)).is_err(),
            "also past the reservation"
        );
        assert!(jobs.list().is_empty());
    }
}
