//! A strided cache: its strides where it is packed, and how many tokens of a sequence its bytes have room for.

use super::dtype::Dtype;
use super::format::KvFormat;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// What the keys and the values of a step have in common.
pub(super) struct StridedCache {
    /// Sequences in the step.
    pub batch: i64,
    /// The plan's most.
    pub max_batch: i32,
    /// The longest sequence of the plan on this rank.
    pub max_kv_length: i64,
    /// Tokens of a packed sequence; 0: not given.
    pub capacity: i32,
}

impl StridedCache {
    /// The strides of `tensor`, [sequence, token, kv head, dim] with `inner` = [kv heads, dim].
    pub fn strides(&self, name: &str, tensor: &Tensor, dtype: Dtype, inner: [i64; 2]) -> Result<[i64; 4]> {
        if self.batch == 0 || tensor.bytes == 0 {
            // An empty shard needs no cache; any length above 0 is then bad.
            return Ok(tensor.stride);
        }
        // The last sequences may be empty, and then need no byte.
        let checked = |tensor: &Tensor| tensor.resolve(name, dtype, &[1, 1, inner[0], inner[1]]);
        if tensor.stride != [0; 4] {
            let stride = checked(tensor)?;
            no_broadcast_rows(name, dtype, &stride, inner[1])?;
            all_begin_in_range(name, &stride, self.batch)?;
            return Ok(stride);
        }
        let packed = |tokens: i64| KvFormat::of(dtype).packed_strides(name, &[self.batch, tokens, inner[0], inner[1]]);
        let stride = packed(self.tokens(name, tensor.bytes, packed(1)?[0])?)?;
        checked(&Tensor { stride, ..*tensor })
    }

    /// Tokens between the sequences of a packed cache of `bytes` bytes, `token` each.
    fn tokens(&self, name: &str, bytes: u64, token: i64) -> Result<i64> {
        if self.capacity > 0 {
            return Ok(i64::from(self.capacity));
        }
        let too_large = || untold(name, bytes, self.batch, self.max_kv_length, token);
        let all = token.checked_mul(self.batch).ok_or_else(too_large)? as u64;
        all.checked_mul(self.max_kv_length as u64).ok_or_else(too_large)?;
        let exact = bytes / all;
        let is_exact = bytes.is_multiple_of(all) && exact <= self.max_kv_length as u64;
        if is_of_plan(bytes, token, self.max_batch, self.max_kv_length) {
            return Ok(self.max_kv_length);
        }
        // In a batch that is not full the bytes may be those of the full one, with fewer tokens a sequence.
        if is_exact && (exact == self.max_kv_length as u64 || self.batch == i64::from(self.max_batch)) {
            return Ok(exact as i64);
        }
        // With one sequence the distance between sequences does not matter. The last of several may end early; `settle_packed`
        // compares that with its length.
        let but_last = all - token as u64;
        if self.batch == 1 || (but_last * self.max_kv_length as u64..all * self.max_kv_length as u64).contains(&bytes) {
            return Ok(self.max_kv_length);
        }
        Err(untold(name, bytes, self.batch, self.max_kv_length, token))
    }
}

/// Whether `bytes` are those of a packed cache for the most sequences and tokens of the plan, `token` a token: it may serve
/// steps of fewer sequences.
pub(super) fn is_of_plan(bytes: u64, token: i64, max_batch: i32, max_kv_length: i64) -> bool {
    i128::from(bytes) == i128::from(token) * i128::from(max_batch) * i128::from(max_kv_length)
}

/// The error of a packed cache of several sequences whose bytes do not tell where the second begins. `token`: bytes of one.
pub(super) fn untold(name: &str, bytes: u64, batch: i64, max_kv_length: i64, token: i64) -> Error {
    let wanted = format!(
        "{}, a packed {name} of [{batch} sequences, max_kv_length = {max_kv_length} tokens], or in kv_capacity the tokens that each \
         sequence of it has room for",
        i128::from(token) * i128::from(batch) * i128::from(max_kv_length)
    );
    Error::invalid(format_args!("{name}.bytes"), bytes, wanted)
}

