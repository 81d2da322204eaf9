//! `vmgang return`: the members of a job that has ended come back to this host.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use zbus::{Connection, Variant};

use crate::arguments::ReturnOptions;
use crate::{migrate, proxies, text};

pub async fn run(connection: &Connection, options: ReturnOptions) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch ctrl-C")?;
    let manager = proxies::manager(connection).await?;
    let of = proxies::find_job(connection, &options.of).await?;
    let here = options.destination.as_deref().unwrap_or_default();
    let mut dictionary = migrate::dictionary_of_job(&options.job);
    if let Some(peer) = &options.peer {
        dictionary.insert("peer", Variant::from(peer.as_str()));
    }
    let asked = manager.return_(&of.1, here, dictionary);
    let (path, changes) = migrate::unless_interrupted(&mut interrupt, asked).await?;
    for change in changes {
        eprintln!("{}", text::complaint(&change));
    }
    migrate::to_the_end(connection, &path, &options.job, interrupt).await
}
