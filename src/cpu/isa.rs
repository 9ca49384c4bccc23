//! Which instruction set the kernels use.

use std::sync::OnceLock;

use crate::device::environment;
use crate::error::{Error, ErrorKind, Result};

/// The environment variable that picks an instruction set.
pub const ENVIRONMENT: &str = "TREEATTN_CPU_ISA";

/// An instruction set that the kernels are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain code, on every machine.
    Scalar,
    /// x86-64 AVX2 with FMA and F16C.
    Avx2,
    /// x86-64 AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AArch64 NEON.
    Neon,
}

impl Isa {
    /// Every instruction set, the plainest first.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512];

    /// The word used in the environment, in configurations and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => has_avx2(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                has_avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The instruction sets of this machine, the best last.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The best instruction set of this machine.
    pub fn best() -> Isa {
        Isa::available().last().unwrap_or(Isa::Scalar)
    }

    /// The instruction set called `name`. `field` names the argument in errors: `InvalidArgument` for a word that is
    /// none, `Unavailable` for an instruction set that this machine lacks.
    pub fn by_name(field: &str, name: &str) -> Result<Isa> {
        let Some(isa) = Isa::ALL.into_iter().find(|isa| isa.name() == name) else {
            return Err(Error::invalid(field, format_args!("\"{name}\""), "scalar, avx2, avx512 or neon"));
        };
        if isa.is_available() {
            return Ok(isa);
        }
        let has: Vec<&str> = Isa::available().map(Isa::name).collect();
        let message = format!("{field}: found {name}, this machine has {}", has.join(", "));
        Err(Error::new(ErrorKind::Unavailable, message))
    }

    /// The name, and why it was chosen where the environment had a say.
    pub fn describe(self) -> String {
        let chosen = chosen();
        match &chosen.note {
            Some(note) if chosen.isa == self => format!("{} ({note})", self.name()),
            _ => self.name().to_string(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[derive(Debug)]
struct Chosen {
    isa: Isa,
    note: Option<String>,
}

impl Chosen {
    fn from(word: Option<&str>) -> Chosen {
        match word {
            None | Some("") => Chosen { isa: Isa::best(), note: None },
            Some(word) => match Isa::by_name(ENVIRONMENT, word) {
                Ok(isa) => Chosen { isa, note: Some(format!("{ENVIRONMENT}={word}")) },
                Err(error) => Chosen { isa: Isa::best(), note: Some(format!("{}: ignored", error.message())) },
            },
        }
    }
}

fn chosen() -> &'static Chosen {
    static CHOSEN: OnceLock<Chosen> = OnceLock::new();
    CHOSEN.get_or_init(|| Chosen::from(environment().cpu_isa.as_deref()))
}

/// The instruction set of this process: the environment's where it names one that this machine has, else the best.
/// Read once; [`Isa::describe`] says what was ignored.
pub fn isa() -> Isa {
    chosen().isa
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_pick_and_bad_words_are_reported() {
        assert_eq!(Chosen::from(Some("scalar")).isa, Isa::Scalar);
        assert_eq!(Chosen::from(None).isa, Isa::best());
        let bad = Chosen::from(Some("avx9"));
        assert_eq!(bad.isa, Isa::best());
        assert!(bad.note.unwrap().contains("\"avx9\""));
        assert_eq!(Isa::by_name("cpu_isa", "sse").unwrap_err().kind(), ErrorKind::InvalidArgument);
        let missing = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        assert_eq!(Isa::by_name("cpu_isa", missing).unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(Chosen::from(Some(missing)).isa, Isa::best());
    }
}
