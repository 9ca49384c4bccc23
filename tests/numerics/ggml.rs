//! Caches in the bytes of ggml's own quantisers.

use treeattn::attention::{AttentionDesc, Dtype, KvFormat};

use crate::support::case::Case;
use crate::support::data;
use crate::support::run::Pool;
use crate::support::values::Values;

const TYPES: [Dtype; 6] = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Iq4Nl];
const BLOCKS: usize = 16;

/// Blocks, and what ggml makes of them.
fn blocks(dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
    let mut bytes =
        std::fs::read(data("ggml").join(dtype.name()).with_extension("bin")).expect("a file of the repository");
    let wide = bytes.split_off(BLOCKS * dtype.size());
    (bytes, wide.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().expect("4 bytes"))).collect())
}

#[test]
fn blocks_stand_for_what_ggml_makes_of_them() {
    for dtype in TYPES {
        let (bytes, wanted) = blocks(dtype);
        assert_eq!(wanted.len(), BLOCKS * 32);
        for (i, wanted) in wanted.iter().enumerate() {
            let found = KvFormat::of(dtype).element(&bytes[i / 32 * dtype.size()..], i % 32);
            assert_eq!(found.to_bits(), wanted.to_bits(), "{dtype:?} value {i}: {found} {wanted}");
        }
    }
}

/// Sharded over ranks, by every instruction set, against float64 over what ggml makes of the blocks.
#[test]
fn caches_of_such_blocks_are_attended() {
    let mut pool = Pool::default();
    for dtype in TYPES {
        let desc = AttentionDesc { k_dtype: dtype, v_dtype: dtype, ..AttentionDesc::new(4, 2, 64, 1) };
        for isa in treeattn::cpu::Isa::available() {
            for world in [1, 3] {
                let (bytes, wide) = blocks(dtype);
                let mut case = Case::plain(desc, world, &[(4, 1)], Values::Normal, 7);
                case.isa = isa.name().into();
                let sequence = &mut case.sequences[0];
                (sequence.k, sequence.v) = (wide.clone(), wide);
                (sequence.k_rows, sequence.v_rows) = (bytes.clone(), bytes);
                pool.check(&case);
            }
        }
    }
}
