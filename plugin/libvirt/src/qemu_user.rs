//! Which user runs a domain's QEMU: read from libvirt's XML, so that a socket can be made
//! usable by that user and nobody else. Pure parsing, but for the look-up of user names.

use nix::unistd::{Group, User};
use uuid::Uuid;

/// The user and group a QEMU process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QemuUser {
    pub uid: u32,
    pub gid: u32,
}

/// The user of one domain's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainQemuUser {
    pub user: QemuUser,
    /// The domain's own XML prescribes it (a static label), so it is the same on every host.
    pub fixed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum QemuUserError {
    #[error("libvirt's XML is not well-formed: {0}")]
    Xml(#[from] roxmltree::Error),
    #[error(
        "libvirt's capabilities name no user for QEMU (no 'dac' security model); set `user` and `group` in qemu.conf"
    )]
    NoBaseLabel,
    #[error(
        "the label '{label}' is not USER:GROUP; correct the <seclabel model='dac'> of the domain or `user`/`group` in qemu.conf"
    )]
    Label { label: String },
    #[error(
        "there is no {kind} '{name}' on this host, but libvirt runs QEMU with it; create it or change qemu.conf"
    )]
    Unknown { kind: &'static str, name: String },
    #[error("libvirt's capabilities have no host UUID")]
    NoHostUuid,
}

/// The user of one running domain, from its live XML; `None` when the host's user is used.
///
/// Honours a label of the domain's own (`<seclabel type='static' model='dac'>`).
pub fn domain_qemu_user(domain_xml: &str) -> Result<Option<DomainQemuUser>, QemuUserError> {
    let document = roxmltree::Document::parse(domain_xml)?;
    let label = document
        .root_element()
        .children()
        .filter(|node| node.has_tag_name("seclabel") && node.attribute("model") == Some("dac"))
        .filter(|node| node.attribute("type") != Some("none"))
        .find_map(|node| Some((text_of(node, "label")?, node.attribute("type"))));
    label
        .map(|(label, kind)| {
            Ok(DomainQemuUser {
                user: parse_label(label)?,
                fixed: kind == Some("static"),
            })
        })
        .transpose()
}

/// Whether QEMU emulates the processor of this domain in software (`<domain type='qemu'>`).
pub fn is_emulated(domain_xml: &str) -> Result<bool, QemuUserError> {
    let document = roxmltree::Document::parse(domain_xml)?;
    Ok(document.root_element().attribute("type") == Some("qemu"))
}

/// The user that libvirt runs QEMU as on this host, from `virConnectGetCapabilities`.
pub fn host_qemu_user(capabilities_xml: &str) -> Result<QemuUser, QemuUserError> {
    let document = roxmltree::Document::parse(capabilities_xml)?;
    let host = document
        .root_element()
        .children()
        .find(|node| node.has_tag_name("host"))
        .ok_or(QemuUserError::NoBaseLabel)?;
    let model = host
        .children()
        .filter(|node| node.has_tag_name("secmodel"))
        .find(|node| text_of(*node, "model") == Some("dac"))
        .ok_or(QemuUserError::NoBaseLabel)?;
    let base_label = |kind: &str| {
        model
            .children()
            .find(|node| node.has_tag_name("baselabel") && node.attribute("type") == Some(kind))
            .and_then(|node| node.text())
    };
    let label = base_label("kvm")
        .or_else(|| base_label("qemu"))
        .ok_or(QemuUserError::NoBaseLabel)?;
    parse_label(label.trim())
}

/// The host's UUID, by which libvirt tells two hosts apart.
pub fn host_uuid(capabilities_xml: &str) -> Result<Uuid, QemuUserError> {
    let document = roxmltree::Document::parse(capabilities_xml)?;
    document
        .root_element()
        .children()
        .find(|node| node.has_tag_name("host"))
        .and_then(|host| text_of(host, "uuid"))
        .and_then(|text| text.parse().ok())
        .ok_or(QemuUserError::NoHostUuid)
}

fn text_of<'a>(node: roxmltree::Node<'a, '_>, tag: &str) -> Option<&'a str> {
    node.children()
        .find(|child| child.has_tag_name(tag))
        .and_then(|child| child.text())
        .map(str::trim)
}