/// Refuses strides by which a sequence of the batch would begin beyond 63 bits: kernels multiply, and compare with the tensor's
/// end, in 64.
pub(super) fn all_begin_in_range(name: &str, stride: &[i64; 4], batch: i64) -> Result<()> {
    if stride[0].checked_mul((batch - 1).max(0)).is_some() {
        return Ok(());
    }
    let wanted = format!("at most {} for {batch} sequences", i64::MAX / (batch - 1));
    Err(Error::invalid(format_args!("{name}.stride[0]"), stride[0], wanted))
}

/// Refuses keys or values all of whose elements of a row would be the first one, as where the last stride was forgotten.
pub(super) fn no_broadcast_rows(name: &str, dtype: Dtype, stride: &[i64; 4], dim: i64) -> Result<()> {
    if KvFormat::of(dtype).blocks(dim as usize) > 1 && stride[3] == 0 {
        let wanted = format!("a byte stride between the {dim} elements of a row (all four strides 0: packed)");
        return Err(Error::invalid(format_args!("{name}.stride[3]"), 0, wanted));
    }
    Ok(())
}

/// Bytes from the first of `tensor` to the end of token `token` of sequence `b`, whose strides are resolved.
pub(super) fn end_of(dtype: Dtype, stride: &[i64; 4], inner: [i64; 2], b: i64, token: i64) -> i128 {
    let format = KvFormat::of(dtype);
    let counts = format.block_dims(&[1, 1, inner[0], inner[1]]);
    let steps = [b, token, counts[2] - 1, counts[3] - 1];
    format.block_bytes() as i128 + (0..4).map(|d| i128::from(stride[d]) * i128::from(steps[d])).sum::<i128>()
}

/// The largest distance, from the first of `tensor`, at which a token may begin; below 0 where there is room for none.
pub(super) fn token_end(tensor: &Tensor, dtype: Dtype, stride: &[i64; 4], inner: [i64; 2]) -> i64 {
    if tensor.bytes == 0 {
        return -1;
    }
    let left = i128::from(tensor.bytes) - end_of(dtype, stride, inner, 0, 0);
    i64::try_from(left.max(-1)).unwrap_or(i64::MAX)
}

