//! `vmgang abort`, `postcopy` and `bandwidth`: what a running job can be told.

use zbus::Connection;

use crate::{exit, proxies, stage};

pub async fn abort(connection: &Connection, id: &str) -> anyhow::Result<u8> {
    let manager = proxies::manager(connection).await?;
    let stages = stage::list(&manager).await?;
    if let Some(found) = stage::find(&stages, id) {
        manager.abort_stage(&found.id).await?;
        println!(
            "Dropped the stage {} of the gang '{}'.",
            found.id, found.gang
        );
        return Ok(exit::MIGRATED);
    }
    let job = proxies::find_job(connection, id).await?;
    proxies::job(connection, &job.0).await?.abort().await?;
    println!(
        "Asked the job {} to abort; `vmgang status {} --watch` shows how it ends.",
        job.1, job.1
    );
    Ok(exit::MIGRATED)
}

pub async fn post_copy(connection: &Connection, id: &str) -> anyhow::Result<u8> {
    let job = proxies::find_job(connection, id).await?;
    let proxy = proxies::job(connection, &job.0).await?;
    proxy.start_post_copy().await?;
    println!(
        "Asked the job {} to go to post-copy; `vmgang status {} --watch` shows how it ends.",
        job.1, job.1
    );
    Ok(exit::MIGRATED)
}

pub async fn bandwidth(connection: &Connection, id: &str, mib_per_s: u64) -> anyhow::Result<u8> {
    let job = proxies::find_job(connection, id).await?;
    let proxy = proxies::job(connection, &job.0).await?;
    proxy.set_bandwidth(mib_per_s).await?;
    match mib_per_s {
        0 => println!("The job {} may use all of the network.", job.1),
        most => println!("The job {} uses at most {most} MiB/s.", job.1),
    }
    Ok(exit::MIGRATED)
}
