//! What one worker does: the splits of its slice, tile by tile.

use super::kernel::args::TILE;
use super::partition::Split;
use super::rows::Rows;
use super::seen::Seen;
use super::task::Task;
use super::worker::Worker;

/// Does worker `w`'s slice.
///
/// # Safety
/// The worker's scratch is its alone and as large as the layout says; the step's memory is what its fields say, and the
/// output has every row of the step.
pub unsafe fn run(worker: &Worker<'_>, w: usize) {
    worker.partition.splits(w, |split| {
        // SAFETY: this function was promised what `run_split` asks for; the partition gives a worker splits of its own slice.
        unsafe { run_split(worker, split) }
    });
}

/// Does one split, and writes its rows where it is a whole item.
///
/// # Safety
/// As [`run`].
unsafe fn run_split(worker: &Worker<'_>, split: &Split) {
    let sequence = &worker.partition.sequences[split.sequence];
    let fill = |rows: &mut Rows, tile: usize| {
        let (list, keys) = ((split.sequence, split.first_head), worker.keys_of(sequence, tile));
        // SAFETY: the worker's reader filled the sequences of its partition; the tile is one of the split, whose keys
        // `keys_of` ends at the last that the sequence holds.
        unsafe { rows.fill(&worker.reader, list, sequence, tile * TILE, keys) };
    };
    // SAFETY: scratch, step and output are as `run` was promised. `rows` and `seen` are filled for each tile before it is done.
    // The partition gives a whole item to one worker, so that nobody else writes its rows.
    unsafe {
        for h in 0..split.heads {
            worker.load_q(split, sequence, h);
        }
        let mut task = Task::new(worker, split);
        let (mut rows, mut seen) = ([Rows::EMPTY; 2], [Seen::NONE; 2]);
        let mut here = worker.next_seen(split, split.begin, &mut seen[0]);
        if let Some(tile) = here {
            fill(&mut rows[0], tile);
        }
        let mut now = 0;
        while let Some(tile) = here {
            // Tiles that no row sees are not touched, nor asked for.
            let next = worker.next_seen(split, tile + 1, &mut seen[1 - now]);
            if let Some(next) = next {
                fill(&mut rows[1 - now], next);
            }
            task.tile(tile, &seen[now], &rows[now], next.is_some().then_some(&rows[1 - now]));
            (here, now) = (next, 1 - now);
        }
        task.finish();
        if split.is_whole() {
            worker.write(split, &task.sums);
        }
    }
}
