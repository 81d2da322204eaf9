//! Stages: contents of gangs at their destination before they migrate.
//!
//! Owns: those that this host fills (`prepare`), from the request to the migration that takes
//! them, and the list of those that it holds for others.
//! Must not: fail a migration: one that finds no stage goes without.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;
use vmgang_dedup::{Census, Content, PAGE_BYTES, PageDigest, Snapshot};
use vmgang_engine::{
    MEMBERS_MAX, MemberOffer, Offer, PeerAddress, STAGE_PAGES_MAX, StageOptions, StageSession,
    StagedContents, Techniques,
};
use vmgang_libvirt::DomainInfo;

use crate::budget;
use crate::coordinator::Parts;
use crate::error::ServiceError;
use crate::gangs;
use crate::hypervisor::ask;
use crate::request::{PrepareRequest, Selection};
use crate::scans::{Scan, unix_seconds};

/// Between two looks at the guests of a stage.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// And as many times as long as such a look takes: it is to take a twentieth of a processor.
const REFRESH_TIMES: u32 = 20;
/// What has not changed for so long is worth sending.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// How long an ended stage is shown.
const ENDED_SHOWN: Duration = Duration::from_secs(600);
/// Stages of this host that are under way at the same time.
const STAGES_MAX: usize = 16;
/// With less time left, a stage that was taken in vain is not filled again.
const WORTH_AGAIN: Duration = Duration::from_secs(30);

/// Where a stage stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageState {
    /// The guests are scanned.
    Scanning,
    /// Contents are on their way.
    Staging,
    /// Everything that is worth it is there.
    Fresh,
    /// A migration has begun with it.
    Taken,
    Ended,
}

impl StageState {
    pub fn as_str(self) -> &'static str {
        match self {
            StageState::Scanning => "scanning",
            StageState::Staging => "staging",
            StageState::Fresh => "fresh",
            StageState::Taken => "taken",
            StageState::Ended => "ended",
        }
    }
}

/// What there is to say about a stage, whichever side it is seen from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageView {
    pub id: String,
    /// From this host to another one.
    pub outgoing: bool,
    pub gang: String,
    /// The destination's URI, or the name of the source.
    pub peer: String,
    pub state: StageState,
    pub error: Option<String>,
    /// Pages that are staged.
    pub contents: u64,
    /// Bytes that crossed for them.
    pub wire_bytes: u64,
    /// Of these pages, those that the destination had.
    pub found: u64,
    /// Bytes of pages that are still to be sent.
    pub remaining_bytes: u64,
    /// When everything was there last, in seconds since 1970; 0 for never.
    pub refreshed_unix_s: u64,
    pub expires_unix_s: u64,
}

/// One stage that this host fills.
pub struct Stage {
    id: Uuid,
    request: PrepareRequest,
    expires: Instant,
    view: Mutex<StageView>,
    /// Gone once it was taken.
    session: tokio::sync::Mutex<Option<StageSession>>,
    members: Vec<Uuid>,
    stop: watch::Sender<bool>,
    ended: Mutex<Option<Instant>>,
}

