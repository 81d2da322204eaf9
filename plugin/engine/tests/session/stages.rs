//! Contents that are at the destination before they are sent: staged, or found there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use uuid::Uuid;
use vmgang_dedup::{BlockSnapshot, Page, PageDigest, Snapshot};
use vmgang_engine::{
    PageKey, Recall, Scanned, SessionCounters, SourceError, SourceEvent, SourceOptions,
    SourceSession, StageOptions, StageSession, Transport,
};
use vmgang_stream::synthetic::StreamBuilder;
use vmgang_wire::{Frame, FrameHeader, HEADER_BYTES, Have, Kind};

use crate::pair::{Pair, SOON, event, page, swallow};

const STAGE: Uuid = Uuid::from_u128(0x57a6e);
const PAGES: u64 = 600;

fn page_key() -> PageKey {
    Transport::Plain.page_key()
}

/// The memory of a guest: nothing compresses, and every page is its own, but for its neighbours'
/// first ten.
fn guest(member: usize) -> Vec<Option<Page>> {
    (0..PAGES)
        .map(|i| match i {
            0..10 => Some(page(i)),
            _ if i % 7 == 0 => None,
            _ => Some(page(i + 10_000 * (member as u64 + 1))),
        })
        .collect()
}

fn snapshot(pages: &[Option<Page>]) -> Snapshot {
    let key = page_key();
    let prints = key.fingerprinter();
    let mut block = BlockSnapshot::new("pc.ram", pages.len());
    for (number, page) in pages.iter().enumerate() {
        if let Some(page) = page {
            let digest = PageDigest::of(key.digest_key(), page);
            block.set_content(number, prints.of(page), digest);
        }
    }
    let mut snapshot = Snapshot::new(vec![block]);
    snapshot.scanned();
    snapshot
}

fn scanned(guests: &[Vec<Option<Page>>]) -> Scanned {
    let snapshots = guests.iter().map(|guest| Some(Arc::new(snapshot(guest))));
    Scanned::new(&page_key(), snapshots.collect())
}

fn stage_options(pair: &Pair, members: usize) -> StageOptions {
    let options = pair.options(members, Transport::Plain);
    let mut offer = options.offer;
    offer.job = STAGE;
    StageOptions {
        peer: options.peer,
        transport: options.transport,
        offer,
        seconds: 60,
        techniques: options.techniques,
        workers: options.workers,
        network: options.network,
        bandwidth_bytes_per_s: None,
    }
}

/// Stages everything that these guests have.
async fn stage_all(stage: &StageSession, guests: &[Vec<Option<Page>>]) -> usize {
    let mut staged = 0;
    for guest in guests {
        for pages in guest.iter().flatten().collect::<Vec<_>>().chunks(64) {
            let digest = |page: &&Page| PageDigest::of(page_key().digest_key(), page);
            let digests = pages.iter().map(digest).collect();
            let pages = pages.iter().flat_map(|page| page.iter().copied());
            let sent = stage.send(pages.collect(), digests).await;
            staged += sent.unwrap_or_else(|error| panic!("{error}: {:?}", stage.ended()));
        }
    }
    staged
}

/// Migrates guests as they are now; returns the counters, once they have arrived byte-exact.
async fn migrate(
    pair: &Pair,
    options: SourceOptions,
    guests: &[Vec<Option<Page>>],
    offer: bool,
) -> (SessionCounters, bool) {
    let digests: Vec<_> = match options.scanned.census() {
        Some(census) => census.by_worth().iter().map(|of| of.digest).collect(),
        None => Vec::new(),
    };
    let (session, mut events) = SourceSession::connect(options).await.expect("accepted");
    let has_stage = session.has_stage();
    if offer {
        session.offers().offer(digests).await;
    }
    run(pair, &session, &mut events, guests)
        .await
        .expect("migrated");
    (session.close().await.counters, has_stage)
}

