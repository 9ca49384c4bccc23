//! The decode kernels of a plan: which of the image it needs, and which of them takes a step.

use super::params::{KernelLaunch, MIN_TILES, MOST_PARTIALS, PARTIALS_A_BLOCK, TILE};
use super::{abi, terms};
use crate::attention::{AttentionDesc, Dtype, WideHeads};
use crate::device::cuda::{Image, Kernel};
use crate::error::{Error, ErrorKind, Result};

/// The largest head dimension of q, k and v that kernels of all types are compiled for.
pub(super) const MAX_HEAD_DIM: i32 = 256;
/// What `kernels/decode_wide.cu` serves beyond it.
pub(super) const WIDE: WideHeads = WideHeads { max_qk: 576, max_v: 512, kv_dtypes: &[Dtype::F16, Dtype::Bf16] };
/// The smaller head dimensions that kernels are compiled for, (qk, v): a shape runs in the first class that holds it.
const CLASSES: [(i32, i32); 4] = [(64, 64), (96, 96), (128, 128), (192, 128)];
/// Those of kernels that know terms.
const TERMS_CLASSES: [(i32, i32); 2] = [(64, 64), (128, 128)];

/// What the names of those of `decode_wide.cu` that take v as a view of k begin with.
const WIDE_VIEW: &str = "treeattn_decode_wide_view";

/// The first class that holds the head dimensions, which the backend's capabilities limit to those of the largest.
fn class(desc: &AttentionDesc, smaller: &[(i32, i32)]) -> (i32, i32) {
    let fits = |&&(qk, v): &&(i32, i32)| desc.head_dim_qk <= qk && desc.head_dim_v <= v;
    smaller.iter().find(fits).copied().unwrap_or((MAX_HEAD_DIM, MAX_HEAD_DIM))
}

/// A decode kernel with its grid.
pub(super) struct Decode {
    pub kernel: Kernel,
    pub launch: KernelLaunch,
    pub grid: u32,
    /// Whether it takes `TermsParams`.
    pub takes_terms: bool,
    /// Whether it is one of `decode_narrow.cu`, which takes k and v of all types, and scales.
    pub takes_all_types: bool,
    /// Whether it is one of `decode_blocks.cu`, which copies whole units where all rows begin as far into one.
    pub takes_blocks: bool,
    /// Whether it is one of `decode_wide.cu` that takes v as a view of k.
    pub takes_view: bool,
}

impl Decode {
    /// The kernel `treeattn_NAME` of `kernels/SOURCE.cu`.
    fn new(image: &Image, source: &str, name: &str, sharing: usize) -> Result<Decode> {
        abi::check(image, source)?;
        let mut bytes = [0; size_of::<KernelLaunch>()];
        image.constant(&format!("{name}_launch"), &mut bytes)?;
        let launch = KernelLaunch::from_bytes(bytes);
        let kernel = image.kernel(name, launch.threads as u32, launch.dynamic_smem as u32)?;
        let grid = (image.device().units * launch.blocks_per_sm / sharing.clamp(1, 1 << 16) as i32).max(1);
        if launch.blocks_per_sm < 1 || launch.partial_bytes < 1 || launch.counters < 1 {
            return Err(Error::new(ErrorKind::Internal, format!("{name}: found {launch:?} in the image")));
        }
        let takes_all_types = source == "decode_narrow";
        let takes_blocks = source == "decode_blocks";
        let takes_terms =
            takes_all_types || takes_blocks || matches!(source, "decode_terms" | "decode_packed" | "decode_wide");
        let takes_view = name.starts_with(WIDE_VIEW);
        Ok(Decode { kernel, launch, grid: grid as u32, takes_terms, takes_all_types, takes_blocks, takes_view })
    }

    /// Bytes of its split partials, and of the sums that its warps close in the plan's longest steps.
    pub fn partials(&self, desc: &AttentionDesc) -> usize {
        let partials = PARTIALS_A_BLOCK * self.grid as usize * self.launch.partial_bytes as usize;
        let long = most_tiles(desc, self.launch.rows, self.grid) > self.launch.open_tiles as u64;
        partials + if long { self.grid as usize * self.launch.long_bytes as usize } else { 0 }
    }

    /// Bytes of its counters.
    pub fn counters(&self) -> usize {
        size_of::<u32>() * self.grid as usize * self.launch.counters as usize
    }
}

/// No block of a grid of `grid` gets more key tiles of an item in any step of the plan: `rows` packed query rows of a sequence and
/// a kv head make an item. `kernels/schedule.cuh` says who gets what.
fn most_tiles(desc: &AttentionDesc, rows: i32, grid: u32) -> u64 {
    let count = |x: i32| u64::from(x.unsigned_abs());
    let longest = count(desc.max_kv_length).div_ceil(TILE);
    let row_tiles = count(desc.max_query_tokens) * count(desc.group()) / count(rows).max(1) + count(desc.max_batch);
    let all = u128::from(longest) * u128::from(count(desc.kv_heads)) * u128::from(row_tiles);
    // A single sequence's items may leave a part of the grid idle, less than half of it.
    let share = u64::try_from(2 * all.div_ceil(u128::from(grid.max(1)))).unwrap_or(u64::MAX);
    // Slices are so long that an item, which may begin inside one, has no more than MOST_PARTIALS, and no shorter than MIN_TILES.
    share.max(longest / (MOST_PARTIALS - 1) + MIN_TILES).min(longest)
}

