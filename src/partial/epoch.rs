//! The exchange protocol without any transport: epochs, parity slots, header packets, the consumed guard.
//!
//! Every round of a communicator has an epoch. A rank writes its payload into its slot of the epoch's parity, publishes
//! a header packet {epoch, fingerprint, fault}, waits until every rank has, reads, and marks the epoch consumed.
//!
//! **Two slots are enough.** Epoch e + 2 writes the slot of epoch e. A rank begins e + 2 only when it has consumed
//! e + 1; to consume it, it saw every rank publish e + 1; and a rank publishes e + 1 only when it has consumed e. So
//! when a slot is written again, every rank has finished reading what it held. That holds only if every rank publishes
//! in every epoch (an empty shard too) and never begins before it consumed: [`Cursor::begin`] refuses.
//!
//! **Numbers come again.** After 2^32 - 2 epochs a word has the flag that it had. Whoever reads only headers never meets one so
//! old, since every rank writes its header in every second epoch. Windows of GPUs have flags in the words of their rows, too, which
//! not every step is large enough to write: their kernels clean the windows, a piece at a time (`clean_next` in `kernels/ll.cuh`).
//!
//! Generic over the atomic words, so that a model checker can run the very code. The constants, the packet format
//! (two 64-bit words a packet, each 32 bits of data below a 32-bit flag which is the epoch; no fence is needed to read
//! one) and [`Epoch::next`] hold for every transport.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Slots of a window: one a parity of the epoch.
pub(crate) const SLOTS: usize = 2;
/// Where the flag of a packet lies in its word; the data lies below.
pub(crate) const FLAG_SHIFT: u32 = 32;
/// The epoch after the largest one: never 0, which is no epoch, and of the other parity.
pub(crate) const AFTER_WRAP: u32 = 2;
/// GPUs count the exchanges that they have ended in units of 2^this, and blocks of the running one in units of one.
pub(crate) const LAUNCH_SHIFT: u32 = 16;
/// Most payload of a rank in one round, bytes.
pub(crate) const MAX_PAYLOAD: usize = 1 << 20;
/// Most memory of the windows of a group together, bytes.
pub(crate) const MAX_WINDOWS: usize = 64 << 20;
/// 64-bit words of a header: 2 packets.
pub(crate) const HEADER_WORDS: usize = 4;

/// A 32-bit word that several ranks see.
pub(crate) trait Word32 {
    fn load(&self, order: Ordering) -> u32;
    fn store(&self, value: u32, order: Ordering);
    fn fetch_add(&self, value: u32, order: Ordering) -> u32;
}

/// A 64-bit word that several ranks see.
pub(crate) trait Word64 {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
}

impl Word32 for AtomicU32 {
    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }
    fn store(&self, value: u32, order: Ordering) {
        self.store(value, order);
    }
    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_add(value, order)
    }
}

impl Word64 for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

/// The number of a round, the flag of its packets. Never 0 in a round, so that zeroed memory carries no epoch; after
/// the largest comes 2, so that parities alternate for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Epoch(u32);

impl Epoch {
    /// Before the first round.
    pub(crate) const START: Epoch = Epoch(0);

    /// The epoch with this flag.
    pub(crate) const fn from_flag(flag: u32) -> Epoch {
        Epoch(flag)
    }

    /// The flag of its packets.
    pub(crate) fn flag(self) -> u32 {
        self.0
    }

    /// The epoch of the last of `count` exchanges, or [`Epoch::START`]: the numbers after the largest begin anew with
    /// [`AFTER_WRAP`]. `epoch_after` in `kernels/ll.cuh` says the same.
    pub(crate) fn after(count: u64) -> Epoch {
        let folded = u64::from(count as u32) + u64::from(AFTER_WRAP) * (count >> 32);
        Epoch(if folded >> 32 == 0 { folded } else { folded - ((1 << 32) - u64::from(AFTER_WRAP)) } as u32)
    }

    /// The epoch after it.
    pub(crate) fn next(self) -> Epoch {
        match self.0.wrapping_add(1) {
            0 => Epoch(AFTER_WRAP),
            flag => Epoch(flag),
        }
    }

    /// Which slot it uses.
    pub(crate) fn slot(self) -> usize {
        self.0 as usize % SLOTS
    }

