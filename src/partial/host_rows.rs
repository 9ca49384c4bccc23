//! Rows in host memory: rounded once into a target's strides and element type, and read from a source's.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::lse::Lse;
use super::rows::{NAN_IS_EMPTY, PLUS_INF_IS_EMPTY, RowSource, RowTarget};
use crate::attention::MAX_HEAD_DIM;
use crate::attention::dtype::Dtype;

impl RowTarget {
    /// Writes one row. `head` counts from the target's own first head.
    ///
    /// # Safety
    /// The target is of host memory, and was made for a shape that contains (token, head) from strides that
    /// `Tensor::resolve` gave for it. The row is valid for writes, and nobody else uses it meanwhile.
    pub(crate) unsafe fn write(&self, token: usize, head: usize, o: &[f32], lse: Lse) {
        let [s_token, s_head, s_dim] = self.o_stride;
        let offset = token as i64 * s_token + head as i64 * s_head;
        debug_assert_eq!(o.len(), self.dim as usize);
        // SAFETY: the offsets lie inside the extent that `resolve` checked for the shape, alignment was checked with it, and
        // the caller keeps the row valid and to itself.
        unsafe {
            let row = (self.o as *mut u8).offset(offset as isize);
            match self.dtype {
                Dtype::F16 if s_dim == 2 => packed::<f16>(row, o.len()).convert_from_f32_slice(o),
                Dtype::F32 => scatter(row.cast::<f32>(), s_dim, o, |x| x),
                Dtype::F16 => scatter(row.cast::<f16>(), s_dim, o, f16::from_f32),
                Dtype::Bf16 => scatter(row.cast::<bf16>(), s_dim, o, bf16::from_f32),
                // No output's type: `AttentionDesc::check` refuses them.
                _ => {}
            }
            if self.lse != 0 {
                let offset = token as i64 * self.lse_stride[0] + head as i64 * self.lse_stride[1];
                (self.lse as *mut u8).offset(offset as isize).cast::<f32>().write(self.in_base(lse));
            }
        }
    }

    /// A natural lse in the base that is wanted.
    fn in_base(&self, lse: Lse) -> f32 {
        if self.from_natural == 1.0 { lse.high } else { (lse.value() * std::f64::consts::LOG2_E) as f32 }
    }

    /// Writes NaN to every row: what a failed step leaves behind.
    ///
    /// # Safety
    /// As [`RowTarget::write`] for all rows of `tokens` x `heads`.
    pub(crate) unsafe fn write_nan(&self, tokens: usize, heads: usize) {
        let row = [f32::NAN; MAX_HEAD_DIM as usize];
        let row = &row[..self.dim as usize];
        for token in 0..tokens {
            for head in 0..heads {
                // SAFETY: the caller's promise covers every (token, head) below these bounds.
                unsafe { self.write(token, head, row, Lse::NAN) };
            }
        }
    }
}

impl RowSource {
    /// Whether a token is of a sequence without keys, or of none.
    ///
    /// # Safety
    /// The index arrays that the source names are host memory of `batch` sequences, valid for reads, which nobody writes meanwhile.
    unsafe fn is_padding(&self, token: usize) -> bool {
        if self.query_start == 0 && self.kv_length == 0 {
            return false;
        }
        let batch = self.batch as usize;
        let sequence = if self.query_start == 0 {
            token / self.tokens_each.max(1) as usize
        } else {
            // SAFETY: as many entries, as this function was promised.
            let starts = unsafe { std::slice::from_raw_parts(self.query_start as *const i32, batch + 1) };
            match starts.partition_point(|&start| i64::from(start) <= token as i64) {
                0 => return true,
                after => after - 1,
            }
        };
        // SAFETY: the sequence is one of the batch.
        sequence >= batch || self.kv_length != 0 && unsafe { (self.kv_length as *const i32).add(sequence).read() } <= 0
    }

    /// One float of a tensor [token, head] with these strides, of the partial that lies `offset` bytes behind the first.
    ///
    /// # Safety
    /// As [`RowSource::lse`], of that tensor.
    unsafe fn read(at: u64, stride: [i64; 2], offset: i64, token: usize, head: usize) -> f32 {
        let offset = offset + token as i64 * stride[0] + head as i64 * stride[1];
        // SAFETY: inside the extent that `resolve` checked, aligned as it checked; the caller keeps it valid.
        unsafe { (at as *const u8).offset(offset as isize).cast::<f32>().read() }
    }

