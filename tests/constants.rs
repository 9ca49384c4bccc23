//! The values of public constants never change. Every one stands here once more, as programs were compiled with it, and
//! is held against the Rust codes and, by a C compiler, against the header.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use treeattn::ffi::codes::*;

trait Value {
    fn value(self) -> i64;
}

macro_rules! values {
    ($($name:ident)+) => { $(impl Value for $name { fn value(self) -> i64 { self.0.into() } })+ };
}

values! {
    treeattn_algorithm_t treeattn_device_kind_t treeattn_dtype_t treeattn_kv_layout_t treeattn_log_level_t treeattn_mask_kind_t treeattn_output_t treeattn_placement_kind_t treeattn_query_input_t treeattn_reproducibility_t treeattn_status_t
}

impl Value for u32 {
    fn value(self) -> i64 {
        self.into()
    }
}

macro_rules! constants {
    ($($name:ident = $value:literal;)+) => {
        /// Name, value in the Rust codes, value for ever.
        fn constants() -> Vec<(&'static str, i64, i64)> {
            vec![$((stringify!($name), $name.value(), $value)),+]
        }
    };
}

// One is added with its release; none is changed, and the value of one that goes is not used again.
constants! {
    // treeattn_status_t
    TREEATTN_OK = 0;
    TREEATTN_ERROR_INVALID_ARGUMENT = 1;
    TREEATTN_ERROR_BAD_HANDLE = 2;
    TREEATTN_ERROR_PARENT_DESTROYED = 3;
    TREEATTN_ERROR_UNSUPPORTED = 4;
    TREEATTN_ERROR_UNAVAILABLE = 5;
    TREEATTN_ERROR_MISMATCH = 6;
    TREEATTN_ERROR_DESYNC = 7;
    TREEATTN_ERROR_TIMEOUT = 8;
    TREEATTN_ERROR_PEER_LOST = 9;
    TREEATTN_ERROR_ABORTED = 10;
    TREEATTN_ERROR_INVALID_DATA = 11;
    TREEATTN_ERROR_NO_MEMORY = 12;
    TREEATTN_ERROR_NO_DEVICE_MEMORY = 13;
    TREEATTN_ERROR_CAPTURING = 14;
    TREEATTN_ERROR_CUDA = 15;
    TREEATTN_ERROR_CUDA_FATAL = 16;
    TREEATTN_ERROR_CUDA_PRIOR = 17;
    TREEATTN_ERROR_NCCL = 18;
    TREEATTN_ERROR_TRANSPORT = 19;
    TREEATTN_ERROR_SYSTEM = 20;
    TREEATTN_ERROR_INTERNAL = 21;
    TREEATTN_ERROR_BUSY = 22;
    TREEATTN_ERROR_EXECUTOR = 23;
    // treeattn_device_kind_t
    TREEATTN_DEVICE_CPU = 0;
    TREEATTN_DEVICE_CUDA = 1;
    // treeattn_log_level_t
    TREEATTN_LOG_ERROR = 1;
    TREEATTN_LOG_WARNING = 2;
    TREEATTN_LOG_INFO = 3;
    // treeattn_dtype_t
    TREEATTN_DTYPE_F32 = 1;
    TREEATTN_DTYPE_F16 = 2;
    TREEATTN_DTYPE_BF16 = 3;
    TREEATTN_DTYPE_F8_E4M3 = 4;
    TREEATTN_DTYPE_F8_E5M2 = 5;
    TREEATTN_DTYPE_Q8_0 = 6;
    TREEATTN_DTYPE_Q4_0 = 7;
    TREEATTN_DTYPE_INT8 = 8;
    TREEATTN_DTYPE_Q4_1 = 9;
    TREEATTN_DTYPE_Q5_0 = 10;
    TREEATTN_DTYPE_Q5_1 = 11;
    TREEATTN_DTYPE_IQ4_NL = 12;
    // treeattn_kv_layout_t
    TREEATTN_KV_LAYOUT_STRIDED = 0;
    TREEATTN_KV_LAYOUT_BLOCK_TABLE = 1;
    TREEATTN_KV_LAYOUT_CSR_PAGES = 2;
    // treeattn_placement_kind_t
    TREEATTN_PLACEMENT_CONTIGUOUS = 0;
    TREEATTN_PLACEMENT_INTERLEAVED = 1;
    TREEATTN_PLACEMENT_EXPLICIT = 2;
    // treeattn_mask_kind_t
    TREEATTN_MASK_NONE = 0;
    TREEATTN_MASK_ADDITIVE = 1;
    TREEATTN_MASK_BOOLEAN = 2;
    // treeattn_query_input_t
    TREEATTN_QUERY_INPUT_REPLICATED = 0;
    TREEATTN_QUERY_INPUT_SCATTERED = 1;
    // treeattn_output_t
    TREEATTN_OUTPUT_REPLICATED = 0;
    TREEATTN_OUTPUT_SCATTERED = 1;
    TREEATTN_OUTPUT_LOCAL = 2;
    TREEATTN_OUTPUT_WEIGHTED = 3;
    // treeattn_algorithm_t
    TREEATTN_ALGORITHM_AUTO = 0;
    TREEATTN_ALGORITHM_ONE_SHOT = 1;
    TREEATTN_ALGORITHM_TWO_SHOT = 2;
    TREEATTN_ALGORITHM_TREE = 3;
    TREEATTN_ALGORITHM_ALLREDUCE3 = 4;
    TREEATTN_ALGORITHM_RING = 5;
    // treeattn_reproducibility_t
    TREEATTN_REPRODUCIBILITY_REPEATABLE = 0;
    TREEATTN_REPRODUCIBILITY_BATCH_INVARIANT = 1;
    TREEATTN_REPRODUCIBILITY_CANONICAL = 2;
    // Flags
    TREEATTN_ATTENTION_KV_STABLE = 1;
    TREEATTN_ATTENTION_CHECKED = 2;
    TREEATTN_ATTENTION_SURPLUS_KEYS = 4;
    TREEATTN_ATTENTION_PAGES_BY_HEAD = 8;
    TREEATTN_MERGE_PLUS_INF_IS_EMPTY = 1;
    TREEATTN_MERGE_NAN_IS_EMPTY = 2;
    TREEATTN_TRANSPORT_STREAM_THREADS = 1;
    TREEATTN_EXECUTOR_CONCURRENT = 1;
}

