//! Where rows lie in memory: a partial that is read, an output that is written. One declaration each, for the CPU, for
//! the launch side of the GPU and, mirrored in `kernels/rows.cuh`, for the kernels.
//!
//! Rows are numbered by (query token, head). Addresses are of the memory of whoever reads or writes: host or device.
//! Strides are bytes.

use super::lse::Lse;
use crate::attention::dtype::Dtype;

/// Where a row of output goes: o [token, head, dim] and natural lse [token, head], f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// A partial in memory: normalised o [token, head, dim] and lse [token, head], f32.
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
    /// 1: an lse of +inf means empty, too.
    pub plus_inf_is_empty: i32,
}

impl RowTarget {
    /// Nothing.
    pub const NONE: RowTarget =
        RowTarget { o: 0, lse: 0, o_stride: [0; 3], lse_stride: [0; 2], dtype: Dtype::F32, dim: 0 };

    /// Packed f32 rows of `heads` heads.
    pub const fn packed(o: u64, lse: u64, heads: i32, dim: i32) -> RowTarget {
        let (element, lse_bytes, heads) = (Dtype::F32.size() as i64, size_of::<f32>() as i64, heads as i64);
        let row = element * dim as i64;
        let (o_stride, lse_stride) = ([heads * row, row, element], [heads * lse_bytes, lse_bytes]);
        RowTarget { o, lse, o_stride, lse_stride, dtype: Dtype::F32, dim }
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
            plus_inf_is_empty: 0,
        }
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
        assert_eq!((source.dtype, source.dim, source.to_natural, source.plus_inf_is_empty), (Dtype::F32, 8, 1.0, 0));
    }
}