    /// Whether it is `other` or later, across the wrap. Ranks are never more than two epochs apart.
    pub(crate) fn reached(self, other: Epoch) -> bool {
        self.0.wrapping_sub(other.0).cast_signed() >= 0
    }
}

/// A word on its way: 32 bits of data below the flag of its epoch.
pub(crate) fn packet(data: u32, epoch: Epoch) -> u64 {
    u64::from(epoch.flag()) << FLAG_SHIFT | u64::from(data)
}

/// The epoch of a word, or [`Epoch::START`] where none was written yet.
pub(crate) fn epoch_of(word: u64) -> Epoch {
    Epoch::from_flag((word >> FLAG_SHIFT) as u32)
}

/// The data of a word of `epoch`; none if it is of another.
pub(crate) fn data_of(word: u64, epoch: Epoch) -> Option<u32> {
    (epoch_of(word) == epoch).then_some(word as u32)
}

/// What a rank tells every peer in every round, data or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// What the rank takes this round for; ranks whose fingerprints differ are out of step.
    pub(crate) fingerprint: u64,
    /// Bad data that the rank met, packed; 0 for none.
    pub(crate) fault: u64,
}

impl Header {
    /// The words of the header's packets in `epoch`.
    pub(crate) fn encode(self, epoch: Epoch) -> [u64; HEADER_WORDS] {
        let halves = [self.fingerprint, self.fingerprint >> 32, self.fault, self.fault >> 32];
        halves.map(|half| packet(half as u32, epoch))
    }

    /// The header of `epoch` in these words, or none while a word of it is missing.
    pub(crate) fn decode(words: [u64; HEADER_WORDS], epoch: Epoch) -> Option<Header> {
        let mut halves = [0; HEADER_WORDS];
        for (half, word) in halves.iter_mut().zip(words) {
            *half = u64::from(data_of(word, epoch)?);
        }
        let [a, b, c, d] = halves;
        Some(Header { fingerprint: a | b << 32, fault: c | d << 32 })
    }
}

/// Where a rank publishes the header of one parity.
#[derive(Debug, Default)]
pub(crate) struct Slot<W> {
    words: [W; HEADER_WORDS],
}

impl<W: Word64> Slot<W> {
    /// A slot of these words, all 0.
    #[cfg(all(test, loom))]
    pub(crate) fn of(words: [W; HEADER_WORDS]) -> Self {
        Slot { words }
    }

    /// Publishes the header, and with it everything written before.
    pub(crate) fn publish(&self, epoch: Epoch, header: Header) {
        for (to, word) in self.words.iter().zip(header.encode(epoch)) {
            to.store(word, Ordering::Release);
        }
    }

    /// The header, once it carries `epoch`; then what was written before it is seen as well.
    pub(crate) fn read(&self, epoch: Epoch) -> Option<Header> {
        Header::decode(std::array::from_fn(|i| self.words[i].load(Ordering::Acquire)), epoch)
    }
}

/// How far the ranks of one process have come: arrivals of each parity, and the last epoch that all have published.
#[derive(Debug, Default)]
pub(crate) struct Arrivals<W> {
    arrived: [W; SLOTS],
    complete: W,
}

impl<W: Word32> Arrivals<W> {
    /// Before epoch `start.next()`.
    pub(crate) fn starting_at(words: [W; SLOTS], complete: W, start: Epoch) -> Self {
        complete.store(start.flag(), Ordering::Relaxed);
        Arrivals { arrived: words, complete }
    }

    /// Counts a rank that has published `epoch`. Whether it was the last, which completed the epoch.
    pub(crate) fn arrive(&self, epoch: Epoch, world: usize) -> bool {
        let count = &self.arrived[epoch.slot()];
        // Acquires what the others published, so that `complete` passes all of it on.
        if count.fetch_add(1, Ordering::AcqRel) as usize + 1 < world {
            return false;
        }
        // Nobody counts here again before epoch + 2, which begins after epoch + 1 is complete.
        count.store(0, Ordering::Relaxed);
        self.complete.store(epoch.flag(), Ordering::Release);
        true
    }

