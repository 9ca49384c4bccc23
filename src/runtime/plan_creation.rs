//! How plans are made: what the ranks agree on, and in which order.

use std::sync::atomic::Ordering;

use super::agreement;
use super::communicator::Communicator;
use super::plan::{Plan, PlanCore, explain_timeout};
use crate::attention::AttentionDesc;
use crate::device::spawn_scoped;
use crate::error::{Error, ErrorKind, Result};

/// The cure where one thread makes the plans of several ranks, one after the other.
const CREATION_BY_ONE_THREAD: &str = "a call makes the plan of one rank and waits for the others, so ranks of one process need a \
                                      thread each, or treeattn_plan_create_all makes all of their plans";

impl Plan {
    /// A plan of this rank. Collective: every rank calls it, each from a thread of its own; blocks until all have.
    ///
    /// A difference between the ranks' descriptors is `Mismatch` on every rank, naming the field.
    pub fn create(comm: &Communicator, desc: &AttentionDesc) -> Result<Plan> {
        let core = &comm.core;
        core.check_open()?;
        core.check_unbroken()?;
        let _exchanging = core.begin_creation()?;
        let built = PlanCore::build(core, desc);
        if core.shard().world == 1 {
            return Ok(Plan::commit(built?));
        }
        // A rank that fails here still takes part, so that its peers hear of it at once.
        let more = built.as_ref().map(|plan| plan.route.agreement());
        let mine = agreement::encode(core.plans.load(Ordering::Relaxed), desc, more);
        let blobs = core.rank.bootstrap().allgather(&mine).map_err(|error| match core.group {
            0 => error,
            _ => explain_timeout(error, CREATION_BY_ONE_THREAD),
        })?;
        let plan = built?;
        agreement::compare(&blobs)?;
        plan.route.connect(&plan.context)?;
        Ok(Plan::commit(plan))
    }

    /// The same for all ranks of a local group from one thread. `comms` holds every rank once.
    pub fn create_all(comms: &[&Communicator], desc: &AttentionDesc) -> Result<Vec<Plan>> {
        let Some(first) = comms.first() else {
            return Err(Error::invalid("n", 0, "every rank of the group"));
        };
        let world = first.world();
        let mut seen = vec![false; world as usize];
        for comm in comms {
            comm.core.check_open()?;
            comm.core.check_unbroken()?;
            let rank = comm.rank() as usize;
            let fresh = seen.get_mut(rank).is_some_and(|seen| !std::mem::replace(seen, true));
            if comm.core.group == 0 || comm.core.group != first.core.group || !fresh {
                let found = format!("rank {rank} of another group, or twice");
                return Err(Error::invalid("comms", found, "every rank of one local group, once"));
            }
        }
        if comms.len() != world as usize {
            return Err(Error::invalid("n", comms.len(), format!("{world}, every rank of the group")));
        }
        let next = first.core.plans.load(Ordering::Relaxed);
        if let Some(odd) = comms.iter().find(|comm| comm.core.plans.load(Ordering::Relaxed) != next) {
            let found = odd.core.plans.load(Ordering::Relaxed);
            let message = format!("comms: found {found} plans on rank {}, wanted {next} as on rank 0", odd.rank());
            return Err(Error::new(ErrorKind::Mismatch, message).with_rank(odd.rank()));
        }
        let _exchanging: Vec<_> = comms.iter().map(|comm| comm.core.begin_creation()).collect::<Result<_>>()?;
        let built: Vec<PlanCore> = comms.iter().map(|comm| PlanCore::build(&comm.core, desc)).collect::<Result<_>>()?;
        connect_all(&built)?;
        Ok(built.into_iter().map(Plan::commit).collect())
    }
}

/// The collective part of making the plans of all ranks of a group, which wait for each other: a thread each.
fn connect_all(plans: &[PlanCore]) -> Result<()> {
    if !plans.iter().any(|plan| plan.route.connects()) {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let connect = |plan: &PlanCore| plan.route.connect(&plan.context);
        let threads: Vec<_> = plans
            .iter()
            .map(|plan| spawn_scoped(scope, "treeattn-connect", move || connect(plan)))
            .collect::<Result<_>>()?;
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(panicked())))
    })
}

fn panicked() -> Error {
    Error::new(ErrorKind::Internal, "plan: a thread that connected a rank panicked")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::CommConfig;
    use crate::runtime::{Device, Runtime, RuntimeConfig};

    /// Ranks number their plans alike, or would exchange steps of one with those of another.
    #[test]
    fn plans_of_ranks_that_have_made_different_numbers_of_them_are_a_mismatch() {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let comms = Communicator::create_local(&runtime, &[Device::CPU; 3], &CommConfig::default()).unwrap();
        let all: Vec<&Communicator> = comms.iter().collect();
        let desc = AttentionDesc::new(2, 1, 8, 4);
        assert!(Plan::create_all(&all, &desc).unwrap().iter().all(|plan| plan.stats().unwrap().plan == 1));
        comms[2].core.plans.store(4, Ordering::Relaxed);
        let error = Plan::create_all(&all, &desc).map(drop).unwrap_err();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(2)));
        assert_eq!(error.message(), "comms: found 4 plans on rank 2, wanted 1 as on rank 0");
        comms[2].core.plans.store(1, Ordering::Relaxed);
        assert!(Plan::create_all(&all, &desc).unwrap().iter().all(|plan| plan.stats().unwrap().plan == 2));
    }
}
