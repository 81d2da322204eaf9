//! How the page looks: one accent, light and dark, from a phone's width on.

pub(crate) const CSS: &str = include_str!("look.css");