impl Stage {
    fn lock(&self) -> MutexGuard<'_, StageView> {
        // A panic while holding the lock leaves plain figures, which are fine to read.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn view(&self) -> StageView {
        self.lock().clone()
    }

    pub fn id(&self) -> String {
        self.id.simple().to_string()
    }

    fn is_live(&self) -> bool {
        !matches!(self.lock().state, StageState::Taken | StageState::Ended)
    }

    fn end(&self, error: Option<String>) {
        let mut view = self.lock();
        if view.state != StageState::Taken {
            view.state = StageState::Ended;
            view.error = error;
        }
        view.remaining_bytes = 0;
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

/// The stages of this host.
#[derive(Default)]
pub struct Stages {
    outgoing: Mutex<Vec<Arc<Stage>>>,
    incoming: Mutex<BTreeMap<Uuid, StageView>>,
}

impl Stages {
    fn outgoing(&self) -> MutexGuard<'_, Vec<Arc<Stage>>> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn incoming(&self) -> MutexGuard<'_, BTreeMap<Uuid, StageView>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, this host's own first.
    pub fn list(&self) -> Vec<StageView> {
        let mut outgoing = self.outgoing();
        outgoing.retain(|stage| {
            let ended = *stage.ended.lock().unwrap_or_else(PoisonError::into_inner);
            ended.is_none_or(|ended| ended.elapsed() < ENDED_SHOWN)
        });
        let mut views: Vec<StageView> = outgoing.iter().map(|stage| stage.view()).collect();
        drop(outgoing);
        views.extend(self.incoming().values().cloned());
        views
    }

    /// Drops a stage that this host fills.
    pub fn abort(&self, id: &str) -> Result<(), ServiceError> {
        let stages = self.outgoing();
        let found = stages.iter().find(|stage| stage.id() == id);
        match found.filter(|stage| stage.is_live()) {
            Some(stage) => {
                stage.stop.send_replace(true);
                Ok(())
            }
            None => Err(ServiceError::JobEnded(format!(
                "there is no stage {id} of this host to drop; `vmgang status` lists those there are"
            ))),
        }
    }

    /// Drops all of them, so that the daemon can stop.
    pub fn shutdown(&self) {
        for stage in &*self.outgoing() {
            stage.stop.send_replace(true);
        }
    }

    /// Another host begins to fill a stage here.
    pub fn arrives(&self, offer: &Offer, seconds: u32) {
        let view = StageView {
            id: offer.job.simple().to_string(),
            outgoing: false,
            gang: offer.gang.clone(),
            peer: offer.source_host.clone(),
            state: StageState::Staging,
            error: None,
            contents: 0,
            wire_bytes: 0,
            found: 0,
            remaining_bytes: 0,
            refreshed_unix_s: 0,
            expires_unix_s: unix_seconds() + u64::from(seconds),
        };
        self.incoming().insert(offer.job, view);
    }

    /// It has got more.
    pub fn grows(&self, job: Uuid, contents: u64, found: u64) {
        if let Some(view) = self.incoming().get_mut(&job) {
            view.contents += contents;
            view.found += found;
            view.refreshed_unix_s = unix_seconds();
        }
    }

    /// It was taken, or its source is gone.
    pub fn leaves(&self, job: Uuid) {
        self.incoming().remove(&job);
    }

    /// The stage for a job of these members to that peer, if there is one. It is the job's from
    /// here on.
    pub async fn take(
        &self,
        gang: Option<&str>,
        peer: &PeerAddress,
        members: &[DomainInfo],
    ) -> Option<(Arc<Stage>, StagedContents)> {
        let stage = {
            let stages = self.outgoing();
            let for_job = |stage: &&Arc<Stage>| {
                let same_gang = gang == Some(stage.request.gang.as_str());
                let member = |domain: &DomainInfo| stage.members.contains(&domain.uuid);
                stage.is_live()
                    && stage.request.peer == *peer
                    && (same_gang || members.iter().any(member))
            };
            stages.iter().find(for_job)?.clone()
        };
        // Between two frames of what is being staged.
        let session = stage.session.lock().await.take()?;
        if session.ended().is_some() {
            return None;
        }
        stage.lock().state = StageState::Taken;
        stage.stop.send_replace(true);
        Some((stage, session.into_contents()))
    }

    /// Starts to fill a stage. An error means that nothing has begun.
    pub async fn prepare(
        self: &Arc<Self>,
        parts: &Arc<Parts>,
        request: PrepareRequest,
    ) -> Result<Arc<Stage>, ServiceError> {
        let expires = Instant::now() + request.time;
        let members = members(parts, &request.gang).await?;
        self.check_room(&request)?;
        let transport = (parts.transport)().map_err(ServiceError::TlsFailed)?;
        let source_host = ask(&parts.hypervisor, |hypervisor| hypervisor.hostname()).await?;
        let id = Uuid::new_v4();
        let offers: Vec<MemberOffer> = members
            .iter()
            .map(|member| MemberOffer {
                uuid: member.uuid,
                name: member.name.clone(),
                memory_bytes: member.memory_bytes,
                fixed_owner: None,
            })
            .collect();
        let available = (parts.available_memory)().map_err(|error| {
            ServiceError::Internal(format!("this host's /proc/meminfo cannot be read: {error}"))
        })?;
        let guests = offers
            .iter()
            .fold(0u64, |sum, member| sum.saturating_add(member.memory_bytes));
        let session = StageSession::connect(StageOptions {
            peer: request.peer.clone(),
            transport,
            offer: Offer {
                job: id,
                gang: request.gang.clone(),
                source_host,
                window_budget_bytes: budget::to_offer(parts.window_budget, guests, available),
                members: offers,
            },
            seconds: u32::try_from(request.time.as_secs()).unwrap_or(u32::MAX),
            techniques: Techniques::default(),
            workers: parts.workers.clone(),
            network: vmgang_engine::system(),
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
        })
        .await?;
        parts.peers.connected(&request.peer.to_string());
        let stage = Arc::new(Stage {
            id,
            expires,
            view: Mutex::new(StageView {
                id: id.simple().to_string(),
                outgoing: true,
                gang: request.gang.clone(),
                peer: request.destination.name.clone(),
                state: StageState::Scanning,
                error: None,
                contents: 0,
                wire_bytes: 0,
                found: 0,
                remaining_bytes: 0,
                refreshed_unix_s: 0,
                expires_unix_s: unix_seconds() + request.time.as_secs(),
            }),
            request,
            session: tokio::sync::Mutex::new(Some(session)),
            members: members.iter().map(|member| member.uuid).collect(),
            stop: watch::Sender::new(false),
            ended: Mutex::default(),
        });
        {
            let mut outgoing = self.outgoing();
            // Somebody else may have been faster.
            check_other(&outgoing, &stage.request)?;
            outgoing.insert(0, stage.clone());
        }
        tracing::info!(
            stage = stage.id(),
            gang = stage.request.gang,
            destination = stage.request.destination.name,
            members = stage.members.len(),
            "staging begins"
        );
        tokio::spawn(fill(stage.clone(), parts.clone()));
        Ok(stage)
    }

    /// A migration has taken a stage and come to nothing: fills it again for the time it has left.
    pub async fn again(self: &Arc<Self>, parts: &Arc<Parts>, stage: &Stage) {
        let left = stage.expires.saturating_duration_since(Instant::now());
        if left < WORTH_AGAIN {
            return;
        }
        let request = PrepareRequest {
            time: left,
            ..stage.request.clone()
        };
        if let Err(error) = self.prepare(parts, request).await {
            let error = error.sentence();
            tracing::warn!(
                error,
                "the gang is not staged again after its migration failed"
            );
        }
    }

    fn check_room(&self, request: &PrepareRequest) -> Result<(), ServiceError> {
        check_other(&self.outgoing(), request)
    }
}

fn check_other(stages: &[Arc<Stage>], request: &PrepareRequest) -> Result<(), ServiceError> {
    let mut live = stages.iter().filter(|stage| stage.is_live());
    if let Some(other) = live
        .clone()
        .find(|stage| stage.request.gang == request.gang)
    {
        return Err(ServiceError::Busy(format!(
            "the gang '{}' is prepared for {} already, by the stage {id}; drop that first with `vmgang abort {id}`",
            request.gang,
            other.request.destination.name,
            id = other.id()
        )));
    }
    if live.nth(STAGES_MAX - 1).is_some() {
        return Err(ServiceError::Busy(format!(
            "{STAGES_MAX} gangs are prepared at the same time already; drop one with `vmgang abort`"
        )));
    }
    Ok(())
}

async fn members(parts: &Parts, gang: &str) -> Result<Vec<DomainInfo>, ServiceError> {
    let domains = ask(&parts.hypervisor, |hypervisor| hypervisor.domains()).await?;
    let mut members = gangs::select(&Selection::Gang(gang.to_owned()), &domains)?;
    members.truncate(MEMBERS_MAX);
    Ok(members)
}

/// Fills a stage and keeps it fresh, to its end.
async fn fill(stage: Arc<Stage>, parts: Arc<Parts>) {
    let mut stop = stage.stop.subscribe();
    let expires = tokio::time::Instant::from_std(stage.expires);
    let ended = tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => None,
        () = tokio::time::sleep_until(expires) => None,
        error = keep_fresh(&stage, &parts) => Some(error),
    };
    // What is under way has the session no longer than for a frame.
    let session = stage.session.lock().await.take();
    drop(session);
    stage.end(ended.clone());
    let view = stage.view();
    tracing::info!(
        stage = view.id,
        gang = view.gang,
        contents = view.contents,
        wire_bytes = view.wire_bytes,
        error = ended,
        "staging ends"
    );
}

