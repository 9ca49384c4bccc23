//! What a backend serves, as data, and the one check of a descriptor against it.

use super::decode_args::DecodeArgs;
use super::descriptor::{AttentionDesc, MaskKind, QueryInput, Reproducibility};
use super::dtype::Dtype;
use crate::error::{Error, Result};

/// What a backend serves of heads with a dimension beyond [`Capabilities::max_head_dim`].
#[derive(Clone, Copy, Debug)]
pub struct WideHeads {
    /// The largest dimension of q and k.
    pub max_qk: i32,
    /// The largest dimension of v.
    pub max_v: i32,
    /// Element types of k and v, which are of the same one. They have no scales.
    pub kv_dtypes: &'static [Dtype],
}

impl Capabilities {
    /// What is served of a descriptor with a dimension beyond [`Capabilities::max_head_dim`]; None: its heads are not wide.
    fn wide(&self, desc: &AttentionDesc) -> Option<&WideHeads> {
        self.wide.as_ref().filter(|_| desc.head_dim_qk.max(desc.head_dim_v) > self.max_head_dim)
    }
}

/// What a backend serves of the descriptor's optional parts.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// Ends what messages say is supported, where that depends on the backend: " on a GPU", or nothing.
    pub suffix: &'static str,
    /// Element types of k and v.
    pub kv_dtypes: &'static [Dtype],
    /// Head dimensions of q, k and v are multiples of this ...
    pub head_dim_multiple: i32,
    /// ... up to this.
    pub max_head_dim: i32,
    /// What is served beyond it.
    pub wide: Option<WideHeads>,
    /// A window.
    pub window: bool,
    /// A softcap.
    pub softcap: bool,
    /// ALiBi slopes.
    pub alibi: bool,
    /// Sinks.
    pub sinks: bool,
    /// Scales of keys and values.
    pub scales: bool,
    /// Checks of what the ranks pass to a step.
    pub checked: bool,
    /// Lists of pages that kv heads have of their own.
    pub pages_by_head: bool,
    /// Kinds of masks.
    pub masks: &'static [MaskKind],
    /// What ranks may pass as q.
    pub query_inputs: &'static [QueryInput],
    /// Reproducibility modes.
    pub reproducibility: &'static [Reproducibility],
}

/// Whether what `backend` serves covers `desc`, a checked descriptor: `Unsupported` names the field that it does not.
///
/// A merge-only plan asks nothing of it.
pub fn supported(desc: &AttentionDesc, backend: &Capabilities) -> Result<()> {
    let one_of = |field: &str, found: &str, is_served: bool, served: &mut dyn Iterator<Item = &'static str>| {
        if is_served { Ok(()) } else { Err(Error::unsupported(field, found, list(served) + backend.suffix)) }
    };
    let off = |field: &str, is_off: bool, found: String, is_served: bool| {
        if is_off || is_served { Ok(()) } else { Err(Error::unsupported(field, found, format!("0{}", backend.suffix))) }
    };
    let off_flag = |flag: &str, is_set: bool, is_served: bool| {
        if !is_set || is_served {
            Ok(())
        } else {
            Err(Error::unsupported("flags", flag, format!("0{}", backend.suffix)))
        }
    };
    if desc.is_merge_only() {
        return Ok(());
    }
    for (field, dtype) in [("k_dtype", desc.k_dtype), ("v_dtype", desc.v_dtype)] {
        let served = backend.kv_dtypes.contains(&dtype);
        one_of(field, dtype.name(), served, &mut backend.kv_dtypes.iter().map(|dtype| dtype.name()))?;
    }
    let multiple = backend.head_dim_multiple;
    let (max_qk, max_v) =
        backend.wide.map_or((backend.max_head_dim, backend.max_head_dim), |wide| (wide.max_qk, wide.max_v));
    for (field, dim, most) in [("head_dim_qk", desc.head_dim_qk, max_qk), ("head_dim_v", desc.head_dim_v, max_v)] {
        if dim % multiple != 0 || dim > most {
            let served = format!("multiples of {multiple} up to {most}{}", backend.suffix);
            return Err(Error::unsupported(field, dim, served));
        }
    }
    if let Some(wide) = backend.wide(desc) {
        let beyond = format!(" with head dimensions beyond {}{}", backend.max_head_dim, backend.suffix);
        let mut names = wide.kv_dtypes.iter().map(|dtype| dtype.name());
        if !wide.kv_dtypes.contains(&desc.k_dtype) {
            return Err(Error::unsupported("k_dtype", desc.k_dtype.name(), list(&mut names) + &beyond));
        }
        if desc.v_dtype != desc.k_dtype {
            return Err(Error::unsupported("v_dtype", desc.v_dtype.name(), desc.k_dtype.name().to_string() + &beyond));
        }
    }
    off("window", desc.window == 0, desc.window.to_string(), backend.window)?;
    off("softcap", desc.softcap == 0.0, desc.softcap.to_string(), backend.softcap)?;
    off("alibi", !desc.alibi, "1".into(), backend.alibi)?;
    off("sinks", !desc.sinks, "1".into(), backend.sinks)?;
    for (flag, is_set, is_served) in
        [("CHECKED", desc.checked, backend.checked), ("PAGES_BY_HEAD", desc.pages_by_head, backend.pages_by_head)]
    {
        off_flag(flag, is_set, is_served)?;
    }
    let served = backend.masks.contains(&desc.mask);
    one_of("mask", desc.mask.name(), served, &mut backend.masks.iter().map(|m| m.name()))?;
    let served = backend.query_inputs.contains(&desc.query_input);
    one_of("query_input", desc.query_input.name(), served, &mut backend.query_inputs.iter().map(|q| q.name()))?;
    let modes = backend.reproducibility;
    let served = modes.contains(&desc.reproducibility);
    one_of("reproducibility", desc.reproducibility.name(), served, &mut modes.iter().map(|r| r.name()))
}