    /// Whether every rank has published `epoch`; then everything that they published is seen.
    pub(crate) fn is_complete(&self, epoch: Epoch) -> bool {
        Epoch::from_flag(self.complete.load(Ordering::Acquire)).reached(epoch)
    }
}

/// How far a rank is: the epoch that it began last and the one that it consumed last.
#[derive(Debug, Default)]
pub(crate) struct Cursor<W> {
    begun: W,
    consumed: W,
}

impl<W: Word32> Cursor<W> {
    /// Before epoch `start.next()`.
    pub(crate) fn starting_at(begun: W, consumed: W, start: Epoch) -> Self {
        begun.store(start.flag(), Ordering::Relaxed);
        consumed.store(start.flag(), Ordering::Relaxed);
        Cursor { begun, consumed }
    }

    /// Begins the next epoch; none while the one before is not consumed. Only the rank itself calls it.
    pub(crate) fn begin(&self) -> Option<Epoch> {
        let begun = self.begun.load(Ordering::Relaxed);
        if self.consumed.load(Ordering::Relaxed) != begun {
            return None;
        }
        let epoch = Epoch::from_flag(begun).next();
        self.begun.store(epoch.flag(), Ordering::Relaxed);
        Some(epoch)
    }

    /// Marks the epoch that was begun as read.
    pub(crate) fn consume(&self, epoch: Epoch) {
        self.consumed.store(epoch.flag(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_exchanges_are_epochs() {
        assert_eq!([0, 1, 7].map(Epoch::after), [Epoch::START, Epoch(1), Epoch(7)]);
        let last = u64::from(u32::MAX);
        assert_eq!([last, last + 1, last + 2].map(Epoch::after), [Epoch(u32::MAX), Epoch(2), Epoch(3)]);
        for count in [0, 1, last - 1, last, 2 * last - 4, 2 * last - 3, 2 * last - 2, 2 * last, 9 * last + 5, 1 << 47] {
            assert_eq!(Epoch::after(count + 1), Epoch::after(count).next(), "{count}");
        }
    }

    #[test]
    fn epochs_alternate_and_compare_across_the_wrap() {
        let mut epoch = Epoch::from_flag(u32::MAX - 5);
        for _ in 0..12 {
            let next = epoch.next();
            assert_ne!(next.flag(), 0);
            assert_ne!(next.slot(), epoch.slot());
            assert!(next.reached(epoch) && next.next().reached(epoch) && !epoch.reached(next));
            epoch = next;
        }
        assert!(epoch.flag() < 16);
    }

    #[test]
    fn a_header_is_whole_or_absent() {
        let header = Header { fingerprint: 0x0123_4567_89ab_cdef, fault: u64::MAX - 1 };
        let epoch = Epoch::from_flag(7);
        let words = header.encode(epoch);
        assert_eq!(Header::decode(words, epoch), Some(header));
        assert_eq!(Header::decode(words, epoch.next()), None);
        for missing in 0..HEADER_WORDS {
            let mut torn = words;
            torn[missing] = header.encode(Epoch::from_flag(5))[missing];
            assert_eq!(Header::decode(torn, epoch), None);
        }
        assert_eq!(Header::decode([0; HEADER_WORDS], Epoch::START.next()), None);
    }

    #[test]
    fn an_epoch_is_complete_with_its_last_rank() {
        for start in [Epoch::START, Epoch::from_flag(u32::MAX - 2)] {
            let arrivals = Arrivals::<AtomicU32>::starting_at(Default::default(), AtomicU32::new(0), start);
            let mut epoch = start;
            for _ in 0..6 {
                epoch = epoch.next();
                let last: Vec<bool> = (0..3)
                    .map(|_| {
                        assert!(!arrivals.is_complete(epoch));
                        arrivals.arrive(epoch, 3)
                    })
                    .collect();
                assert_eq!((last, arrivals.is_complete(epoch)), (vec![false, false, true], true));
            }
        }
    }

    #[test]
    fn no_epoch_begins_before_the_last_is_consumed() {
        let cursor = Cursor::<AtomicU32>::default();
        let first = cursor.begin().unwrap();
        assert_eq!(cursor.begin(), None);
        cursor.consume(first);
        assert_eq!(cursor.begin(), Some(first.next()));
    }
}
