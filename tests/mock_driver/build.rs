//! Compiles the stand-in of the driver.

use std::path::Path;
use std::process::Command;

/// Puts it into `folder`, by both names that it is looked for. False where there is no compiler.
pub fn compile(folder: &Path) -> bool {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    // What images say of themselves.
    let header = std::fs::read_to_string(sources.join("kernels/abi.cuh")).unwrap();
    let hash = |name: &str| header.split_once(name).and_then(|(_, rest)| rest.split_once(';')).unwrap().0;
    let (abi, terms_abi, check_abi) = (hash("kAbi = "), hash("kTermsAbi = "), hash("kCheckAbi = "));
    ["libcuda.so", "libcuda.so.1"].iter().all(|name| {
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-pthread"])
            .args([format!("-DABI={abi}"), format!("-DTERMS_ABI={terms_abi}"), format!("-DCHECK_ABI={check_abi}")])
            .arg("-o")
            .arg(folder.join(name))
            .arg(sources.join("tests/mock_driver/cuda.c"));
        let Ok(status) = compiler.status() else { return false };
        assert!(status.success(), "{name} does not compile");
        true
    })
}
