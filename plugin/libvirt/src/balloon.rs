//! A domain's memory balloon: how much memory its guest has now, how much of it the guest needs,
//! and how to change that while it runs. Must not decide how much a guest is to have.

use uuid::Uuid;
use virt_sys as sys;

use crate::error::LibvirtError;
use crate::host::{Host, domain_error};
use crate::qemu_user::QemuUserError;

const KIB: u64 = 1024;

/// The balloon of a running domain at one moment. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balloon {
    /// The most memory the guest can have.
    pub maximum_bytes: u64,
    /// What it has now.
    pub current_bytes: u64,
    /// What it could do without, as its own kernel reckons (`MemAvailable`); told only by a guest
    /// that is asked from time to time, see [`Host::set_balloon_period`].
    pub usable_bytes: Option<u64>,
    /// When it last told that, in seconds since 1970.
    pub told_unix_s: u64,
    /// How often it is asked, in seconds; 0 is never.
    pub period_s: u32,
}

impl Host {
    /// `None` if the domain has no virtio balloon.
    pub fn balloon(&self, uuid: Uuid) -> Result<Option<Balloon>, LibvirtError> {
        let domain = self.lookup(uuid)?;
        let xml = domain
            .xml_desc(0)
            .map_err(domain_error(&domain, "read the XML of"))?;
        let Some(period_s) = period(&xml)? else {
            return Ok(None);
        };
        let maximum_kib = domain
            .info()
            .map_err(domain_error(&domain, "read the state of"))?
            .max_mem;
        let stats = domain
            .memory_stats(0)
            .map_err(domain_error(&domain, "read the memory statistics of"))?;
        let of = |tag| {
            stats
                .iter()
                .find(|stat| stat.tag == tag)
                .map(|stat| stat.val)
        };
        let Some(current_kib) = of(sys::VIR_DOMAIN_MEMORY_STAT_ACTUAL_BALLOON) else {
            return Ok(None);
        };
        let bytes = |kib: u64| kib.saturating_mul(KIB);
        Ok(Some(Balloon {
            maximum_bytes: bytes(maximum_kib),
            current_bytes: bytes(current_kib),
            usable_bytes: of(sys::VIR_DOMAIN_MEMORY_STAT_USABLE).map(bytes),
            told_unix_s: of(sys::VIR_DOMAIN_MEMORY_STAT_LAST_UPDATE).unwrap_or(0),
            period_s,
        }))
    }

    /// How often the guest is asked what it could do without, until it is shut off.
    pub fn set_balloon_period(&self, uuid: Uuid, seconds: u32) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        let seconds = i32::try_from(seconds).unwrap_or(i32::MAX);
        domain
            .set_memory_stats_period(seconds, sys::VIR_DOMAIN_AFFECT_LIVE)
            .map_err(domain_error(&domain, "ask for memory statistics of"))
    }

    /// Asks the guest to make do with so much memory, until it is shut off. It follows in its own
    /// time.
    pub fn set_memory(&self, uuid: Uuid, bytes: u64) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        domain
            .set_memory_flags(bytes.div_ceil(KIB), sys::VIR_DOMAIN_AFFECT_LIVE)
            .map_err(domain_error(&domain, "set the memory of"))
    }
}

/// How often the guest is asked, from the domain's XML; `None` without a virtio balloon.
fn period(domain_xml: &str) -> Result<Option<u32>, QemuUserError> {
    let document = roxmltree::Document::parse(domain_xml)?;
    let balloon = document.descendants().find(|node| {
        node.has_tag_name("memballoon")
            && node
                .attribute("model")
                .is_some_and(|model| model.starts_with("virtio"))
    });
    Ok(balloon.map(|balloon| {
        balloon
            .children()
            .find(|node| node.has_tag_name("stats"))
            .and_then(|stats| stats.attribute("period"))
            .and_then(|period| period.parse().ok())
            .unwrap_or(0)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_balloon_and_how_often_its_guest_is_asked() {
        let found = |balloon: &str| {
            let xml = format!("<domain type='kvm'><devices>{balloon}</devices></domain>");
            period(&xml).expect("good XML")
        };
        assert_eq!(found(""), None);
        assert_eq!(found("<memballoon model='none'/>"), None);
        assert_eq!(found("<memballoon model='xen'/>"), None);
        assert_eq!(found("<memballoon model='virtio'/>"), Some(0));
        let asked = "<memballoon model='virtio-non-transitional'><stats period='5'/></memballoon>";
        assert_eq!(found(asked), Some(5));
    }
}
