//! Gang membership as domain metadata: the strict parser, and the element to write.
//! The schema is `xml-schemas/member.rng`. No libvirt calls here.

/// XML namespace of vmgang's element in a domain's `<metadata>`.
pub const METADATA_NAMESPACE: &str = "https://vmgang.org/xmlns/domain/1.0";
/// Prefix libvirt writes the element with.
pub(crate) const METADATA_PREFIX: &str = "vmgang";

const GANG_LENGTH_MAX: usize = 64;

/// A domain's place in a gang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    pub gang: String,
    /// Position at switchover, if the user gave one.
    pub order: Option<u32>,
}

/// Metadata in vmgang's namespace that does not fit the schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the vmgang metadata of domain {domain} is not valid: {reason}; correct it with `vmgang gang remove` and `vmgang gang add`"
)]
pub struct MetadataError {
    pub domain: String,
    pub reason: String,
    /// The gang it names, when at least that much could be read.
    pub gang: Option<String>,
}

impl Membership {
    /// Checks a gang name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub fn check_gang_name(gang: &str) -> Result<(), String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if gang.is_empty() {
            Err("the gang name is empty".into())
        } else if gang.len() > GANG_LENGTH_MAX {
            Err(format!(
                "the gang name is longer than {GANG_LENGTH_MAX} characters"
            ))
        } else if let Some(bad) = gang.chars().find(|c| !allowed(*c)) {
            Err(format!(
                "the gang name '{gang}' has the character {bad:?}; letters, digits, '.', '_' and '-' are allowed"
            ))
        } else {
            Ok(())
        }
    }

    /// Reads the element as `virDomainGetMetadata` returns it (with or without its namespace).
    pub fn parse(domain: &str, xml: &str) -> Result<Membership, MetadataError> {
        let fail = |reason: String, gang: Option<&str>| MetadataError {
            domain: domain.to_owned(),
            reason,
            gang: gang.map(str::to_owned),
        };
        let document = roxmltree::Document::parse(xml)
            .map_err(|error| fail(format!("it is not well-formed XML ({error})"), None))?;
        let element = document.root_element();
        let name = element.tag_name();
        if name.name() != "member" {
            return Err(fail(
                format!("the element is <{}>, not <member>", name.name()),
                None,
            ));
        }
        if let Some(namespace) = name.namespace()
            && namespace != METADATA_NAMESPACE
        {
            return Err(fail(
                format!("its namespace is {namespace}, not {METADATA_NAMESPACE}"),
                None,
            ));
        }

        let gang = element
            .attribute("gang")
            .ok_or_else(|| fail("the attribute 'gang' is missing".into(), None))?;
        Membership::check_gang_name(gang).map_err(|reason| fail(reason, None))?;
        let fail = |reason: String| fail(reason, Some(gang));

        for attribute in element.attributes() {
            if attribute.namespace().is_some() || !matches!(attribute.name(), "gang" | "order") {
                return Err(fail(format!(
                    "there is no attribute '{}'",
                    attribute.name()
                )));
            }
        }
        let order = element
            .attribute("order")
            .map(|text| {
                parse_order(text).ok_or_else(|| {
                    fail(format!(
                        "the order '{text}' is not a number from 0 to {}",
                        u32::MAX
                    ))
                })
            })
            .transpose()?;
        let content = element.children().any(|node| {
            node.is_element()
                || node.text().is_some_and(|text| !text.trim().is_empty()) && node.is_text()
        });
        if content {
            return Err(fail("the element must be empty".into()));
        }
        Ok(Membership {
            gang: gang.to_owned(),
            order,
        })
    }

    /// The element without namespace: libvirt adds it from the key and URI of the call.
    pub(crate) fn to_xml(&self) -> String {
        // A checked gang name needs no escaping.
        match self.order {
            Some(order) => format!("<member gang='{}' order='{order}'/>", self.gang),
            None => format!("<member gang='{}'/>", self.gang),
        }
    }
}

fn parse_order(text: &str) -> Option<u32> {
    // u32's own parser would accept a leading '+'.
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for order in [None, Some(0), Some(u32::MAX)] {
            let member = Membership {
                gang: "web.front-end_1".into(),
                order,
            };
            assert_eq!(Membership::parse("vm", &member.to_xml()), Ok(member));
        }
    }

    #[test]
    fn reads_the_element_with_its_namespace() {
        let xml =
            format!("<vmgang:member xmlns:vmgang='{METADATA_NAMESPACE}' gang='web' order='7'/>");
        let member = Membership::parse("vm", &xml).expect("valid");
        assert_eq!((member.gang.as_str(), member.order), ("web", Some(7)));
    }

    #[test]
    fn refuses_what_does_not_fit_and_says_why() {
        let long = format!("<member gang='{}'/>", "x".repeat(65));
        let cases = [
            ("<member/>", "'gang' is missing", None),
            ("<member gang=''/>", "is empty", None),
            ("<member gang='a b'/>", "' '", None),
            ("<member gang='a/b'/>", "'/'", None),
            ("<member gang='é'/>", "'é'", None),
            (&long, "longer than 64", None),
            ("<member gang='web' order='-1'/>", "'-1'", Some("web")),
            ("<member gang='web' order='+1'/>", "'+1'", Some("web")),
            ("<member gang='web' order=''/>", "order ''", Some("web")),
            (
                "<member gang='web' order='4294967296'/>",
                "4294967296",
                Some("web"),
            ),
            ("<member gang='web' role='x'/>", "'role'", Some("web")),
            (
                "<member gang='web'>x</member>",
                "must be empty",
                Some("web"),
            ),
            (
                "<member gang='web'><a/></member>",
                "must be empty",
                Some("web"),
            ),
            ("<gang name='web'/>", "<gang>", None),
            ("<member xmlns='urn:other' gang='web'/>", "urn:other", None),
            ("<member gang='web'", "well-formed", None),
        ];
        for (xml, expected, gang) in cases {
            let error = Membership::parse("vm1", xml).expect_err(xml);
            let text = error.to_string();
            assert!(
                text.contains("vm1") && text.contains(expected),
                "{xml}: {text}"
            );
            assert_eq!(error.gang.as_deref(), gang, "{xml}");
        }
    }
}