/// Returns why it cannot go on.
async fn keep_fresh(stage: &Arc<Stage>, parts: &Arc<Parts>) -> String {
    let mut first = true;
    loop {
        let mut looked = Duration::ZERO;
        if !parts.scans.is_quiet() {
            match refresh(stage, parts, first).await {
                Ok(took) => looked = took,
                Err(error) => return error,
            }
            first = false;
        }
        let pause = tokio::time::sleep(REFRESH_INTERVAL.max(looked * REFRESH_TIMES));
        let watch = stage.session.lock().await.as_ref().map(|s| s.watch_end());
        match watch {
            None => return "its session is over".to_owned(),
            Some(mut ended) => {
                tokio::select! {
                    () = pause => {}
                    ended = ended.wait_for(|ended| ended.is_some()) => {
                        let why = ended.ok().and_then(|why| why.clone());
                        return why.unwrap_or_else(|| "its session is over".to_owned());
                    }
                }
            }
        }
    }
}

/// Brings the stage up to date. Returns how long it has looked at the guests.
async fn refresh(stage: &Arc<Stage>, parts: &Arc<Parts>, first: bool) -> Result<Duration, String> {
    let said = |error: ServiceError| error.sentence().to_owned();
    let members = members(parts, &stage.request.gang).await.map_err(said)?;
    let uuids: Vec<Uuid> = members.iter().map(|member| member.uuid).collect();
    if first {
        // What changes all the time is told from what stays by a second look.
        scan(stage, parts, &uuids).await?;
        tokio::time::sleep(FIRST_LOOK).await;
    }
    let began = Instant::now();
    let scans = scan(stage, parts, &uuids).await?;
    let looked = began.elapsed();
    let snapshots: Vec<Arc<Snapshot>> = scans.iter().map(|scan| scan.snapshot.clone()).collect();
    let by_worth = blocking(move || {
        let snapshots: Vec<&Snapshot> = snapshots.iter().map(AsRef::as_ref).collect();
        Census::of(&snapshots).by_worth()
    })
    .await?;
    let room = with_session(stage, |session| session.room_bytes()).await?;
    let room = usize::try_from(room / PAGE_BYTES as u64).unwrap_or(usize::MAX);
    let wanted: Vec<Content> = by_worth
        .into_iter()
        .filter(|content| content.stable > 0 || content.pages > 1)
        .take(room)
        .collect();
    let missing = |wanted: &[Content], session: &StageSession| -> Vec<Content> {
        let missing = wanted
            .iter()
            .filter(|content| !session.has(&content.digest));
        missing.copied().collect()
    };
    let mut absent = with_session(stage, |session| {
        session.want(&wanted);
        missing(&wanted, session)
    })
    .await?;
    stage.lock().state = StageState::Staging;
    show(stage, absent.len()).await?;
    if with_session(stage, |session| session.may_find_contents()).await? {
        let digests: Vec<PageDigest> = absent.iter().map(|content| content.digest).collect();
        let session = stage.session.lock().await;
        let Some(session) = session.as_ref() else {
            return Err(taken());
        };
        session.offer(&digests).await;
        absent = missing(&wanted, session);
    }
    let mut left = absent.len();
    for some in absent.chunks(STAGE_PAGES_MAX) {
        let (some, memories) = (some.to_vec(), memories(&scans));
        let (pages, digests) = blocking(move || copy(&some, &memories)).await?;
        {
            let session = stage.session.lock().await;
            let Some(session) = session.as_ref() else {
                return Err(taken());
            };
            let sent = session.send(pages, digests).await;
            sent.map_err(|error| session.ended().unwrap_or_else(|| error.to_string()))?;
        }
        left = left.saturating_sub(STAGE_PAGES_MAX);
        show(stage, left).await?;
    }
    let mut view = stage.lock();
    view.state = StageState::Fresh;
    view.refreshed_unix_s = unix_seconds();
    Ok(looked)
}

