//! `vmgang return`: the members of a job that has ended come back to this host.

use std::collections::HashMap;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use zbus::{Connection, Variant};

use crate::arguments::{OnFailure, ReturnOptions};
use crate::{migrate, proxies, text};

pub async fn run(connection: &Connection, options: ReturnOptions) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch ctrl-C")?;
    let manager = proxies::manager(connection).await?;
    let of = proxies::find_job(connection, &options.job).await?;
    let here = options.destination.as_deref().unwrap_or_default();
    let asked = manager.return_(&of.1, here, dictionary(&options));
    let (path, changes) = migrate::unless_interrupted(&mut interrupt, asked).await?;
    for change in changes {
        eprintln!("{}", text::complaint(&change));
    }
    migrate::to_the_end(connection, &path, (options.quiet, options.json), interrupt).await
}

fn dictionary(options: &ReturnOptions) -> HashMap<&'static str, Variant<'_>> {
    let mut dictionary = HashMap::new();
    for (name, number) in [
        ("bandwidth", options.bandwidth),
        ("timeout", options.timeout),
    ] {
        if let Some(number) = number {
            dictionary.insert(name, Variant::from(number));
        }
    }
    if options.postcopy {
        dictionary.insert("postcopy", Variant::from(true));
    }
    if options.on_failure == OnFailure::Continue {
        dictionary.insert("on-failure", Variant::from("continue"));
    }
    if let Some(switchover) = options.switchover {
        dictionary.insert("switchover", Variant::from(switchover.as_str()));
    }
    if let Some(peer) = &options.peer {
        dictionary.insert("peer", Variant::from(peer.as_str()));
    }
    dictionary
}
