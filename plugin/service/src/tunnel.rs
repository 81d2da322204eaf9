//! The transfer engine's source half as a trait, so that jobs are tested without a peer.
//! Nothing is decided here: every method is one call of the engine.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::mpsc::UnboundedReceiver;
use vmgang_dedup::PageDigest;
use vmgang_engine::{
    MemberOutcome, SessionCounters, SessionEnd, SourceError, SourceEvent, SourceOptions,
    SourceSession,
};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
pub type Opened = (Box<dyn Session>, UnboundedReceiver<SourceEvent>);

/// Opens sessions with peers.
pub trait Tunnel: Send + Sync + 'static {
    fn connect(&self, options: SourceOptions) -> BoxFuture<'_, Result<Opened, SourceError>>;
}

/// Offers contents; see [`vmgang_engine::Offers::offer`].
pub type OfferContents = dyn FnOnce(Vec<PageDigest>) -> BoxFuture<'static, usize> + Send;

/// One open session; see [`SourceSession`] for what each method does.
pub trait Session: Send + Sync + 'static {
    fn migrate_uri(&self, member: usize) -> String;
    fn release_member(&self, member: usize);
    fn restart_member(&self, member: usize);
    /// Nobody connects to the member's socket any more: without a connection it cannot migrate.
    fn close_socket(&self, member: usize);
    fn set_bandwidth(&self, bytes_per_s: Option<u64>);
    fn counters(&self) -> SessionCounters;
    fn member_outcome(
        &self,
        member: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>>;
    fn has_stage(&self) -> bool;
    fn may_find_contents(&self) -> bool;
    /// What offers contents, also while others use the session.
    fn offers(&self) -> Box<OfferContents>;
    fn close(self: Box<Self>) -> BoxFuture<'static, SessionEnd>;
}

/// The real engine.
pub struct Engine;

impl Tunnel for Engine {
    fn connect(&self, options: SourceOptions) -> BoxFuture<'_, Result<Opened, SourceError>> {
        Box::pin(async move {
            let (session, events) = SourceSession::connect(options).await?;
            Ok((Box::new(session) as Box<dyn Session>, events))
        })
    }
}

impl Session for SourceSession {
    fn migrate_uri(&self, member: usize) -> String {
        SourceSession::migrate_uri(self, member)
    }

    fn release_member(&self, member: usize) {
        SourceSession::release_member(self, member);
    }

    fn close_socket(&self, member: usize) {
        SourceSession::close_socket(self, member);
    }

    fn restart_member(&self, member: usize) {
        SourceSession::restart_member(self, member);
    }

    fn set_bandwidth(&self, bytes_per_s: Option<u64>) {
        SourceSession::set_bandwidth(self, bytes_per_s);
    }

    fn counters(&self) -> SessionCounters {
        SourceSession::counters(self)
    }

    fn member_outcome(
        &self,
        member: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>> {
        Box::pin(SourceSession::member_outcome(self, member))
    }

    fn has_stage(&self) -> bool {
        SourceSession::has_stage(self)
    }

    fn may_find_contents(&self) -> bool {
        SourceSession::may_find_contents(self)
    }

    fn offers(&self) -> Box<OfferContents> {
        let offer = self.offers();
        Box::new(move |digests| Box::pin(offer.offer(digests)))
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, SessionEnd> {
        Box::pin(SourceSession::close(*self))
    }
}