fn taken() -> String {
    "a migration has taken it".to_owned()
}

type Memories = Vec<Arc<dyn crate::guests::GuestRam>>;

fn memories(scans: &[Scan]) -> Memories {
    scans.iter().map(|scan| scan.memory.clone()).collect()
}

/// Copies of pages, each with the digest that it had when it was scanned.
fn copy(contents: &[Content], memories: &Memories) -> (Vec<u8>, Vec<PageDigest>) {
    let mut pages = Vec::with_capacity(contents.len() * PAGE_BYTES);
    let mut digests = Vec::with_capacity(contents.len());
    let mut page = [0; PAGE_BYTES];
    for content in contents {
        let place = content.place;
        let memory = memories.get(usize::from(place.member.0));
        let read = memory.map(|memory| {
            memory.read_page(usize::from(place.block), place.page as usize, &mut page)
        });
        if let Some(Ok(())) = read {
            pages.extend_from_slice(&page);
            digests.push(content.digest);
        }
    }
    (pages, digests)
}

async fn scan(stage: &Stage, parts: &Arc<Parts>, uuids: &[Uuid]) -> Result<Vec<Scan>, String> {
    let key = with_session(stage, |session| session.page_key().clone()).await?;
    let (scans, uuids) = (parts.scans.clone(), uuids.to_vec());
    let scanned = blocking(move || scans.scan_now(&uuids, &key, Duration::ZERO)).await?;
    let mut good = Vec::new();
    let mut problem = None;
    for scan in scanned {
        match scan {
            Ok(scan) => good.push(scan),
            Err(error) => problem = Some(error),
        }
    }
    // Guests may go while they are looked at; without any there is nothing to stage.
    match (good.is_empty(), problem) {
        (true, Some(problem)) => Err(format!("no member of the gang can be scanned: {problem}")),
        _ => Ok(good),
    }
}

async fn with_session<T>(
    stage: &Stage,
    look: impl FnOnce(&StageSession) -> T,
) -> Result<T, String> {
    stage
        .session
        .lock()
        .await
        .as_ref()
        .map(look)
        .ok_or_else(taken)
}

async fn show(stage: &Stage, remaining: usize) -> Result<(), String> {
    let counters = with_session(stage, |session| session.counters()).await?;
    let mut view = stage.lock();
    view.contents = counters.sent + counters.found;
    view.found = counters.found;
    view.wire_bytes = counters.wire_bytes;
    view.remaining_bytes = (remaining * PAGE_BYTES) as u64;
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let failed = |error| format!("staging failed ({error}); see the log of vmgangd");
    tokio::task::spawn_blocking(work).await.map_err(failed)
}
