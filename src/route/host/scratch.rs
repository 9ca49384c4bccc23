//! A rank's partials of a step.

use crate::error::{Error, ErrorKind, Result};
use crate::fault;
use crate::partial::Lse;

/// This rank's partial, and what merging rows takes.
pub(in crate::route) struct Scratch {
    /// The lse of the step's rows, then their o; with `RING` as often as it keeps partials.
    pub partial: Vec<f32>,
    /// Two rows a worker: a received row made f32, and the merged one.
    pub spare: Vec<f32>,
}

impl Scratch {
    /// Room for `partials` partials of `rows` rows of `dim` elements, and for `workers` threads.
    pub fn new(rows: usize, dim: usize, partials: usize, workers: usize) -> Result<Scratch> {
        let partial = rows.checked_mul(dim + Lse::FLOATS).and_then(|floats| floats.checked_mul(partials));
        Ok(Scratch {
            partial: zeroed("max_query_tokens x q_heads x head_dim_v", partial)?,
            spare: zeroed("workers x head_dim_v", workers.checked_mul(2 * dim))?,
        })
    }

    /// The lse and o of a step of `rows` rows.
    pub fn rows(&mut self, rows: usize, dim: usize) -> (&mut [Lse], &mut [f32]) {
        split_rows(&mut self.partial, rows, dim)
    }

    /// Bytes of the partials.
    pub fn partial_bytes(&self) -> usize {
        size_of_val(&*self.partial)
    }

    /// Bytes of the rest.
    pub fn spare_bytes(&self) -> usize {
        size_of_val(&*self.spare)
    }
}

/// Floats of a partial of `rows` rows of `dim` elements.
pub(in crate::route) fn floats(rows: usize, dim: usize) -> usize {
    rows * (dim + Lse::FLOATS)
}

/// The lse and o of the partial that `memory` begins with.
pub(in crate::route) fn split_rows(memory: &mut [f32], rows: usize, dim: usize) -> (&mut [Lse], &mut [f32]) {
    let (lse, o) = memory[..floats(rows, dim)].split_at_mut(rows * Lse::FLOATS);
    (Lse::slice_mut(lse), o)
}

/// `count` zeros (none: the count overflowed) for `what`, or `NoMemory`.
pub(in crate::route) fn zeroed(what: &str, count: Option<usize>) -> Result<Vec<f32>> {
    fault::point("plan.scratch")?;
    let mut floats = Vec::new();
    let reserved = count.filter(|&count| floats.try_reserve_exact(count).is_ok());
    let Some(count) = reserved else {
        let found = count.map_or("more than 64 bits".into(), |count| format!("{count} floats"));
        return Err(Error::new(ErrorKind::NoMemory, format!("{what}: found {found}, wanted what memory has room for")));
    };
    floats.resize(count, 0.0);
    Ok(floats)
}
