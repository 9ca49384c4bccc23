//! Rows widened to packed f32.

use super::args::WidenArgs;
use crate::cpu::simd::codec::Codec;
use crate::cpu::simd::vector::Simd;

/// Widens rows to packed f32, zero-padded to a multiple of 16 elements. Serves any stride along the row.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn widen<S: Simd, E: Codec>(a: &WidenArgs) {
    // SAFETY: rows stay below `count`; elements read below `dim`, those written below the padded one.
    unsafe {
        let padded = a.dim.next_multiple_of(16);
        for t in 0..a.count {
            let from = (*a.rows.add(t)).add(a.offset);
            let to = a.out.add(t * padded);
            let mut d = 0;
            let n = E::FORMAT.block_elements();
            if n > 1 {
                // Rows end where blocks do, and blocks where vectors do.
                while d < a.dim {
                    let block = from.offset((d / n) as isize * a.stride as isize);
                    S::store(to.add(d), E::load::<S>(block, d % n));
                    d += S::LANES;
                }
            } else if E::FORMAT.is_packed(a.stride) {
                while d + S::LANES <= a.dim {
                    S::store(to.add(d), E::load::<S>(from, d));
                    d += S::LANES;
                }
            }
            while d < a.dim {
                *to.add(d) = E::load_one(from, a.stride, d);
                d += 1;
            }
            while d < padded {
                *to.add(d) = 0.0;
                d += 1;
            }
        }
    }
}