/// Macros with arguments, and those of the version, which `src/ffi/version.rs` holds against the crate's.
const EXPRESSIONS: &[(&str, i64)] = &[
    ("TREEATTN_CPU(0)", 0),
    ("TREEATTN_CPU_NODE(2)", 3),
    ("TREEATTN_CUDA(0)", 65_536),
    ("TREEATTN_CUDA(65535)", 131_071),
    ("TREEATTN_DEVICE(TREEATTN_DEVICE_CUDA, 3)", 65_539),
    ("TREEATTN_DEVICE(TREEATTN_DEVICE_CPU, 1)", 1),
];
const OF_THE_VERSION: &[&str] =
    &["TREEATTN_VERSION_MAJOR", "TREEATTN_VERSION_MINOR", "TREEATTN_VERSION_PATCH", "TREEATTN_ABI_VERSION"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn rust_codes_have_the_frozen_values() {
    for (name, found, wanted) in constants() {
        assert_eq!(found, wanted, "{name}");
    }
}

#[test]
fn the_header_has_the_frozen_values() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("constants");
    std::fs::create_dir_all(&folder).unwrap();
    let mut program = String::from("#include <treeattn.h>\n");
    let frozen = constants().into_iter().map(|(name, _, value)| (name, value)).chain(EXPRESSIONS.iter().copied());
    for (name, value) in frozen {
        program += &format!("_Static_assert(({name}) == {value}, \"{name}\");\n");
    }
    std::fs::write(folder.join("constants.c"), program).unwrap();
    let mut compile = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    compile.args(["-std=c11", "-fsyntax-only", "-I"]).arg(root().join("include")).arg(folder.join("constants.c"));
    let output = compile.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_constant_is_frozen() {
    let header = std::fs::read_to_string(root().join("include/treeattn.h")).unwrap();
    let is_number = |text: &str| text.parse::<i64>().is_ok();
    let public: BTreeSet<&str> = header
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_once(' '))
        .filter(|(name, value)| name.starts_with("TREEATTN_") && is_number(value))
        .map(|(name, _)| name)
        .filter(|name| !OF_THE_VERSION.contains(name))
        .collect();
    let frozen: BTreeSet<&str> = constants().into_iter().map(|(name, ..)| name).collect();
    assert_eq!(public, frozen, "the header and the list of this test differ");
    // What the header defines in another way is a macro with arguments, an initial value, or the version as a number.
    let others = header.lines().filter_map(|line| line.strip_prefix("#define TREEATTN_")?.split_once(' '));
    for (name, _) in others.filter(|(_, value)| !is_number(value)) {
        let known = ["DEVICE(kind,", "CPU(n)", "CPU_NODE(n)", "CUDA(n)", "VERSION", "INIT_(type)"];
        assert!(known.contains(&name) || name.ends_with("_INIT"), "TREEATTN_{name}: no test knows its value");
    }
}
