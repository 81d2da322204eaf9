//! The transfer engine's source half as a trait, so that jobs are tested without a peer.
//! Nothing is decided here: every method is one call of the engine.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::mpsc::UnboundedReceiver;
use vmgang_engine::{
    MemberOutcome, SessionCounters, SourceError, SourceEvent, SourceOptions, SourceSession,
};

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
pub type Opened = (Box<dyn Session>, UnboundedReceiver<SourceEvent>);

/// Opens sessions with peers.
pub trait Tunnel: Send + Sync + 'static {
    fn connect(&self, options: SourceOptions) -> BoxFuture<'_, Result<Opened, SourceError>>;
}

/// One open session; see [`SourceSession`] for what each method does.
pub trait Session: Send + Sync + 'static {
    fn migrate_uri(&self, member: usize) -> String;
    fn release(&self);
    fn release_member(&self, member: usize);
    fn set_bandwidth(&self, bytes_per_s: Option<u64>);
    fn counters(&self) -> SessionCounters;
    fn member_outcome(
        &self,
        member: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>>;
    fn close(self: Box<Self>) -> BoxFuture<'static, SessionCounters>;
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

    fn release(&self) {
        SourceSession::release(self);
    }

    fn release_member(&self, member: usize) {
        SourceSession::release_member(self, member);
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

    fn close(self: Box<Self>) -> BoxFuture<'static, SessionCounters> {
        Box::pin(SourceSession::close(*self))
    }
}