/// Sends the guests' streams and compares what arrives; the error is why the session ended.
async fn run(
    pair: &Pair,
    session: &SourceSession,
    events: &mut mpsc::UnboundedReceiver<SourceEvent>,
    guests: &[Vec<Option<Page>>],
) -> Result<(), String> {
    let mut arriving = Vec::new();
    for (member, guest) in guests.iter().enumerate() {
        let qemu = pair.destination_qemu(member);
        let bytes = StreamBuilder::migration(guest, &[]);
        let mut source = pair.source_qemu(session, member).await;
        let wanted = bytes.clone();
        tokio::spawn(async move {
            let _ = source.write_all(&bytes).await;
            let _ = source.shutdown().await;
            tokio::time::sleep(SOON).await;
        });
        arriving.push(tokio::spawn(async move {
            assert!(
                swallow(qemu, b"").await == wanted,
                "member {member} differs"
            );
        }));
    }
    let mut ended = 0;
    while ended < guests.len() {
        let next = tokio::time::timeout(SOON, events.recv()).await;
        match next.expect("in time").expect("an event") {
            SourceEvent::StreamEnded { .. } => ended += 1,
            SourceEvent::SessionFailed { error } | SourceEvent::MemberFailed { error, .. } => {
                return Err(error);
            }
            _ => {}
        }
    }
    for arrived in arriving {
        arrived.await.expect("arrived");
    }
    Ok(())
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect(what);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_staged_is_not_sent_again() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut guests = vec![guest(0), guest(1)];
    let stage = StageSession::connect(stage_options(&pair, 2))
        .await
        .expect("accepted");
    let staged = stage_all(&stage, &guests).await;
    let distinct = guests.iter().flatten().flatten().count() - 10;
    assert_eq!(staged, distinct, "each content once");
    assert_eq!(stage_all(&stage, &guests).await, 0, "and not again");
    until("all have arrived", || {
        pair.host.staged.lock().unwrap().0 == distinct as u64
    })
    .await;

    // One page is written to, another one gets what nobody has had.
    let taken_at = scanned(&guests);
    if let Some(page) = &mut guests[1][20] {
        page[100] ^= 1;
    }
    guests[0][30] = Some(page(77_777));
    let mut options = pair.options(2, Transport::Plain);
    options.scanned = taken_at;
    options.stage = Some(stage.into_contents());
    let (counters, has_stage) = migrate(&pair, options, &guests, false).await;
    assert!(has_stage);
    let saved = counters.saved;
    let pages = guests.iter().flatten().flatten().count() as i64;
    assert!(saved.staged > (pages - 3) * 4090, "{saved:?}");
    // The written page is a delta to itself, the new one crosses in full.
    assert!(saved.delta > 4000, "{saved:?}");
    assert!(counters.wire_bytes < 30_000, "{counters:?}");
    assert_eq!(
        saved.total(),
        counters.qemu_stream_bytes as i64 - counters.wire_bytes as i64
    );
    // The stage's session is over as well.
    until("the stage has ended", || {
        pair.host.ended.lock().unwrap().contains(&STAGE)
    })
    .await;
}