/// The kernels of a plan, by the packed query rows of a sequence: heads of a group x query tokens.
pub(super) struct Kernels {
    /// Up to 2 rows.
    fma: Option<Decode>,
    /// Up to 8 rows, and any number where there is no wider kernel.
    narrow: Option<Decode>,
    /// More.
    wide: Option<Decode>,
    /// Any number of rows of queries, where rows of k and v are of one byte an element and lie in whole units, or in blocks that
    /// lie in words; of wide heads, where v is a view of k.
    packed: Option<Decode>,
    /// For steps with scales, and where there is no other.
    all_types: Option<Decode>,
}

impl Kernels {
    /// Loads those that the plan's steps can need.
    pub fn new(image: &Image, desc: &AttentionDesc, sharing: usize) -> Result<Kernels> {
        let (qk, v) = class(desc, &CLASSES);
        let (terms_qk, terms_v) = class(desc, &TERMS_CLASSES);
        let group = i64::from(desc.group());
        let load = |wanted: bool, source: &str, name: String| match wanted {
            true => Decode::new(image, source, &name, sharing).map(Some),
            false => Ok(None),
        };
        if desc.head_dim_qk.max(desc.head_dim_v) > MAX_HEAD_DIM {
            let dtype = desc.k_dtype.name();
            let narrow = load(true, "decode_wide", format!("treeattn_decode_wide_{dtype}"))?;
            let has_view = desc.head_dim_v <= desc.head_dim_qk;
            let packed = load(has_view, "decode_wide", format!("{WIDE_VIEW}_{dtype}"))?;
            return Ok(Kernels { fma: None, narrow, wide: None, packed, all_types: None });
        }
        let alike = desc.k_dtype == desc.v_dtype;
        let dtypes = match alike {
            true => desc.k_dtype.name().to_string(),
            false => format!("{}_{}", desc.k_dtype.name(), desc.v_dtype.name()),
        };
        let all_types = load(true, "decode_narrow", format!("treeattn_decode_narrow_d{terms_qk}x{terms_v}_r8"))?;
        let family = terms::packed_family(desc);
        let name = format!("treeattn_{}_d{qk}x{v}_r8_{dtypes}", family.unwrap_or_default());
        let packed = load(family.is_some(), family.unwrap_or_default(), name)?;
        let has_terms = terms::are_in(desc);
        let is_half = |dtype: Dtype| matches!(dtype, Dtype::F16 | Dtype::Bf16);
        if !is_half(desc.k_dtype) || !is_half(desc.v_dtype) || has_terms && !alike {
            return Ok(Kernels { fma: None, narrow: None, wide: None, packed, all_types });
        }
        if has_terms {
            let name = format!("treeattn_decode_terms_d{terms_qk}x{terms_v}_r8_{dtypes}");
            let narrow = load(true, "decode_terms", name)?;
            return Ok(Kernels { fma: None, narrow, wide: None, packed, all_types });
        }
        let mma = |rows: i32| format!("treeattn_decode_mma_d{qk}x{v}_r{rows}_{dtypes}");
        let fma = format!("treeattn_decode_fma_d{qk}x{v}_r2_{dtypes}");
        let has_fma = group <= 2 && image.has(&fma)?;
        let most = group * i64::from(desc.max_query_tokens);
        // Where k and v differ, and for 256 dimensions, more rows run as more tiles of 8.
        let has_wide = alike && qk <= 128;
        Ok(Kernels {
            fma: load(has_fma, "decode_fma", fma)?,
            narrow: load((most > 2 || !has_fma) && (group <= 8 || !has_wide), "decode_mma", mma(8))?,
            wide: load(most > 8 && has_wide, "decode_mma", mma(16))?,
            packed,
            all_types,
        })
    }

    pub fn all(&self) -> impl Iterator<Item = &Decode> {
        [&self.fma, &self.narrow, &self.wide, &self.packed, &self.all_types].into_iter().flatten()
    }

    /// The kernel for sequences of about `rows` rows, of a step that has scales or none, and whose k and v lie as packed kernels
    /// want them or do not; each is right for any number.
    pub fn choose(&self, rows: i64, scaled: bool, lies_packed: impl FnOnce(&Decode) -> bool) -> Option<&Decode> {
        if let Some(packed) = self.packed.as_ref().filter(|decode| lies_packed(decode)) {
            return Some(packed);
        }
        if scaled {
            return self.all_types.as_ref();
        }
        let chosen = match rows {
            ..=2 => self.fma.as_ref().or(self.narrow.as_ref()).or(self.wide.as_ref()),
            3..=8 => self.narrow.as_ref().or(self.wide.as_ref()).or(self.fma.as_ref()),
            _ => self.wide.as_ref().or(self.narrow.as_ref()).or(self.fma.as_ref()),
        };
        chosen.or(self.all_types.as_ref())
    }
}
