//! One rank's end of a group of GPUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::exits::Exits;
use super::nodes::Nodes;
use super::windows::Windows;
use crate::attention::Shard;
use crate::comm::bootstrap::Bootstrap;
use crate::comm::config::CommConfig;
use crate::comm::errors;
use crate::comm::plan_words::PlanWords;
use crate::error::{Error, ErrorKind, LateError, Result};
use crate::partial::view::host;
use crate::partial::word::Failure;
use crate::partial::{DataFault, ExchangeView};

/// One rank's end of a group of GPUs.
pub(crate) struct GpuRank {
    bootstrap: Box<dyn Bootstrap>,
    rank: usize,
    nodes: Nodes,
    /// The ranks of this one's node, whose windows there are, and its place among them.
    neighbours: Vec<usize>,
    place: usize,
    step_timeout: Duration,
    /// The windows of the node, or why there are none on some node: then only steps without an exchange, or over NCCL, are
    /// possible.
    windows: Result<Arc<Windows>>,
    /// Where kernels of plans over NCCL tell of failures.
    plans: OnceLock<Arc<PlanWords>>,
    error: Mutex<Option<Error>>,
    is_gone: AtomicBool,
    /// Ends before the windows do.
    _exits: Option<Exits>,
}

impl GpuRank {
    /// The end of a rank that sees `nodes`, with the windows of its node. Ranks of other processes are watched from now on.
    pub fn new(
        bootstrap: Box<dyn Bootstrap>,
        nodes: Nodes,
        windows: Result<Arc<Windows>>,
        config: &CommConfig,
    ) -> Result<GpuRank> {
        let (rank, place) = (bootstrap.shard().rank as usize, nodes.place());
        let exits = match &windows {
            Ok(windows) => Exits::watch(windows, place)?,
            Err(_) => None,
        };
        Ok(GpuRank {
            rank,
            bootstrap,
            neighbours: nodes.neighbours(),
            nodes,
            place,
            step_timeout: config.step_timeout,
            windows,
            plans: OnceLock::new(),
            error: Mutex::new(None),
            is_gone: AtomicBool::new(false),
            _exits: exits,
        })
    }

    /// What a kernel of this rank is told; the step's own fields are still to be filled in. The error that says why there
    /// are no windows.
    pub fn view(&self) -> Result<ExchangeView> {
        let windows = self.windows.as_ref().map_err(Clone::clone)?;
        Ok(windows.view(self.place, self.step_timeout))
    }

    /// Has failures that kernels of plans note in `plans` break the communicator. Once.
    pub fn watch(&self, plans: &Arc<PlanWords>) {
        self.plans.get_or_init(|| Arc::clone(plans));
    }

    /// The windows, which live as long as somebody has them.
    pub fn windows(&self) -> Option<&Arc<Windows>> {
        self.windows.as_ref().ok()
    }

    /// Which ranks share a node.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// The rank at `place` of this node.
    fn rank_at(&self, place: usize) -> usize {
        self.neighbours.get(place).copied().unwrap_or(self.rank)
    }

    /// Most payload of this rank in one exchange, bytes.
    pub fn capacity(&self) -> usize {
        self.windows().map_or(0, |windows| windows.capacity())
    }

    /// Where the attention kernel of this rank leaves the bad data of a step; 0 without windows.
    pub fn fault_address(&self) -> u64 {
        self.windows().map_or(0, |windows| windows.fault_address(self.place))
    }

    /// The bad data that steps have met on some rank since the last time, if any. Waits for nothing.
    pub fn take_fault(&self) -> Option<(i32, DataFault)> {
        let words = self.windows()?.words(self.place);
        let (place, fault) = DataFault::from_told(words.take_told(host::BAD_DATA, host::BAD_DATA + host::TAKEN_AFTER))?;
        Some((usize::try_from(place).map_or(place, |place| self.rank_at(place) as i32), fault))
    }

    /// What this rank's kernels said when they gave up.
    fn failure(&self) -> Option<Error> {
        let over_windows = self.windows().map_or(0, |windows| windows.words(self.place).load(host::FAILURE));
        let over_nccl = || self.plans.get().map_or(0, |plans| plans.failure());
        let Failure { code, rank, epoch } = if over_windows != 0 {
            let failure = Failure::from_word(over_windows);
            Failure { rank: self.rank_at(failure.rank), ..failure }
        } else {
            Some(over_nccl()).filter(|&word| word != 0).map(Failure::from_word)?
        };
        let what = format!("exchange {epoch}");
        Some(match ErrorKind::from_code(i32::from(code)) {
            Some(ErrorKind::Timeout) => errors::timeout(&what, &[rank], "step_timeout_ns", self.step_timeout),
            Some(ErrorKind::PeerLost) => errors::peer_lost(&what, rank),
            Some(ErrorKind::Desync) => errors::out_of_step(&what, rank),
            Some(ErrorKind::Aborted) => errors::aborted(rank),
            kind => {
                let message = format!("{what}: rank {rank} could not go on; the communicator is broken");
                Error::new(kind.unwrap_or(ErrorKind::Internal), message).with_rank(rank as i32)
            }
        })
    }

