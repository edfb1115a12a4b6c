//! Keeps `SQLite` whole over a fork.
//!
//! A forked child has the memory of all threads but only the one that forked. Were another thread inside
//! `SQLite` or zstd, its locks would stay locked in the child for ever. Everything of the cache that takes
//! such a lock happens inside a gate, which a fork closes first.

use std::cell::RefCell;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static GATE: RwLock<()> = RwLock::new(());

thread_local! {
    static CLOSED: RefCell<Option<RwLockWriteGuard<'static, ()>>> = const { RefCell::new(None) };
}

/// Stay of a thread inside the gate; not to be nested.
pub(super) fn enter() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}

/// To be called by a thread that is about to fork: waits until no thread is inside a cache.
pub fn before_fork() {
    CLOSED.with_borrow_mut(|closed| {
        if closed.is_none() {
            *closed = Some(GATE.write().unwrap_or_else(PoisonError::into_inner));
        }
    });
}

/// To be called by that thread after the fork, in the parent and in the child.
pub fn after_fork() {
    CLOSED.take();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_opens_again() {
        before_fork();
        before_fork();
        after_fork();
        after_fork();
        drop(enter());
    }
}