/// Whether what `backend` serves covers what a step brings along: `Unsupported` names the argument that it does not.
pub fn step_supported(desc: &AttentionDesc, args: &DecodeArgs, backend: &Capabilities) -> Result<()> {
    let beyond = match backend.wide(desc) {
        None => String::new(),
        Some(_) => format!(" with head dimensions beyond {}", backend.max_head_dim),
    };
    for (name, scales) in [("k_scale", &args.k_scale), ("v_scale", &args.v_scale)] {
        if !scales.data.is_null() && (!backend.scales || !beyond.is_empty()) {
            let served = format!("NULL{beyond}{}", backend.suffix);
            return Err(Error::unsupported(name, format_args!("{:p}", scales.data), served));
        }
    }
    Ok(())
}

/// "a", "a and b", "a, b and c".
fn list(names: &mut dyn Iterator<Item = &'static str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.split_last() {
        None => "none".into(),
        Some((last, [])) => (*last).into(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::tensor::Tensor;
    use crate::error::ErrorKind;

    const SERVED: Capabilities = Capabilities {
        suffix: " on a test",
        kv_dtypes: &[Dtype::F32, Dtype::F16, Dtype::Bf16],
        head_dim_multiple: 8,
        max_head_dim: 256,
        wide: None,
        window: false,
        softcap: false,
        alibi: false,
        sinks: false,
        scales: false,
        checked: false,
        pages_by_head: false,
        masks: &[MaskKind::None],
        query_inputs: &[QueryInput::Replicated],
        reproducibility: &[Reproducibility::Repeatable],
    };

    /// Sets one field of a descriptor.
    type Set = fn(&mut AttentionDesc);
    /// Adds what a backend serves.
    type Serve = fn(&mut Capabilities);

    #[test]
    fn each_field_is_refused_by_name_and_served_where_the_data_says_so() {
        let base = AttentionDesc::new(2, 1, 64, 10);
        supported(&base, &SERVED).unwrap();
        let cases: [(&str, &str, Set, Serve); 13] = [
            (
                "k_dtype: found q8_0",
                "f32, f16 and bf16 on a test",
                |d| d.k_dtype = Dtype::Q8_0,
                |c| {
                    c.kv_dtypes = &[Dtype::Q8_0, Dtype::F32];
                },
            ),
            (
                "v_dtype: found f8_e4m3",
                "f32, f16 and bf16 on a test",
                |d| d.v_dtype = Dtype::F8E4M3,
                |c| {
                    c.kv_dtypes = &[Dtype::F8E4M3, Dtype::F32];
                },
            ),
            (
                "head_dim_qk: found 60",
                "multiples of 8 up to 256 on a test",
                |d| d.head_dim_qk = 60,
                |c| {
                    c.head_dim_multiple = 4;
                },
            ),
            (
                "head_dim_v: found 264",
                "multiples of 8 up to 256 on a test",
                |d| d.head_dim_v = 264,
                |c| {
                    c.max_head_dim = 264;
                },
            ),
            ("window: found 3", "0 on a test", |d| d.window = 3, |c| c.window = true),
            ("softcap: found 0.5", "0 on a test", |d| d.softcap = 0.5, |c| c.softcap = true),
            ("alibi: found 1", "0 on a test", |d| d.alibi = true, |c| c.alibi = true),
            ("sinks: found 1", "0 on a test", |d| d.sinks = true, |c| c.sinks = true),
            ("flags: found CHECKED", "0 on a test", |d| d.checked = true, |c| c.checked = true),
            ("flags: found PAGES_BY_HEAD", "0 on a test", |d| d.pages_by_head = true, |c| c.pages_by_head = true),
            (
                "mask: found BOOLEAN",
                "NONE on a test",
                |d| d.mask = MaskKind::Boolean,
                |c| c.masks = &[MaskKind::Boolean],
            ),
            (
                "query_input: found SCATTERED",
                "REPLICATED on a test",
                |d| d.query_input = QueryInput::Scattered,
                |c| {
                    c.query_inputs = &[QueryInput::Scattered];
                },
            ),
            (
                "reproducibility: found CANONICAL",
                "REPEATABLE on a test",
                |d| d.reproducibility = Reproducibility::Canonical,
                |c| {
                    c.reproducibility = &[Reproducibility::Canonical];
                },
            ),
        ];
        for (found, wanted, set, serve) in cases {
            let (mut desc, mut backend) = (base, SERVED);
            set(&mut desc);
            let error = supported(&desc, &backend).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert_eq!(error.message(), format!("{found}, this build supports {wanted}"));
            serve(&mut backend);
            supported(&desc, &backend).unwrap();
        }
        let scale = 1f32;
        let args = DecodeArgs { v_scale: Tensor::from_slice(&[scale]), ..DecodeArgs::default() };
        let error = step_supported(&base, &args, &SERVED).unwrap_err();
        assert!(error.message().starts_with("v_scale: found 0x"), "{error}");
        assert!(error.message().ends_with("NULL on a test"), "{error}");
        let scaled = Capabilities { scales: true, ..SERVED };
        step_supported(&base, &args, &scaled).unwrap();

        let wide = WideHeads { max_qk: 576, max_v: 512, kv_dtypes: &[Dtype::F16, Dtype::Bf16] };
        let backend = Capabilities { wide: Some(wide), ..scaled };
        let latent = AttentionDesc { head_dim_qk: 576, head_dim_v: 512, ..base };
        let of_type = |k_dtype, v_dtype| AttentionDesc { k_dtype, v_dtype, ..latent };
        supported(&of_type(Dtype::F16, Dtype::F16), &backend).unwrap();
        supported(&base, &backend).unwrap();
        step_supported(&base, &args, &backend).unwrap();
        let refused = [
            (of_type(Dtype::F32, Dtype::F32), "k_dtype: found f32"),
            (of_type(Dtype::F16, Dtype::Bf16), "v_dtype: found bf16"),
            (AttentionDesc { head_dim_v: 520, ..of_type(Dtype::F16, Dtype::F16) }, "head_dim_v: found 520"),
            (AttentionDesc { head_dim_qk: 584, ..of_type(Dtype::F16, Dtype::F16) }, "head_dim_qk: found 584"),
        ];
        for (desc, found) in refused {
            let error = supported(&desc, &backend).unwrap_err();
            assert!(error.message().starts_with(found), "{error}");
        }
        let error = step_supported(&of_type(Dtype::F16, Dtype::F16), &args, &backend).unwrap_err();
        assert!(error.message().ends_with("NULL with head dimensions beyond 256 on a test"), "{error}");
        supported(&AttentionDesc { kv_heads: 0, window: 7, ..base }, &SERVED).unwrap();
    }
}
