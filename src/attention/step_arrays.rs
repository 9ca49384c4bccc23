//! What the int32 arrays of a step say against each other and against what the host knows, where they are in host memory: a
//! step that cannot mean what its caller wants is refused before it begins.
//!
//! Values out of range are not judged here: a step meets them as bad data, wherever the arrays are.

use super::descriptor::{AttentionDesc, KvLayout, OutputMode};
use super::placement::{Placement, Shard, local_length};
use super::step::Step;
use super::visibility::KeyPositions;
use crate::error::{Error, Result};

/// Which keys of the sequences a call attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// All that the shard holds.
    All,
    /// These, or some of these.
    Some,
}

impl Step {
    /// Checks the arrays of a step of `desc` for what `shard` holds, and settles by the lengths what a packed cache is. Allocates
    /// nothing unless it refuses.
    ///
    /// # Safety
    /// The arrays are in host memory, as long as the step's fields say, and written by nobody meanwhile.
    pub unsafe fn check_arrays(&mut self, desc: &AttentionDesc, shard: Shard, which: Keys) -> Result<()> {
        let args = self.args;
        // SAFETY: `Step::new` refused misaligned pointers, and null ones where the arrays are needed; the others are compared
        // with null before they are read. Every index below is one that the step's fields give the array.
        let read = |pointer: *const i32, index: i64| i64::from(unsafe { pointer.offset(index as isize).read() });
        if args.batch > 0 && !args.query_start.is_null() && read(args.query_start, 0) != 0 {
            return Err(Error::invalid("query_start[0]", read(args.query_start, 0), "0: it ascends from 0"));
        }
        if desc.kv_layout == KvLayout::Strided && args.batch > 1 {
            let length = |b: i32| read(args.kv_length, i64::from(b));
            let longest = (0..args.batch).map(length).max().unwrap_or(0);
            self.settle_packed(desc, Some((longest, length(args.batch - 1))))?;
        }
        for b in 0..i64::from(args.batch) {
            let queries = match args.query_start.is_null() {
                true => i64::from(args.query_tokens / args.batch),
                false => read(args.query_start, b + 1) - read(args.query_start, b),
            };
            let pages = if desc.kv_layout == KvLayout::CsrPages {
                let (begin, end) = (read(args.page_indptr, b), read(args.page_indptr, b + 1));
                if begin < 0 || end < begin || end > self.page_index_room(desc) {
                    continue;
                }
                Some(end - begin)
            } else {
                None
            };
            let held = match pages {
                Some(0) if args.kv_length.is_null() => 0,
                Some(pages) if args.kv_length.is_null() => {
                    (pages - 1) * i64::from(desc.page_size) + read(args.last_page_len, b)
                }
                _ => read(args.kv_length, b),
            };
            if !(0..=i64::from(desc.max_kv_length)).contains(&held) {
                continue;
            }
            let name = if args.kv_length.is_null() { "tokens up to last_page_len" } else { "kv_length" };
            let length = || format!("{name}[{b}] = {held}");
            self.check_room(desc, b, held, length)?;
            self.check_mask(b, queries, held, length)?;
            if desc.kv_layout != KvLayout::Strided && held > 0 && args.num_pages == 0 {
                return Err(Error::invalid("num_pages", 0, format_args!("at least 1 for {}", length())));
            }
            // A checked plan compares these between its ranks, and reports them without breaking the communicator.
            let is_checked = desc.checked && shard.world > 1 && desc.output != OutputMode::Local && which == Keys::All;
            if queries <= 0 || args.global_length.is_null() || is_checked {
                continue;
            }
            let global = read(args.global_length, b);
            let start = if args.kv_start.is_null() { 0 } else { read(args.kv_start, b) };
            if desc.needs_positions() && args.query_position.is_null() && global < queries {
                continue;
            }
            if global < 0 {
                return Err(Error::invalid(format_args!("global_length[{b}]"), global, "at least 0"));
            }
            match desc.placement {
                Placement::Contiguous => {
                    let valid = KeyPositions::Contiguous { start }.are_valid(held as usize);
                    if held > 0 && valid && start + held > global && !desc.surplus_keys {
                        let found = format_args!("{start} + {held}");
                        let wanted = surplus(desc, format_args!("at most global_length[{b}] = {global}"));
                        return Err(Error::invalid(format_args!("kv_start[{b}] + {name}[{b}]"), found, wanted));
                    }
                }
                Placement::Interleaved { run } => {
                    let owned = i64::from(local_length(desc.placement, shard, global as i32)?);
                    if held > owned && !desc.surplus_keys || held < owned && which == Keys::All {
                        let (rank, world) = (shard.rank, shard.world);
                        let wanted = format_args!(
                            "{owned}, which rank {rank} of {world} holds of global_length[{b}] = {global} in runs of {run}"
                        );
                        let wanted = if held > owned { surplus(desc, wanted) } else { wanted.to_string() };
                        return Err(Error::invalid(format_args!("{name}[{b}]"), held, wanted));
                    }
                }
                Placement::Explicit => {}
            }
        }
        Ok(())
    }
}

/// How to have keys past the global length, where that can be.
fn surplus(desc: &AttentionDesc, wanted: std::fmt::Arguments<'_>) -> String {
    let hint = if desc.causal { " (or TREEATTN_ATTENTION_SURPLUS_KEYS among the plan's flags)" } else { "" };
    format!("{wanted}{hint}")
}
