//! What a job is to do where there is a choice: how members are started and let go, and what happens
//! when one fails, does not converge, or takes too long. Pure data; nothing is decided here.

use std::num::NonZeroUsize;

/// Members under way at once unless it is said: libvirtd has 20 workers, and abort and statistics
/// need some.
pub const CONCURRENCY: NonZeroUsize = NonZeroUsize::new(12).unwrap();

/// What a failure before the release does to the other members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// All or nothing.
    #[default]
    Abort,
    /// The failed member is left out, the rest goes on.
    Continue,
}

/// How members are let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Switchover {
    /// All at once, when all have converged: the smallest spread. More than may be under way at once:
    /// each in turn, when it has converged.
    #[default]
    Together,
    /// One by one, when all have converged: each has the whole link for its last pass.
    Staggered,
    /// Each as soon as it has converged. Nobody is held.
    Free,
}

/// What is done about a member that dirties memory as fast as it can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStall {
    /// Its migration begins anew, and QEMU slows its guest down; if that does not help, abort.
    #[default]
    Throttle,
    /// It switches over and fetches the rest of its memory afterwards.
    PostCopy,
    /// It stays behind, the rest goes on.
    Leave,
    /// All stay.
    Abort,
}

/// What is done when the gang was not let go in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnTimeout {
    #[default]
    Abort,
    /// Guests are suspended until they run at the destination.
    Suspend,
    PostCopy,
}

/// All of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    pub on_failure: OnFailure,
    pub on_stall: OnStall,
    pub on_timeout: OnTimeout,
    pub switchover: Switchover,
    /// Members under way at once.
    pub concurrency: NonZeroUsize,
    /// Go to post-copy after the first pass.
    pub post_copy: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            on_failure: OnFailure::default(),
            on_stall: OnStall::default(),
            on_timeout: OnTimeout::default(),
            switchover: Switchover::default(),
            concurrency: CONCURRENCY,
            post_copy: false,
        }
    }
}

impl Policy {
    /// Whether members are held for each other: that takes all of them being under way.
    pub fn holds(&self, members: usize) -> bool {
        self.switchover != Switchover::Free && members <= self.concurrency.get()
    }

    /// Whether members of a gang that is too large to be held leave one after another, each as soon
    /// as it is ready and has its turn.
    pub fn takes_turns(&self, members: usize) -> bool {
        self.switchover != Switchover::Free && !self.holds(members)
    }

    /// Whether migrations are started such that they can go to post-copy.
    pub fn can_post_copy(&self) -> bool {
        self.post_copy
            || self.on_stall == OnStall::PostCopy
            || self.on_timeout == OnTimeout::PostCopy
    }
}