/// A page that was written to between the scan and the copy is another content.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_is_not_what_was_wanted_is_not_staged() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let stage = StageSession::connect(stage_options(&pair, 1))
        .await
        .expect("accepted");
    let digests = [1, 2].map(|seed| PageDigest::of(page_key().digest_key(), &page(seed)));
    let pages = [page(1), page(3)].concat();
    assert_eq!(stage.send(pages, digests.to_vec()).await.expect("sent"), 1);
    assert!(stage.has(&digests[0]) && !stage.has(&digests[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_is_gone_only_costs_bytes() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let other = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    let stage = StageSession::connect(stage_options(&other, 1))
        .await
        .expect("accepted");
    stage_all(&stage, &guests).await;
    let mut options = pair.options(1, Transport::Plain);
    options.scanned = scanned(&guests);
    options.stage = Some(stage.into_contents());
    let (counters, has_stage) = migrate(&pair, options, &guests, false).await;
    assert!(!has_stage, "it was staged at another host");
    assert_eq!(counters.saved.staged, 0);
    assert!(counters.wire_bytes > (PAGES - PAGES / 7 - 10) * 4096);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_ends_with_its_source() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let stage = StageSession::connect(stage_options(&pair, 1))
        .await
        .expect("accepted");
    stage_all(&stage, &[guest(0)]).await;
    assert_eq!(stage.ended(), None);
    drop(stage);
    until("it is freed", || {
        pair.host.ended.lock().unwrap().contains(&STAGE)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_has_no_more_than_its_window() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let stage = StageSession::connect(stage_options(&pair, 1))
        .await
        .expect("accepted");
    let slots = stage.room_bytes() / 4096;
    // Beyond that the oldest makes room, slot by slot.
    stage_all(&stage, &[guest(0)]).await;
    until("all have arrived", || {
        pair.host.staged.lock().unwrap().0 > slots
    })
    .await;
    assert_eq!(stage.ended(), None);
    let guests = vec![guest(0)];
    let mut options = pair.options(1, Transport::Plain);
    options.stage = Some(stage.into_contents());
    let (counters, has_stage) = migrate(&pair, options, &guests, false).await;
    assert!(has_stage && counters.saved.staged >= 0);
}

/// What has left is still known here, all of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_leaves_what_it_has_sent() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    let digests: Vec<PageDigest> = guests[0]
        .iter()
        .flatten()
        .map(|page| PageDigest::of(page_key().digest_key(), page))
        .collect();
    let mut options = pair.options(1, Transport::Plain);
    options.techniques = "default".parse().unwrap();
    options.keep_contents = true;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    run(&pair, &session, &mut events, &guests)
        .await
        .expect("migrated");
    let remains = session.close().await.remains.expect("it has a window");
    assert!(digests.iter().all(|digest| remains.get(digest).is_some()));
    assert_eq!(remains.iter().count(), digests.len());
    for (digest, page) in remains.iter() {
        assert_eq!(PageDigest::of(page_key().digest_key(), page), *digest);
    }
}

/// Has some contents, and says of them what it has; of so many before it is asked.
struct Store(HashMap<PageDigest, Page>, usize);

impl Store {
    fn of<'a>(pages: impl IntoIterator<Item = &'a Page>) -> Arc<Store> {
        let digest = |page: &Page| PageDigest::of(page_key().digest_key(), page);
        Arc::new(Store(
            pages
                .into_iter()
                .map(|page| (digest(page), *page))
                .collect(),
            0,
        ))
    }
}

impl Recall for Store {
    fn contents(&self) -> u64 {
        self.0.len() as u64
    }

    fn find(&self, digests: &[PageDigest], found: &mut dyn FnMut(usize, &Page)) {
        for (place, digest) in digests.iter().enumerate() {
            if let Some(page) = self.0.get(digest) {
                found(place, page);
            }
        }
    }

    fn likely(&self, most: usize, found: &mut dyn FnMut(&PageDigest, &Page)) {
        for (digest, page) in self.0.iter().take(most.min(self.1)) {
            found(digest, page);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_destination_has_is_not_sent() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0), guest(1)];
    // All of the first guest runs there already.
    *pair.host.recall.lock().unwrap() = Some(Store::of(guests[0].iter().flatten()));
    let mut options = pair.options(2, Transport::Plain);
    options.scanned = scanned(&guests);
    let (counters, _) = migrate(&pair, options, &guests, true).await;
    let first = guests[0].iter().flatten().count() as i64;
    let saved = counters.saved;
    assert!(saved.destination >= first * 4090, "{saved:?}");
    let second = guests[1].iter().flatten().count() as i64 - 10;
    // Each offer takes 20 bytes.
    let offers = 20 * (first + second + 10) as u64;
    assert!(
        counters.wire_bytes < second as u64 * 4150 + offers,
        "{counters:?}"
    );
}

/// The way back: nobody has scanned the guests, and nothing is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_destination_announces_is_not_sent() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    let store = Arc::into_inner(Store::of(guests[0].iter().flatten())).expect("the only one");
    let store = Store(store.0, usize::MAX);
    *pair.host.recall.lock().unwrap() = Some(Arc::new(store));
    let options = pair.options(1, Transport::Plain);
    let (counters, has_stage) = migrate(&pair, options, &guests, false).await;
    let pages = guests[0].iter().flatten().count();
    assert!(!has_stage);
    assert!(
        counters.saved.destination > pages as i64 * 4090,
        "{counters:?}"
    );
    assert!(
        counters.wire_bytes < pages as u64 * 20 + 8000,
        "{counters:?}"
    );

    // Half of them, in a window that has room for a part of that.
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let store = Store::of(guests[0].iter().flatten().step_by(2));
    let store = Store(Arc::into_inner(store).expect("the only one").0, usize::MAX);
    *pair.host.recall.lock().unwrap() = Some(Arc::new(store));
    let options = pair.options(1, Transport::Plain);
    let (counters, _) = migrate(&pair, options, &guests, false).await;
    assert!(counters.saved.destination > 0, "{counters:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_takes_what_the_destination_has() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    *pair.host.recall.lock().unwrap() = Some(Store::of(guests[0].iter().flatten()));
    let stage = StageSession::connect(stage_options(&pair, 1))
        .await
        .expect("accepted");
    assert!(stage.may_find_contents());
    let census = scanned(&guests);
    let digests: Vec<_> = census
        .census()
        .unwrap()
        .by_worth()
        .iter()
        .map(|of| of.digest)
        .collect();
    assert_eq!(stage.offer(&digests).await, digests.len());
    assert!(digests.iter().all(|digest| stage.has(digest)));
    assert_eq!(
        stage_all(&stage, &guests).await,
        0,
        "nothing is left to be sent"
    );
    let wire = stage.counters().wire_bytes;
    assert!(wire < digests.len() as u64 * 30, "{wire}");
    let mut options = pair.options(1, Transport::Plain);
    options.scanned = census;
    options.stage = Some(stage.into_contents());
    let (counters, has_stage) = migrate(&pair, options, &guests, false).await;
    assert!(has_stage);
    assert!(
        counters.saved.destination > digests.len() as i64 * 4090,
        "{counters:?}"
    );
}

/// Has the right digests with other pages behind them: memory that has changed since.
struct Stale(Arc<Store>);

impl Recall for Stale {
    fn contents(&self) -> u64 {
        self.0.contents()
    }

    fn find(&self, digests: &[PageDigest], found: &mut dyn FnMut(usize, &Page)) {
        self.0.find(digests, &mut |place, page| {
            let mut changed = *page;
            changed[17] ^= 0x40;
            found(place, &changed);
        });
    }

    fn likely(&self, _: usize, _: &mut dyn FnMut(&PageDigest, &Page)) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_changed_at_the_destination_is_sent() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    let store = Store::of(guests[0].iter().flatten());
    *pair.host.recall.lock().unwrap() = Some(Arc::new(Stale(store)));
    let mut options = pair.options(1, Transport::Plain);
    options.scanned = scanned(&guests);
    let (counters, _) = migrate(&pair, options, &guests, true).await;
    assert_eq!(counters.saved.destination, 0);
}

/// Hands frames on both ways, and changes what the destination answers.
async fn relay(to: u16, change: impl Fn(Have) -> Have + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (source, _) = listener.accept().await.unwrap();
        let destination = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
        let (mut from_source, mut to_source) = source.into_split();
        let (mut from_destination, mut to_destination) = destination.into_split();
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_source, &mut to_destination).await;
            let _ = to_destination.shutdown().await;
        });
        use tokio::io::AsyncReadExt;
        loop {
            let mut header = [0; HEADER_BYTES];
            if from_destination.read_exact(&mut header).await.is_err() {
                return;
            }
            let decoded = FrameHeader::decode(&header).unwrap();
            let mut body = vec![0; decoded.body_len as usize];
            from_destination.read_exact(&mut body).await.unwrap();
            let mut bytes = [&header[..], &body].concat();
            if decoded.kind == Kind::Have
                && let Frame::Have(have) = Frame::decode(&decoded, &body).unwrap()
            {
                bytes.clear();
                Frame::Have(change(have)).encode(&mut bytes);
            }
            if to_source.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_claims_what_it_has_not_ends_the_migration_cleanly() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    let half = guests[0].iter().flatten().step_by(2);
    *pair.host.recall.lock().unwrap() = Some(Store::of(half));
    let mut options = pair.options(1, Transport::Plain);
    options.scanned = scanned(&guests);
    options.peer.port = relay(pair.port, |have| Have {
        contents: vec![true; have.contents.len()],
    })
    .await;
    let digests = options.scanned.census().unwrap().by_worth();
    let digests = digests.iter().map(|of| of.digest).collect();
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    session.offers().offer(digests).await;
    let error = run(&pair, &session, &mut events, &guests)
        .await
        .expect_err("it has not");
    assert!(error.contains("was never filled"), "{error}");
    drop(session);
    until("nothing is left", || {
        [&pair.source_dir, &pair.destination_dir].iter().all(|dir| {
            std::fs::read_dir(dir.path().join("migrate"))
                .unwrap()
                .count()
                == 0
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_does_not_fit_its_offer_ends_the_session() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0)];
    *pair.host.recall.lock().unwrap() = Some(Store::of(guests[0].iter().flatten()));
    let mut options = pair.options(1, Transport::Plain);
    options.peer.port = relay(pair.port, |mut have| {
        have.contents.pop();
        have
    })
    .await;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let digests = scanned(&guests).census().unwrap().by_worth();
    let offered = session
        .offers()
        .offer(digests.iter().map(|of| of.digest).collect());
    assert_eq!(offered.await, 0);
    let failed = event(&mut events, |event| {
        matches!(event, SourceEvent::SessionFailed { .. })
    });
    let SourceEvent::SessionFailed { error } = failed.await else {
        unreachable!("it was asked for");
    };
    assert!(error.contains("does not fit"), "{error}");
}

/// Pages that a scan knows are not hashed again: with digests that are not theirs they are sent
/// all the same, and arrive as they are.
#[tokio::test(flavor = "multi_thread")]
async fn a_scans_word_is_taken_while_the_page_is_the_same() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let guests = vec![guest(0), guest(0)];
    // The second guest is the first, but by its scan's account it is another one.
    let key = page_key();
    let prints = key.fingerprinter();
    let mut block = BlockSnapshot::new("pc.ram", PAGES as usize);
    for (number, page) in guests[1].iter().enumerate() {
        if let Some(page) = page {
            block.set_content(number, prints.of(page), PageDigest([number as u8; 16]));
        }
    }
    let honest = Some(Arc::new(snapshot(&guests[0])));
    let odd = Some(Arc::new(Snapshot::new(vec![block])));
    let mut wire = Vec::new();
    for snapshots in [vec![honest.clone(), honest.clone()], vec![honest, odd]] {
        let mut options = pair.options(2, Transport::Plain);
        options.techniques = "page,rehash".parse().unwrap();
        options.scanned = Scanned::new(&key, snapshots);
        let (session, mut events) = SourceSession::connect(options).await.unwrap();
        let ended = run(&pair, &session, &mut events, &guests).await;
        let counters = session.close().await.counters;
        wire.push((ended, counters.wire_bytes));
    }
    let [(Ok(()), same), (other, different)] = &wire[..] else {
        panic!("{wire:?}");
    };
    // 256 digests for 520 pages: some pages are taken for others, which the digest of the frame shows.
    match other {
        Ok(()) => assert!(different > same),
        Err(error) => assert!(error.contains("digest"), "{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_is_refused_like_a_migration() {
    let pair = Pair::new(Transport::Plain, Some("no memory here"), 64 << 20).await;
    let refused = StageSession::connect(stage_options(&pair, 1)).await;
    assert!(
        matches!(&refused, Err(SourceError::Refused { reason, .. }) if reason == "no memory here"),
        "{refused:?}"
    );
}
