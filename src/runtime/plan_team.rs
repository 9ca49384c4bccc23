//! Steps on a team of the engine's threads.

use super::plan::Plan;
use crate::attention::DecodeArgs;
use crate::device::{MemberWait, TeamMember};
use crate::error::{Error, ErrorKind, Result};
use crate::route::backend::Place;

impl Plan {
    /// As [`Plan::decode`] without a stream, on a team of the engine's threads: each of them calls it with its own `member`, and
    /// all leave with the same result. Member 0 computes as the others do, and waits for the other ranks; `args` is asked of it
    /// alone, once all have come. The bits are those of as many threads of the library.
    ///
    /// Members wait for each other, each at most the step deadline: `Timeout` names one that did not come. `InvalidArgument` where
    /// an index or a size is out of range or members do not fit together. The team of a plan that could not meet stays broken
    /// off: later calls return that error.
    ///
    /// # Safety
    /// As [`Plan::decode`], for what `args` gives.
    pub unsafe fn decode_team(&self, member: &TeamMember, args: impl FnOnce() -> Result<DecodeArgs>) -> Result<()> {
        let core = self.attending()?;
        let Some(team) = &core.team else {
            return Err(Error::unsupported("plan", format!("one on {}", core.comm.device), "teams on CPUs only"));
        };
        let check = || {
            core.comm.check_open()?;
            if core.merges() { core.comm.check_unbroken() } else { Ok(()) }
        };
        let wait = MemberWait { timeout: core.context.config.step_timeout, field: "step_timeout_ns", check: &check };
        if !member.leads() {
            return team.serve(member, &wait);
        }
        team.lead(member, &wait, |met| {
            // SAFETY: the caller keeps the arrays that `args` gives valid, and unchanged by others, until the step is done.
            let (step, output) = args().and_then(|args| unsafe { core.decode_step(&args) })?;
            let executor = match met {
                // Members that do not fit together are refused, as is what comes when everything is gone.
                Err(error) if matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::ParentDestroyed) => {
                    return Err(error);
                }
                Err(error) if error.kind() == ErrorKind::Timeout => Err(error.with_rank(core.context.shard.rank)),
                met => met,
            };
            // SAFETY: the step was checked for this plan; the caller keeps its buffers valid until it is done.
            unsafe {
                self.run_here(&output, core.merges(), |plan| {
                    plan.route.decode(&plan.context, &step, Place::Team(executor?))
                })
            }
        })
    }
}