    /// Ends the waits of all ranks' kernels with `code`.
    fn end_all(&self, code: ErrorKind) {
        if let Some(windows) = self.windows() {
            windows.end_all(self.failure_word(code));
        }
    }

    /// Ends the waits of this rank's own kernels: the communicator broke on another node, with `error`.
    pub fn end_own(&self, error: &Error) {
        if let Some(windows) = self.windows() {
            windows.words(self.place).raise(host::COMMAND, self.failure_word(error.kind()));
        }
    }

    /// A failure of this rank, as kernels tell it.
    fn failure_word(&self, code: ErrorKind) -> u64 {
        Failure { code: code.code() as u8, rank: self.place, epoch: 0 }.word()
    }

    /// Whether this rank has left.
    pub fn has_left(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    /// The first error: that of this end, what its kernels said, or `other`.
    fn latched(&self, other: Option<Error>) -> Option<Error> {
        let mut latched = self.error.lock();
        if latched.is_none() {
            // Its kernels tell the peers that this rank is lost.
            let of_leaving = |error: Error| match self.has_left() && error.rank() == Some(self.rank as i32) {
                true => errors::left(self.rank),
                false => error,
            };
            let failure = self.failure().map(of_leaving);
            // Kernels know only the ranks of their node.
            *latched = if self.nodes.count() > 1 { other.or(failure) } else { failure.or(other) };
        }
        latched.clone()
    }
}

impl Bootstrap for GpuRank {
    fn shard(&self) -> Shard {
        self.bootstrap.shard()
    }

    fn window_bytes(&self) -> usize {
        self.windows().map_or(0, |windows| windows.bytes())
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.bootstrap.allgather(blob)
    }

    fn status(&self) -> Option<Error> {
        self.latched(self.bootstrap.status())
    }

    fn abort(&self) {
        // First what runs: the bootstrap may have to call a driver that waits for it.
        self.end_all(ErrorKind::Aborted);
        self.bootstrap.abort();
    }

    fn fail(&self, error: &Error) {
        if self.has_left() {
            // The step ended because this rank left.
            self.error.lock().get_or_insert_with(|| errors::left(self.rank));
            self.end_all(ErrorKind::PeerLost);
            self.bootstrap.fail(error);
        } else if self.status().is_none() {
            self.end_all(error.kind());
            self.bootstrap.fail(error);
        }
    }

    fn left_peer(&self) -> Option<usize> {
        self.bootstrap.left_peer()
    }

    fn leave(&self) {
        if !self.is_gone.swap(true, Ordering::AcqRel) {
            if let Some(windows) = self.windows() {
                windows.leave(self.place, self.failure_word(ErrorKind::PeerLost));
            }
            self.bootstrap.leave();
        }
    }

    fn describe(&self) -> String {
        let shard = self.shard();
        let links: Vec<String> = match &self.windows {
            Ok(windows) => (0..windows.world())
                .filter(|&place| place != self.place)
                .map(|place| {
                    let (peer, kind) = (self.rank_at(place), windows.link(self.place, place));
                    format!(r#"{{"peer":{peer},"device":"{}","kind":"{kind}"}}"#, windows.label(place))
                })
                .collect(),
            Err(_) => Vec::new(),
        };
        let reason = match &self.windows {
            Ok(_) => String::new(),
            Err(error) => format!(r#""no_windows":{:?},"#, error.message()),
        };
        format!(
            concat!(
                r#""kind":"gpu","world":{},"rank":{},"nodes":{:?},{}"capacity_bytes":{},"window_bytes":{},"#,
                r#""setup":{{{}}},"step_timeout_ms":{},"links":[{}]"#
            ),
            shard.world,
            shard.rank,
            self.nodes.by_rank(),
            reason,
            self.capacity(),
            self.window_bytes(),
            self.bootstrap.describe(),
            self.step_timeout.as_millis(),
            links.join(","),
        )
    }
}

/// Of the steps that are enqueued. Unlike the status it is none for a rank that left after its last step.
impl LateError for GpuRank {
    fn late_error(&self) -> Option<Error> {
        match self.has_left() {
            true => self.latched(None),
            false => self.status(),
        }
    }
}

impl Drop for GpuRank {
    fn drop(&mut self) {
        self.leave();
    }
}