/// libvirt's DAC label: `USER:GROUP`, each a name or a number, with '+' for "surely a number".
fn parse_label(label: &str) -> Result<QemuUser, QemuUserError> {
    let (user, group) = label.split_once(':').ok_or_else(|| QemuUserError::Label {
        label: label.to_owned(),
    })?;
    let uid = resolve("user", user, |name| {
        User::from_name(name)
            .ok()
            .flatten()
            .map(|user| user.uid.as_raw())
    })?;
    let gid = resolve("group", group, |name| {
        Group::from_name(name)
            .ok()
            .flatten()
            .map(|group| group.gid.as_raw())
    })?;
    Ok(QemuUser { uid, gid })
}

/// Like libvirt: '+N' is a number; otherwise a name, and a number if there is no such name.
fn resolve(
    kind: &'static str,
    text: &str,
    by_name: impl Fn(&str) -> Option<u32>,
) -> Result<u32, QemuUserError> {
    let number = match text.strip_prefix('+') {
        Some(digits) => digits.parse().ok(),
        None => by_name(text).or_else(|| text.parse().ok()),
    };
    number.ok_or_else(|| QemuUserError::Unknown {
        kind,
        name: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPABILITIES: &str = "<capabilities><host>
        <uuid>6e2f38a0-0b35-4b2c-9f43-9c1f9a0c7a10</uuid>
        <secmodel><model>apparmor</model><doi>0</doi></secmodel>
        <secmodel><model>dac</model><doi>0</doi>
          <baselabel type='kvm'>+64055:+64056</baselabel>
          <baselabel type='qemu'>+1:+2</baselabel></secmodel>
        </host></capabilities>";

    #[test]
    fn dynamic_label_of_a_running_domain() {
        let xml = "<domain><name>a</name>
            <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-1</label></seclabel>
            <seclabel type='dynamic' model='dac' relabel='yes'>
              <label>+64055:+107</label><imagelabel>+64055:+107</imagelabel></seclabel></domain>";
        let user = domain_qemu_user(xml).expect("parses");
        assert_eq!(
            user,
            Some(DomainQemuUser {
                user: QemuUser {
                    uid: 64055,
                    gid: 107
                },
                fixed: false
            })
        );
    }

    #[test]
    fn static_label_of_one_domain_by_name() {
        let xml = "<domain><seclabel type='static' model='dac' relabel='yes'><label>root:root</label></seclabel></domain>";
        assert_eq!(
            domain_qemu_user(xml).expect("parses"),
            Some(DomainQemuUser {
                user: QemuUser { uid: 0, gid: 0 },
                fixed: true
            })
        );
    }

    #[test]
    fn software_emulation_is_told_from_kvm() {
        assert!(is_emulated("<domain type='qemu'/>").expect("parses"));
        assert!(!is_emulated("<domain type='kvm'/>").expect("parses"));
    }

    #[test]
    fn no_label_means_the_host_user() {
        for xml in [
            "<domain/>",
            "<domain><seclabel type='none' model='dac'/></domain>",
            "<domain><seclabel type='dynamic' model='selinux'><label>x</label></seclabel></domain>",
        ] {
            assert_eq!(domain_qemu_user(xml).expect("parses"), None, "{xml}");
        }
    }

    #[test]
    fn bad_labels_are_named() {
        let with = |label: &str| {
            domain_qemu_user(&format!(
                "<domain><seclabel model='dac'><label>{label}</label></seclabel></domain>"
            ))
            .expect_err(label)
            .to_string()
        };
        assert!(with("nobody").contains("'nobody'"));
        assert!(with("+x:+1").contains("'+x'"));
        assert!(with("no-such-user-here:0").contains("no-such-user-here"));
        assert!(with("+99999999999:+1").contains("+99999999999"));
    }

    #[test]
    fn base_label_and_uuid_of_the_host() {
        let user = host_qemu_user(CAPABILITIES).expect("parses");
        assert_eq!(
            user,
            QemuUser {
                uid: 64055,
                gid: 64056
            }
        );
        assert_eq!(
            host_uuid(CAPABILITIES).expect("parses").to_string(),
            "6e2f38a0-0b35-4b2c-9f43-9c1f9a0c7a10"
        );
        assert!(matches!(
            host_qemu_user("<capabilities><host/></capabilities>"),
            Err(QemuUserError::NoBaseLabel)
        ));
        assert!(host_qemu_user("<capabilities").is_err());
    }
}
