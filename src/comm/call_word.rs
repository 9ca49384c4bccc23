//! The call that a rank has issued, as one word for the error messages of its peers.
//!
//! A fingerprint shows that ranks issued different calls; this word says which ones. A number that is too large for its bits is
//! kept as the largest that they hold, and printed with "or more".

use std::fmt;

/// Bits of a word: those of the kind, then of the plan, the threads, the sequences and the query tokens.
const BITS: [u32; 5] = [2, 11, 11, 20, 20];

/// The kind, plan, sequences and query tokens of a step. The default says that nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallWord(u64);

impl CallWord {
    /// A decode step of plan number `plan`.
    pub fn decode(plan: u64, batch: u64, query_tokens: u64) -> CallWord {
        CallWord::pack([1, plan, 0, batch, query_tokens])
    }

    /// The same step, of ranks that must all run it on `threads` threads.
    pub fn on_threads(self, threads: u64) -> CallWord {
        let [kind, plan, _, batch, query_tokens] = self.unpack();
        CallWord::pack([kind, plan, threads, batch, query_tokens])
    }

    /// A merge of partials that the engine made.
    pub fn merge(plan: u64, query_tokens: u64) -> CallWord {
        CallWord::pack([2, plan, 0, 0, query_tokens])
    }

    /// The word that was sent as `bits`.
    pub fn from_bits(bits: u64) -> CallWord {
        CallWord(bits)
    }

    /// It, to be sent.
    pub fn bits(self) -> u64 {
        self.0
    }

    fn pack(numbers: [u64; 5]) -> CallWord {
        let word = numbers.iter().zip(BITS).fold(0, |word, (&number, bits)| word << bits | number.min((1 << bits) - 1));
        CallWord(word)
    }

    fn unpack(self) -> [u64; 5] {
        let (mut numbers, mut rest) = ([0; 5], self.0);
        for (number, bits) in numbers.iter_mut().zip(BITS).rev() {
            (*number, rest) = (rest & ((1 << bits) - 1), rest >> bits);
        }
        numbers
    }
}

impl fmt::Display for CallWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kind, plan, threads, batch, query_tokens] = self.unpack();
        let number = |i: usize, value: u64| {
            let end = if value == (1 << BITS[i]) - 1 { " or more" } else { "" };
            format!("{value}{end}")
        };
        let plan = number(1, plan);
        match kind {
            1 => write!(
                f,
                "a decode of plan {plan} with batch {}, query_tokens {}",
                number(3, batch),
                number(4, query_tokens)
            )?,
            2 => write!(f, "a merge of plan {plan} with query_tokens {}", number(4, query_tokens))?,
            _ => write!(f, "an unknown call")?,
        }
        if threads > 0 { write!(f, " on {} threads", number(2, threads)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_tells_a_call() {
        let told = |word: CallWord| CallWord::from_bits(word.bits()).to_string();
        assert_eq!(told(CallWord::decode(1, 2, 3)), "a decode of plan 1 with batch 2, query_tokens 3");
        assert_eq!(
            told(CallWord::decode(2, 0, 9).on_threads(16)),
            "a decode of plan 2 with batch 0, query_tokens 9 on 16 threads"
        );
        assert_eq!(told(CallWord::merge(7, 1)), "a merge of plan 7 with query_tokens 1");
        assert_eq!(
            told(CallWord::decode(1 << 40, i32::MAX as u64, 1 << 20).on_threads(1 << 30)),
            "a decode of plan 2047 or more with batch 1048575 or more, query_tokens 1048575 or more on 2047 or more threads"
        );
        assert_eq!(
            told(CallWord::decode(2046, 1_048_574, 0)),
            "a decode of plan 2046 with batch 1048574, query_tokens 0"
        );
        assert_eq!(told(CallWord::default()), "an unknown call");
    }
}
