//! One thread of an engine's team, and how long it waits for the others.

use std::ffi::c_void;
use std::time::Duration;

use crate::error::Result;

/// The engine's barrier: returns when every thread of the team has called it as often as this one.
pub type BarrierCallback = unsafe extern "C" fn(ctx: *mut c_void);

/// One thread of an engine's team, of which every thread enters.
#[derive(Clone, Copy, Debug)]
pub struct TeamMember {
    pub(super) index: i32,
    pub(super) size: i32,
    pub(super) barrier: Option<BarrierCallback>,
    ctx: *mut c_void,
}

impl TeamMember {
    /// Member `index` of `size`. Without a barrier members wait in the library's own way.
    ///
    /// # Safety
    /// `barrier` does what [`BarrierCallback`] says with `ctx`, for all members of the team, and does not unwind.
    pub unsafe fn new(index: i32, size: i32, barrier: Option<BarrierCallback>, ctx: *mut c_void) -> TeamMember {
        TeamMember { index, size, barrier, ctx }
    }

    /// Tells barriers apart; 0: none.
    pub(super) fn barrier_address(&self) -> usize {
        self.barrier.map_or(0, |barrier| barrier as usize)
    }

    /// Whether this member leads the team.
    pub fn leads(&self) -> bool {
        self.index == 0
    }

    pub(super) fn wait_for_all(&self) {
        if let Some(barrier) = self.barrier {
            // SAFETY: `new` demands a barrier that does with `ctx` what its type says; all members are here, and each calls it
            // as often.
            unsafe { barrier(self.ctx) };
        }
    }
}

/// How members wait until all have come.
pub struct MemberWait<'a> {
    /// How long.
    pub timeout: Duration,
    /// The field that holds the timeout.
    pub field: &'static str,
    /// An error where there is nothing to wait for any more.
    pub check: &'a dyn Fn() -> Result<()>,
}
