//! What is asked: shapes, tensors, steps, placement, the energy, and the float64 reference that everything is held against.
//!
//! Plain data and checks; depends on nothing but [`crate::error`] and, for what bad data is,
//! [`crate::partial`]. Backends, the runtime and the C ABI build on it.

mod block;
pub mod capability;
pub mod decode_args;
pub mod descriptor;
pub mod dtype;
pub mod energy;
pub mod format;
pub mod head_values;
pub mod majority;
pub mod mask;
pub mod merge;
pub mod placement;
pub mod record;
pub mod reference;
pub mod scales;
pub mod score;
pub mod step;
mod step_arrays;
mod step_room;
mod strided_cache;
pub mod tensor;
mod unused_args;
pub mod visibility;

pub use block::IQ4_NL;
pub use capability::{Capabilities, WideHeads, step_supported, supported};
pub use decode_args::DecodeArgs;
pub use descriptor::{
    Algorithm, AttentionDesc, KvLayout, MAX_HEAD_DIM, MaskKind, OutputMode, QueryInput, Reproducibility,
};
pub use dtype::Dtype;
pub use format::KvFormat;
pub use mask::{Mask, MaskElement};
pub use placement::{Placement, Shard, head_range};
pub use record::SequenceRecord;
pub use scales::finite_or_nan;
pub use score::{ScoreMod, ScoreTerms};
pub use step::Step;
pub use step_arrays::Keys;
pub use tensor::Tensor;
pub use visibility::{KeyPositions, Visibility, VisibilityRule};
