//! `org.vmgang.Job1`: one migration job, running or ended.

use std::collections::HashMap;
use std::sync::Arc;

use zbus::message::Header;
use zbus::{Connection, OwnedVariant, Variant, interface};

use super::authorize::{Permission, check, check_reader};
use crate::error::ServiceError;
use crate::job::{Control, Job, JobView, MemberView};
use crate::request::bandwidth;

pub(super) type Dictionary = HashMap<String, OwnedVariant>;

pub struct JobObject {
    job: Arc<Job>,
}

impl JobObject {
    pub(crate) fn new(job: Arc<Job>) -> JobObject {
        JobObject { job }
    }
}

#[interface(name = "org.vmgang.Job1")]
impl JobObject {
    /// Stops the job. Before the gang is released everything goes back as it was; afterwards
    /// only members whose guest still runs on the source are stopped.
    async fn abort(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        self.job.control(Control::Abort)
    }

    /// Caps the job's use of the network, in MiB/s; 0 takes the cap off.
    async fn set_bandwidth(
        &self,
        mib_per_second: u64,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        let bandwidth = bandwidth(mib_per_second)?;
        self.job.control(Control::SetBandwidth(bandwidth))
    }

    /// Switches the whole gang to post-copy now: every guest goes on at the destination and fetches
    /// the rest of its memory from here. Only for a job that was started with the option postcopy,
    /// timeout-postcopy, or on-stall=postcopy.
    async fn start_post_copy(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        self.job.start_post_copy()
    }

    /// What happened when in the job, so far, as one JSON object: docs/json.schema.json has its form under
    /// "timeline". Empty if that was not noted, as by earlier versions.
    async fn get_timeline(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<String, ServiceError> {
        check(connection, &header, Permission::Read).await?;
        let timeline = self.job.timeline();
        let json = timeline.and_then(|timeline| serde_json::to_string(&*timeline).ok());
        Ok(json.unwrap_or_default())
    }

    /// preparing, running, switching, completed, failed, partial or aborted.
    #[zbus(property)]
    async fn state(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Option<Header<'_>>,
    ) -> Result<String, ServiceError> {
        check_reader(connection, header).await?;
        Ok(Properties::of(&self.job).state)
    }

    /// gang (s), destination (s), started (t, seconds since 1970), elapsed_ms (t), and members
    /// (aa{sv}) with name (s), uuid (s), state (s: waiting, ballooning, copying, held, switching, migrated,
    /// source or failed), memory_bytes (t), total_bytes, remaining_bytes and iterations (t, as
    /// libvirt counts them), qemu_stream_bytes (t), wire_bytes (t); and while a member does not
    /// converge dirtied_per_s and carried_per_s (t, bytes of its memory: written to by the guest,
    /// and sent); throttled (b) if QEMU slows the guest down.
    #[zbus(property)]
    async fn progress(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Option<Header<'_>>,
    ) -> Result<Dictionary, ServiceError> {
        check_reader(connection, header).await?;
        Ok(Properties::of(&self.job).progress)
    }

    /// qemu_stream, wire and literal (t, bytes), saved (a{sx}, bytes by technique, adding up to
    /// qemu_stream - wire), barrier (s: exact or approximate), and switchover_spread_ms (t)
    /// once it is known.
    #[zbus(property)]
    async fn statistics(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Option<Header<'_>>,
    ) -> Result<Dictionary, ServiceError> {
        check_reader(connection, header).await?;
        Ok(Properties::of(&self.job).statistics)
    }

    /// The report of the ended job, one JSON object; empty until then.
    #[zbus(property)]
    async fn result(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Option<Header<'_>>,
    ) -> Result<String, ServiceError> {
        check_reader(connection, header).await?;
        Ok(Properties::of(&self.job).result)
    }
}

/// The values of all properties at one moment.
pub(super) struct Properties {
    state: String,
    progress: Dictionary,
    statistics: Dictionary,
    result: String,
}

impl Properties {
    pub(super) fn of(job: &Job) -> Properties {
        let view = job.view();
        Properties {
            state: view.state.as_str().to_owned(),
            progress: progress(job, &view),
            statistics: statistics(&view),
            result: view
                .report
                .as_ref()
                .map(|report| report.to_json())
                .unwrap_or_default(),
        }
    }

    pub(super) fn into_variants(self) -> HashMap<&'static str, Variant<'static>> {
        HashMap::from([
            ("State", Variant::from(self.state)),
            ("Progress", Variant::from(self.progress)),
            ("Statistics", Variant::from(self.statistics)),
            ("Result", Variant::from(self.result)),
        ])
    }

    pub(super) fn into_dictionary(self) -> Dictionary {
        owned(self.into_variants())
    }
}

fn progress(job: &Job, view: &JobView) -> Dictionary {
    let elapsed_ms = u64::try_from(job.elapsed().as_millis()).unwrap_or(u64::MAX);
    let members: Vec<Dictionary> = view.members.iter().map(member).collect();
    dictionary([
        ("gang", Variant::from(job.gang.clone().unwrap_or_default())),
        ("destination", Variant::from(job.destination.clone())),
        ("started", Variant::from(job.started_unix_s)),
        ("elapsed_ms", Variant::from(elapsed_ms)),
        ("members", Variant::from(members)),
    ])
}

fn member(member: &MemberView) -> Dictionary {
    let mut described = dictionary([
        ("name", Variant::from(member.name.clone())),
        ("uuid", Variant::from(member.uuid.to_string())),
        ("state", Variant::from(member.state.as_str())),
        ("memory_bytes", Variant::from(member.memory_bytes)),
        ("total_bytes", Variant::from(member.total_bytes)),
        ("remaining_bytes", Variant::from(member.remaining_bytes)),
        ("iterations", Variant::from(member.iterations)),
        ("qemu_stream_bytes", Variant::from(member.qemu_stream_bytes)),
        ("wire_bytes", Variant::from(member.wire_bytes)),
    ]);
    if let Some(rates) = &member.stalled {
        described.extend(dictionary([
            ("dirtied_per_s", Variant::from(rates.dirtied as u64)),
            ("carried_per_s", Variant::from(rates.carried as u64)),
        ]));
    }
    if member.throttled {
        described.extend(dictionary([("throttled", Variant::from(true))]));
    }
    described
}

fn statistics(view: &JobView) -> Dictionary {
    let saved: HashMap<String, i64> = view
        .bytes
        .saved
        .parts()
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .collect();
    let barrier = if view.barrier_approximate {
        "approximate"
    } else {
        "exact"
    };
    let mut statistics = dictionary([
        ("qemu_stream", Variant::from(view.bytes.qemu_stream)),
        ("wire", Variant::from(view.bytes.wire)),
        ("literal", Variant::from(view.bytes.literal)),
        ("saved", Variant::from(saved)),
        ("barrier", Variant::from(barrier)),
    ]);
    if let Some(spread) = view.switchover_spread_ms {
        statistics.extend(dictionary([(
            "switchover_spread_ms",
            Variant::from(spread),
        )]));
    }
    statistics
}

pub(super) fn dictionary<const N: usize>(pairs: [(&str, Variant<'static>); N]) -> Dictionary {
    owned(pairs)
}

fn owned<'a>(pairs: impl IntoIterator<Item = (&'a str, Variant<'static>)>) -> Dictionary {
    pairs
        .into_iter()
        // Only file descriptors cannot be owned, and there are none here.
        .filter_map(|(name, value)| Some((name.to_owned(), OwnedVariant::try_from(value).ok()?)))
        .collect()
}
