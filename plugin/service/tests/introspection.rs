//! What `xml-schemas/` says of the D-Bus interfaces is what the daemon serves: compared over a
//! socket pair, documentation and standard interfaces aside.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::BTreeMap;

use common::{Fake, Rig, Script};
use roxmltree::{Document, Node};
use zbus::Variant;
use zbus::fdo::IntrospectableProxy;

/// Each interface's members as comparable lines.
fn interfaces(xml: &str) -> BTreeMap<String, Vec<String>> {
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..roxmltree::ParsingOptions::default()
    };
    let document = Document::parse_with_options(xml, options).expect("XML");
    document
        .root_element()
        .children()
        .filter(|node| node.has_tag_name("interface"))
        .map(|interface| (attribute(interface, "name"), lines(interface)))
        .filter(|(name, _)| name.starts_with("org.vmgang."))
        .collect()
}

fn lines(interface: Node<'_, '_>) -> Vec<String> {
    let mut lines: Vec<String> = interface
        .children()
        .filter(Node::is_element)
        .map(line)
        .collect();
    lines.sort();
    lines
}

fn line(node: Node<'_, '_>) -> String {
    let mut attributes: Vec<String> = node
        .attributes()
        .map(|attribute| format!("{}={}", attribute.name(), attribute.value()))
        .collect();
    attributes.sort();
    let children: Vec<String> = node.children().filter(Node::is_element).map(line).collect();
    format!(
        "{} [{}] {{{}}}",
        node.tag_name().name(),
        attributes.join(" "),
        children.join("; ")
    )
}

fn attribute(node: Node<'_, '_>, name: &str) -> String {
    node.attribute(name).unwrap_or_default().to_owned()
}

async fn live(rig: &Rig, path: &str) -> String {
    IntrospectableProxy::builder(&rig.client)
        .destination("org.vmgang.VMGang1")
        .path(path)
        .build()
        .await
        .expect("a proxy")
        .introspect()
        .await
        .expect("introspection")
}

#[tokio::test]
async fn the_schemas_are_what_is_served() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good)])).await;
    let options = std::collections::HashMap::from([("all", Variant::from(true))]);
    let reply = rig
        .client
        .call_method(
            Some("org.vmgang.VMGang1"),
            "/org/vmgang/VMGang1",
            Some("org.vmgang.Manager1"),
            "Migrate",
            &("", "qemu+tls://b/system", options),
        )
        .await
        .expect("a job");
    let body = reply.body();
    let job: zbus::ObjectPath<'_> = body.deserialize().expect("a path");
    for (path, file) in [
        ("/org/vmgang/VMGang1", "org.vmgang.Manager1.xml"),
        (job.as_str(), "org.vmgang.Job1.xml"),
    ] {
        let served = live(&rig, path).await;
        let schema = format!("{}/../../xml-schemas/{file}", env!("CARGO_MANIFEST_DIR"));
        let written = std::fs::read_to_string(&schema).unwrap_or_default();
        assert!(
            !written.is_empty(),
            "{schema} is missing; served is:\n{served}"
        );
        assert_eq!(
            interfaces(&written),
            interfaces(&served),
            "{schema}; served is:\n{served}"
        );
    }
}
