//! Which gang a domain belongs to.

use anyhow::bail;

use super::real;
use crate::proxies::ManagerProxy;

/// The gang of a running domain that is named as virsh takes it.
pub async fn of_domain(manager: &ManagerProxy<'_>, domain: &str) -> anyhow::Result<String> {
    let uuid = real::uuid_of(domain)?;
    let (gangs, problems) = manager.list_gangs().await?;
    for (gang, _, _) in gangs {
        let members = manager.get_gang(&gang).await?;
        let Some((name, _, state, ..)) = members.into_iter().find(|member| member.1 == uuid) else {
            continue;
        };
        if state == "shut off" {
            bail!("domain '{name}' is not running; name a member of the gang '{gang}' that is");
        }
        return Ok(gang);
    }
    if let Some((_, problem)) = problems.into_iter().find(|(name, _)| name == domain) {
        bail!("{problem}");
    }
    bail!(
        "domain '{domain}' belongs to no gang; put it into one with `vmgang gang add GANG {domain}`, or leave --gang out"
    )
}
