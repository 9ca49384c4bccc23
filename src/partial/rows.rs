//! Where rows lie in memory: a partial that is read, an output that is written. One declaration each, for the CPU, for
//! the launch side of the GPU and, mirrored in `kernels/rows.cuh`, for the kernels.
//!
//! Rows are numbered by (query token, head). Addresses are of the memory of whoever reads or writes: host or device.
//! Strides are bytes.

use super::lse::Lse;
use crate::attention::dtype::Dtype;

/// Where a row of output goes: o [token, head, dim] and natural lse [token, head], f32.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct RowTarget {
    pub o: u64,
    /// 0: the lse is not wanted.
    pub lse: u64,
    /// Token, head, dim.
    pub o_stride: [i64; 3],
    /// Token, head.
    pub lse_stride: [i64; 2],
    /// Element type of o.
    pub dtype: Dtype,
    /// Elements of a row.
    pub dim: i32,
    /// What makes a natural lse one of the base that is wanted: 1, or 1 / ln 2.
    pub from_natural: f32,
    /// 0.
    pub reserved: i32,
}

/// A partial in memory: o [token, head, dim] and lse [token, head], f32.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct RowSource {
    pub o: u64,
    pub lse: u64,
    /// Token, head, dim.
    pub o_stride: [i64; 3],
    /// Token, head.
    pub lse_stride: [i64; 2],
    /// Element type of o.
    pub dtype: Dtype,
    /// Elements of a row.
    pub dim: i32,
    /// What makes an lse of the memory a natural one: 1, or ln 2 where it has base 2.
    pub to_natural: f32,
    /// What means empty beside an lse of -inf: `PLUS_INF_IS_EMPTY`, `NAN_IS_EMPTY`.
    pub empties: u32,
    /// f32 [token, head], or 0 where o is normalised. Else o is sum_j exp(s_j - m) v_j with m what lies in the place of the lse, and
    /// this sum_j exp(s_j - m).
    pub sum: u64,
    /// Token, head.
    pub sum_stride: [i64; 2],
    /// `i32 [batch + 1]`: the first token of each sequence; 0: sequences have `tokens_each`.
    pub query_start: u64,
    /// `i32 [batch]`: sequences without keys have 0 or less; 0: all have some.
    pub kv_length: u64,
    /// Sequences; tokens behind the last are of none, and empty. Counts where one of the two is given.
    pub batch: i32,
    pub tokens_each: i32,
}

/// `RowSource::empties`: +inf.
pub(crate) const PLUS_INF_IS_EMPTY: u32 = 1;
/// `RowSource::empties`: NaN.
pub(crate) const NAN_IS_EMPTY: u32 = 2;

impl RowTarget {
    /// Nothing.
    pub const NONE: RowTarget = RowTarget {
        o: 0,
        lse: 0,
        o_stride: [0; 3],
        lse_stride: [0; 2],
        dtype: Dtype::F32,
        dim: 0,
        from_natural: 1.0,
        reserved: 0,
    };

    /// Packed f32 rows of `heads` heads.
    pub const fn packed(o: u64, lse: u64, heads: i32, dim: i32) -> RowTarget {
        let (element, lse_bytes, heads) = (Dtype::F32.size() as i64, size_of::<f32>() as i64, heads as i64);
        let row = element * dim as i64;
        let (o_stride, lse_stride) = ([heads * row, row, element], [heads * lse_bytes, lse_bytes]);
        RowTarget { o, lse, o_stride, lse_stride, dim, ..RowTarget::NONE }
    }

    /// The same, with a log-sum-exp in two floats.
    pub const fn partial(o: u64, lse: u64, heads: i32, dim: i32) -> RowTarget {
        let lse_bytes = size_of::<Lse>() as i64;
        let lse_stride = [heads as i64 * lse_bytes, lse_bytes];
        RowTarget { lse_stride, ..RowTarget::packed(o, lse, heads, dim) }
    }
}

impl RowSource {
    /// Nothing.
    pub const NONE: RowSource = RowSource::written(&RowTarget::NONE);

    /// What was written to `target`.
    pub const fn written(target: &RowTarget) -> RowSource {
        RowSource {
            o: target.o,
            lse: target.lse,
            o_stride: target.o_stride,
            lse_stride: target.lse_stride,
            dtype: target.dtype,
            dim: target.dim,
            to_natural: 1.0,
            empties: 0,
            sum: 0,
            sum_stride: [0; 2],
            query_start: 0,
            kv_length: 0,
            batch: 0,
            tokens_each: 0,
        }
    }

    /// What is read, by the names of the arguments; 0 is nothing.
    pub fn addresses(&self) -> [(&'static str, u64); 5] {
        let index = [("query_start", self.query_start), ("kv_length", self.kv_length)];
        [("o.data", self.o), ("lse.data", self.lse), ("sum.data", self.sum), index[0], index[1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_packed_is_read_the_same_way() {
        let target = RowTarget::packed(64, 4096, 3, 8);
        assert_eq!((target.o_stride, target.lse_stride), ([96, 32, 4], [12, 4]));
        let source = RowSource::written(&target);
        assert_eq!((source.o, source.lse, source.o_stride, source.lse_stride), (64, 4096, [96, 32, 4], [12, 4]));
        assert_eq!((source.dtype, source.dim, source.to_natural, source.empties), (Dtype::F32, 8, 1.0, 0));
    }
}
