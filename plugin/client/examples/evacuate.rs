//! Empties this host: each gang as one job, then whatever else runs. `evacuate DESTURI`

use std::time::Duration;

use anyhow::{Context, Result};
use vmgang_client::{JobProxy, ManagerProxy, Options};
use zbus::{Connection, Variant};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let destination = std::env::args().nth(1).context("usage: evacuate DESTURI")?;
    let connection = Connection::system().await?;
    let manager = ManagerProxy::new(&connection).await?;
    let (gangs, _) = manager.list_gangs().await?;
    for (gang, running, _) in gangs {
        if running > 0 {
            migrate(&connection, &gang, &destination, Options::new()).await?;
        }
    }
    let rest = Options::from([("all", Variant::from(true))]);
    match migrate(&connection, "", &destination, rest).await {
        Err(error) if nothing_runs(&error) => Ok(()),
        other => other,
    }
}

/// Migrates one gang and waits until it is there.
async fn migrate(
    connection: &Connection,
    gang: &str,
    destination: &str,
    options: Options<'_>,
) -> Result<()> {
    let manager = ManagerProxy::new(connection).await?;
    let path = manager.migrate(gang, destination, options).await?;
    let job = JobProxy::builder(connection).path(path).build().await?;
    let result = loop {
        let result = job.result().await?;
        if !result.is_empty() {
            break result;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let result: serde_json::Value = serde_json::from_str(&result)?;
    anyhow::ensure!(
        result["state"] == "completed",
        "{gang}: {}: {}",
        result["state"],
        result["error"]
    );
    let bytes = |name: &str| result["bytes"][name].as_u64().unwrap_or(0) >> 20;
    println!(
        "{}: {} domains, {} MiB over the network instead of {} MiB",
        if gang.is_empty() { "the rest" } else { gang },
        result["domains"].as_array().map_or(0, Vec::len),
        bytes("wire"),
        bytes("qemu_stream")
    );
    Ok(())
}

fn nothing_runs(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(zbus::Error::MethodError(name, _, _)) if *name == "org.vmgang.Error.NoRunningMember"
    )
}