/// Tokens of sequence `b` that `tensor` has room for, whose strides are resolved.
pub(super) fn room(tensor: &Tensor, dtype: Dtype, stride: &[i64; 4], inner: [i64; 2], b: i64) -> i64 {
    if tensor.bytes == 0 {
        return 0;
    }
    let left = i128::from(tensor.bytes) - end_of(dtype, stride, inner, b, 0);
    match stride[1] {
        _ if left < 0 => 0,
        0 => i64::MAX,
        token => {
            // A packed sequence ends where the next one begins.
            let most = if tensor.stride == [0; 4] { stride[0] / token } else { i64::MAX };
            i64::try_from(left / i128::from(token) + 1).unwrap_or(i64::MAX).min(most)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: Dtype = Dtype::F32;

    fn strides(batch: i64, max_batch: i32, capacity: i32, floats: usize) -> Result<[i64; 4]> {
        let data = vec![0f32; floats];
        StridedCache { batch, max_batch, max_kv_length: 16, capacity }.strides(
            "k",
            &Tensor::from_slice(&data),
            F32,
            [1, 2],
        )
    }

    #[test]
    fn the_capacity_of_a_packed_cache_is_given_or_told_by_its_bytes() {
        // [2, 4, 1, 2] in a plan for 16 tokens: a pool of any size, with the capacity.
        assert_eq!(strides(2, 2, 4, 1024).unwrap(), [32, 8, 8, 4]);
        // Exact bytes of a full batch, and those of max_kv_length.
        assert_eq!(strides(2, 2, 0, 16).unwrap(), [32, 8, 8, 4]);
        assert_eq!(strides(2, 3, 0, 64).unwrap(), [128, 8, 8, 4]);
        // The cache of a plan of five sequences serves two.
        assert_eq!(strides(2, 5, 0, 160).unwrap(), [128, 8, 8, 4]);
        // A last sequence that ends early, of 16 tokens.
        assert_eq!(strides(2, 2, 0, 37).unwrap(), [128, 8, 8, 4]);
        // A pool; what may be two of three sequences; not whole tokens.
        for (max_batch, floats) in [(2, 1024), (3, 24), (2, 17), (2, 15)] {
            let error = strides(2, max_batch, 0, floats).unwrap_err();
            let wanted = format!("k.bytes: found {}, wanted 256, a packed k of [2 sequences,", floats * 4);
            assert!(error.message().starts_with(&wanted), "{error}");
        }
        // One sequence needs none.
        assert_eq!(strides(1, 2, 0, 1000).unwrap()[1..], [8, 8, 4]);
    }

    #[test]
    fn rows_may_end_early() {
        let data = [0f32; 2 * 18];
        let tensor = Tensor::from_slice(&data).with_strides([128, 8, 8, 4]);
        let of = |tensor: &Tensor, b| room(tensor, F32, &[128, 8, 8, 4], [1, 2], b);
        assert_eq!((of(&tensor, 0), of(&tensor, 1), of(&tensor, 2)), (18, 2, 0));
        let end = |tensor: &Tensor| token_end(tensor, F32, &[128, 8, 8, 4], [1, 2]);
        assert_eq!((end(&tensor), end(&Tensor::NULL), end(&Tensor { bytes: 7, ..tensor })), (136, -1, -1));
        let packed = Tensor { stride: [0; 4], ..tensor };
        assert_eq!((of(&packed, 0), of(&packed, 1), of(&Tensor::NULL, 0)), (16, 2, 0));
    }

    #[test]
    fn strides_by_which_a_sequence_begins_beyond_63_bits_are_refused() {
        let data = [0f32; 64];
        let of = |batch, stride| {
            let cache = StridedCache { batch, max_batch: 8, max_kv_length: 16, capacity: 0 };
            cache.strides("k", &Tensor::from_slice(&data).with_strides([stride, 8, 8, 4]), F32, [1, 2])
        };
        // Four of them would begin at 2^64, which is 0 in 64 bits; the last that fits is below 2^63.
        let error = of(5, 1 << 62).unwrap_err();
        let wanted = "k.stride[0]: found 4611686018427387904, wanted at most 2305843009213693951 for 5 sequences";
        assert_eq!(error.message(), wanted);
        assert!(of(3, 1 << 62).is_err() && of(2, 1 << 62).is_ok() && of(1, i64::MAX & !3).is_ok());
        assert!(all_begin_in_range("k_scale", &[i64::MAX, 0, 0, 0], 2).is_ok());
        assert!(all_begin_in_range("k_scale", &[i64::MAX, 0, 0, 0], 3).is_err());
        assert!(all_begin_in_range("k_scale", &[i64::MAX, 0, 0, 0], 0).is_ok());
    }

    #[test]
    fn a_last_stride_of_zero_is_refused() {
        let data = [0f32; 64];
        let cache = StridedCache { batch: 1, max_batch: 1, max_kv_length: 16, capacity: 0 };
        let with = |stride, dim| {
            cache.strides("k", &Tensor::from_slice(&data).with_strides(stride), F32, [1, dim]).map_err(|error| {
                assert!(error.message().starts_with("k.stride[3]: found 0, wanted a byte stride"), "{error}");
            })
        };
        assert!(with([128, 8, 8, 0], 2).is_err() && with([128, 8, 8, 0], 1).is_ok() && with([0, 0, 0, 4], 2).is_ok());
    }
}