    /// The natural lse of a row of the partial whose lse and sum lie `offsets` bytes behind those of the first.
    ///
    /// # Safety
    /// The source is of host memory, and was made for a shape that contains the row from strides that `Tensor::resolve` gave
    /// for it. The row is valid for reads, and nobody writes it meanwhile; so are the index arrays.
    pub(crate) unsafe fn lse(&self, offsets: [i64; 2], token: usize, head: usize) -> Lse {
        // SAFETY: this function was promised the same.
        if unsafe { self.is_padding(token) } {
            return Lse::EMPTY;
        }
        // SAFETY: as above.
        let lse = unsafe { RowSource::read(self.lse, self.lse_stride, offsets[0], token, head) };
        if self.empties & PLUS_INF_IS_EMPTY != 0 && lse == f32::INFINITY
            || self.empties & NAN_IS_EMPTY != 0 && lse.is_nan()
        {
            return Lse::EMPTY;
        }
        // Of base 2 it becomes a natural one in f64: rounded to f32, large ones would lose what weights are made of.
        let to_natural = if self.to_natural == 1.0 { 1.0 } else { std::f64::consts::LN_2 };
        let lse = f64::from(lse) * to_natural;
        if self.sum == 0 || lse == f64::NEG_INFINITY {
            return Lse::of(lse);
        }
        // SAFETY: as above, of the sums.
        let sum = unsafe { RowSource::read(self.sum, self.sum_stride, offsets[1], token, head) };
        Lse::of(lse + f64::from(sum).ln())
    }

    /// Converts that row's o to f32, and divides it by its sum where it has one. `to` is a row long.
    ///
    /// # Safety
    /// As [`RowSource::lse`].
    pub(crate) unsafe fn load(&self, offsets: [i64; 2], token: usize, head: usize, to: &mut [f32]) {
        // SAFETY: this function was promised the same.
        unsafe { self.load_stored(offsets[0], token, head, to) };
        if self.sum != 0 {
            // SAFETY: as above, of the sums.
            let sum = unsafe { RowSource::read(self.sum, self.sum_stride, offsets[1], token, head) };
            to.iter_mut().for_each(|x| *x /= sum);
        }
    }

    /// Converts a row's o to f32.
    ///
    /// # Safety
    /// As [`RowSource::lse`].
    unsafe fn load_stored(&self, offset: i64, token: usize, head: usize, to: &mut [f32]) {
        let [s_token, s_head, s_dim] = self.o_stride;
        let offset = offset + token as i64 * s_token + head as i64 * s_head;
        debug_assert_eq!(to.len(), self.dim as usize);
        // SAFETY: as in `lse`, for each element of the row.
        unsafe {
            let from = (self.o as *const u8).offset(offset as isize);
            for (i, x) in to.iter_mut().enumerate() {
                let from = from.offset(i as isize * s_dim as isize);
                *x = match self.dtype {
                    Dtype::F16 => from.cast::<f16>().read().to_f32(),
                    Dtype::Bf16 => from.cast::<bf16>().read().to_f32(),
                    _ => from.cast::<f32>().read(),
                };
            }
        }
    }
}

/// A packed row as a slice, for conversions that take several elements at once.
///
/// # Safety
/// `row` is aligned and valid for writes of `len` elements that nothing else uses meanwhile. They hold initialised bytes, and
/// every bit pattern of `T` is a value.
unsafe fn packed<'a, T>(row: *mut u8, len: usize) -> &'a mut [T] {
    // SAFETY: the memory is aligned for `T`, `len` elements long, initialised, and used by nobody else, as the contract above says.
    unsafe { std::slice::from_raw_parts_mut(row.cast(), len) }
}

/// Stores a converted row with a byte stride.
///
/// # Safety
/// `row` is aligned and valid for writes of `o.len()` elements `stride` bytes apart.
unsafe fn scatter<T>(row: *mut T, stride: i64, o: &[f32], convert: impl Fn(f32) -> T) {
    if stride == size_of::<T>() as i64 {
        for (i, &x) in o.iter().enumerate() {
            // SAFETY: element `i` of the row, which is packed.
            unsafe { row.add(i).write(convert(x)) };
        }
    } else {
        for (i, &x) in o.iter().enumerate() {
            // SAFETY: element `i` of the row, `stride` bytes from the one before.
            unsafe { row.byte_offset(i as isize * stride as isize).write(convert(x)) };
        }
    }
}
