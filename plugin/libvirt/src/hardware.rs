//! What a running domain needs of a host: its machine, processor, memory backing and host devices,
//! read from its live XML; and whether another host has the machine and the processor.
//! Must not: judge what that means for a migration.

use std::ops::Range;

use roxmltree::{Document, Node};
use virt_sys as sys;

use crate::error::LibvirtError;
use crate::host::{Host, domain_error, host_error};
use crate::raw;
use uuid::Uuid;

/// How a domain's processor is described.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Processor {
    /// Not at all: QEMU's default one.
    #[default]
    Default,
    /// A model and its features, which a host has or lacks.
    Model,
    /// Whatever the host has (`host-passthrough`, `maximum`): what that is nobody knows elsewhere.
    OfTheHost,
}

/// The hardware of one running domain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hardware {
    /// `kvm` or `qemu`.
    pub virt_type: String,
    pub arch: String,
    pub machine: String,
    pub emulator: Option<String>,
    pub processor: Processor,
    /// libvirt compares the processor before it starts a guest (`check` is not `none`).
    pub checked: bool,
    /// The element `<cpu>`, as it stands.
    pub cpu_xml: Option<String>,
    /// Its memory is a shared memfd or file, which others can map.
    pub shared_memory: bool,
    /// Devices of this host that were given to it: type and number, as in `2 pci`.
    pub host_devices: Vec<String>,
}

/// Whether a host can run such hardware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    Fits,
    /// It has no such QEMU or machine, in libvirt's own words.
    NoMachine(String),
    /// Its processor lacks features, or the model is not known there.
    Lacks(String),
    /// libvirt there cannot tell, and why.
    Unknown(String),
}

/// The versions of what runs guests: a million for each major, a thousand for each minor one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Versions {
    pub libvirt: u32,
    pub qemu: u32,
}

impl Hardware {
    /// Reads a live domain's XML.
    pub fn parse(domain_xml: &str) -> Result<Hardware, roxmltree::Error> {
        let document = Document::parse(domain_xml)?;
        let domain = document.root_element();
        let child = |node: Node<'_, '_>, name: &str| -> Option<Range<usize>> {
            let found = node.children().find(|child| child.has_tag_name(name));
            found.map(|child| child.range())
        };
        let named = |name: &'static str| {
            let descends = domain.descendants();
            descends.filter(move |node| node.has_tag_name(name))
        };
        let os_type = domain
            .children()
            .find(|node| node.has_tag_name("os"))
            .and_then(|os| os.children().find(|node| node.has_tag_name("type")));
        let attribute = |name: &str| {
            let value = os_type.and_then(|os_type| os_type.attribute(name));
            value.unwrap_or_default().to_owned()
        };
        let cpu = domain.children().find(|node| node.has_tag_name("cpu"));
        let processor = match cpu.and_then(|cpu| cpu.attribute("mode")) {
            Some("host-passthrough" | "maximum") => Processor::OfTheHost,
            _ if cpu.is_some_and(|cpu| child(cpu, "model").is_some()) => Processor::Model,
            _ => Processor::Default,
        };
        let backing = domain
            .children()
            .find(|node| node.has_tag_name("memoryBacking"));
        let backing = |element: &str, attribute: &str, values: &[&str]| {
            let mut inside = backing.into_iter().flat_map(|backing| backing.children());
            inside.any(|node| {
                let value = node.attribute(attribute).unwrap_or_default();
                node.has_tag_name(element) && values.contains(&value)
            })
        };
        let cell_shared = domain
            .descendants()
            .any(|node| node.has_tag_name("cell") && node.attribute("memAccess") == Some("shared"));
        let shared = backing("access", "mode", &["shared"]) || cell_shared;
        let mut host_devices: Vec<(String, usize)> = Vec::new();
        for device in named("hostdev") {
            let kind = device.attribute("type").unwrap_or("unknown");
            match host_devices.iter_mut().find(|(known, _)| known == kind) {
                Some((_, count)) => *count += 1,
                None => host_devices.push((kind.to_owned(), 1)),
            }
        }
        Ok(Hardware {
            virt_type: domain.attribute("type").unwrap_or("kvm").to_owned(),
            arch: attribute("arch"),
            machine: attribute("machine"),
            emulator: named("emulator")
                .next()
                .and_then(|node| node.text())
                .map(|text| text.trim().to_owned()),
            processor,
            checked: cpu.and_then(|cpu| cpu.attribute("check")) != Some("none"),
            cpu_xml: child(domain, "cpu").map(|range| domain_xml[range].to_owned()),
            shared_memory: shared && backing("source", "type", &["memfd", "file"]),
            host_devices: host_devices
                .into_iter()
                .map(|(kind, count)| format!("{count} {kind}"))
                .collect(),
        })
    }
}

impl Host {
    /// The hardware of a running domain.
    pub fn hardware(&self, uuid: Uuid) -> Result<Hardware, LibvirtError> {
        let domain = self.lookup(uuid)?;
        let xml = domain
            .xml_desc(0)
            .map_err(domain_error(&domain, "read the XML of"))?;
        Ok(Hardware::parse(&xml).map_err(crate::qemu_user::QemuUserError::from)?)
    }

