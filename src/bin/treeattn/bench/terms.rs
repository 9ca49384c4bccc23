//! Terms that a step is timed with.

use half::f16;
use serde::{Serialize, Serializer};
use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, MaskKind, Tensor};

/// Which terms, by the name of their set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms(&'static str);

/// The sets of terms that can be asked for.
pub const NAMES: [&str; 7] = ["plain", "softcap", "alibi", "sinks", "mask", "window", "all"];
/// Keys of the window.
const WINDOW: i32 = 4096;

impl Terms {
    /// None.
    pub const PLAIN: Terms = Terms("plain");

    /// The set called `name`.
    pub fn parse(name: &str) -> Result<Terms, String> {
        NAMES.into_iter().find(|&known| known == name).map(Terms).ok_or_else(|| format!("wanted one of {NAMES:?}"))
    }

    /// In words, if there are any.
    pub fn words(self) -> Option<String> {
        match self.0 {
            "plain" => None,
            "all" => Some("softcap, alibi, sinks, mask".into()),
            "window" => Some(format!("window of {WINDOW}")),
            name => Some(name.into()),
        }
    }

    /// Keys that a query sees, if not all.
    pub fn window(self) -> Option<usize> {
        (self.0 == "window").then_some(WINDOW as usize)
    }

    fn has(self, name: &str) -> bool {
        self.0 == name || self.0 == "all"
    }

    /// Asks for them.
    pub fn describe(self, desc: &mut AttentionDesc) {
        desc.window = if self.window().is_some() { WINDOW } else { 0 };
        desc.softcap = if self.has("softcap") { 30.0 } else { 0.0 };
        (desc.alibi, desc.sinks) = (self.has("alibi"), self.has("sinks"));
        if self.has("mask") {
            (desc.mask, desc.mask_dtype) = (MaskKind::Additive, Some(Dtype::F16));
        }
    }
}

impl Serialize for Terms {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0)
    }
}

/// What a rank's steps pass for them.
pub struct TermInputs {
    terms: Terms,
    slopes: Vec<f32>,
    sinks: Vec<f32>,
    /// One bias a key for all sequences, heads and query tokens, none of them 0.
    mask: Vec<u16>,
}

impl TermInputs {
    /// Those of a rank that holds `keys` keys of each sequence.
    pub fn new(terms: Terms, heads: usize, keys: usize) -> TermInputs {
        let slopes = (1..=heads).map(|head| 2f32.powf(-8.0 * head as f32 / heads as f32)).collect();
        let bias = |key: usize| f16::from_f32(0.25 + (key % 7) as f32 / 16.0).to_bits();
        let mask = if terms.has("mask") { (0..keys).map(bias).collect() } else { Vec::new() };
        TermInputs { terms, slopes, sinks: vec![0.5; heads], mask }
    }

    /// Slopes, sinks and mask, as bytes.
    pub fn bytes(&self) -> [Vec<u8>; 3] {
        let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        [floats(&self.slopes), floats(&self.sinks), self.mask.iter().flat_map(|x| x.to_ne_bytes()).collect()]
    }

    /// Passes those that lie at `at`, in the order of [`TermInputs::bytes`].
    pub fn pass_from(&self, at: [*mut std::ffi::c_void; 3], args: &mut DecodeArgs) {
        self.pass(args);
        for (tensor, at) in [&mut args.alibi_slopes, &mut args.sinks, &mut args.mask].into_iter().zip(at) {
            if !tensor.data.is_null() {
                tensor.data = at;
            }
        }
    }

    /// Passes them.
    pub fn pass(&self, args: &mut DecodeArgs) {
        if self.terms.has("alibi") {
            args.alibi_slopes = Tensor::from_slice(&self.slopes);
        }
        if self.terms.has("sinks") {
            args.sinks = Tensor::from_slice(&self.sinks);
        }
        if self.terms.has("mask") {
            args.mask = Tensor::from_slice(&self.mask).with_strides([0, 0, 0, 2]);
        }
    }
}