    pub fn versions(&self) -> Result<Versions, LibvirtError> {
        Ok(Versions {
            libvirt: self.libvirt_version()?,
            qemu: self.qemu_version()?,
        })
    }

    /// Whether this host's QEMU has the machine and the processor. Such answers are libvirt's; a
    /// connection that breaks meanwhile is an error.
    pub fn fits(&self, hardware: &Hardware) -> Result<Fit, LibvirtError> {
        let c_string = raw::c_string;
        let emulator = hardware.emulator.as_deref();
        let emulator = emulator.map(|path| c_string("an emulator's path", path));
        let emulator = emulator.transpose()?;
        let arch = c_string("an architecture", &hardware.arch)?;
        let machine = c_string("a machine", &hardware.machine)?;
        let virt_type = c_string("a domain type", &hardware.virt_type)?;
        let place = raw::Emulation {
            emulator: emulator.as_deref(),
            arch: &arch,
            machine: &machine,
            virt_type: &virt_type,
        };
        let machine_there = self.connect.domain_capabilities(
            hardware.emulator.as_deref(),
            Some(&hardware.arch),
            Some(&hardware.machine),
            Some(&hardware.virt_type),
            0,
        );
        if let Err(error) = machine_there {
            let refused = || Fit::NoMachine(error.message().to_owned());
            return match error.domain().to_raw() {
                sys::VIR_FROM_RPC => Err(host_error("look for the machine")(error)),
                _ => Ok(refused()),
            };
        }
        let cpu = match (&hardware.cpu_xml, hardware.processor) {
            (Some(cpu), Processor::Model) => c_string("a processor", cpu)?,
            _ => return Ok(Fit::Fits),
        };
        match raw::compare_cpu(&self.connect, &place, &cpu) {
            Ok(()) => Ok(Fit::Fits),
            Err(error) if error.domain().to_raw() == sys::VIR_FROM_RPC => {
                Err(host_error("compare processors")(error))
            }
            // Of some kinds of domain it knows no processor, or it knows no such question.
            Err(error) => Ok(match error.code().to_raw() {
                sys::VIR_ERR_OPERATION_UNSUPPORTED | sys::VIR_ERR_NO_SUPPORT => {
                    Fit::Unknown(error.message().to_owned())
                }
                _ => Fit::Lacks(error.message().to_owned()),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_live_domain_says_of_its_hardware() {
        let xml = "<domain type='qemu' id='3'><name>a</name>
            <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
            <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
            <cpu mode='custom' match='exact' check='full'><model fallback='forbid'>qemu64</model></cpu>
            <devices><emulator> /usr/bin/qemu-system-x86_64 </emulator>
              <hostdev mode='subsystem' type='usb'/><hostdev mode='subsystem' type='pci'/>
              <hostdev mode='subsystem' type='usb'/></devices></domain>";
        let hardware = Hardware::parse(xml).expect("parses");
        assert_eq!(
            hardware,
            Hardware {
                virt_type: "qemu".into(),
                arch: "x86_64".into(),
                machine: "pc-q35-7.2".into(),
                emulator: Some("/usr/bin/qemu-system-x86_64".into()),
                processor: Processor::Model,
                checked: true,
                cpu_xml: Some(
                    "<cpu mode='custom' match='exact' check='full'><model fallback='forbid'>qemu64</model></cpu>"
                        .into()
                ),
                shared_memory: true,
                host_devices: vec!["2 usb".into(), "1 pci".into()],
            }
        );
    }

    #[test]
    fn memory_is_shared_only_where_others_can_map_it() {
        let shared = |inside: &str| {
            let xml = format!("<domain><memoryBacking>{inside}</memoryBacking></domain>");
            Hardware::parse(&xml).expect("parses").shared_memory
        };
        assert!(shared("<source type='file'/><access mode='shared'/>"));
        assert!(!shared("<source type='memfd'/>"));
        assert!(!shared("<source type='memfd'/><access mode='private'/>"));
        assert!(!shared("<source type='anonymous'/><access mode='shared'/>"));
        let numa = "<domain><memoryBacking><source type='memfd'/></memoryBacking><cpu><numa>
            <cell id='0' cpus='0' memory='1' memAccess='shared'/></numa></cpu></domain>";
        assert!(Hardware::parse(numa).expect("parses").shared_memory);
    }

    #[test]
    fn processors_of_the_host_are_told_from_models() {
        let processor = |cpu: &str| {
            let xml = format!("<domain>{cpu}</domain>");
            Hardware::parse(&xml).expect("parses").processor
        };
        assert_eq!(processor(""), Processor::Default);
        assert_eq!(
            processor("<cpu><topology sockets='1' cores='1' threads='1'/></cpu>"),
            Processor::Default
        );
        assert_eq!(
            processor("<cpu mode='host-passthrough' migratable='on'/>"),
            Processor::OfTheHost
        );
        assert_eq!(
            processor("<cpu><model>Haswell</model></cpu>"),
            Processor::Model
        );
        let checked = |cpu: &str| {
            let xml = format!("<domain>{cpu}</domain>");
            Hardware::parse(&xml).expect("parses").checked
        };
        assert!(checked("<cpu check='full'/>") && checked(""));
        assert!(!checked("<cpu check='none'/>"));
    }
}
