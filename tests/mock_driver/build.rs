//! What tests over the stand-in of the driver share: how it is compiled, and how a test ends.

use std::panic::{UnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;

use libtest_mimic::Failed;

/// Puts it into `folder`, by both names that it is looked for. False where there is no compiler.
pub fn compile(folder: &Path) -> bool {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    // What images say of themselves.
    let header = std::fs::read_to_string(sources.join("kernels/abi.cuh")).unwrap();
    let hash = |name: &str| header.split_once(name).and_then(|(_, rest)| rest.split_once(';')).unwrap().0;
    let [abi, terms_abi, check_abi, gather_abi] =
        ["kAbi = ", "kTermsAbi = ", "kCheckAbi = ", "kGatherAbi = "].map(hash);
    ["libcuda.so", "libcuda.so.1"].iter().all(|name| {
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-pthread"])
            .args([
                format!("-DABI={abi}"),
                format!("-DTERMS_ABI={terms_abi}"),
                format!("-DCHECK_ABI={check_abi}"),
                format!("-DGATHER_ABI={gather_abi}"),
            ])
            .arg("-o")
            .arg(folder.join(name))
            .arg(sources.join("tests/mock_driver/cuda.c"));
        let Ok(status) = compiler.status() else { return false };
        assert!(status.success(), "{name} does not compile");
        true
    })
}

/// What a test's body comes to: that it failed, with the text of its panic.
pub fn outcome(body: impl FnOnce() + UnwindSafe) -> Result<(), Failed> {
    catch_unwind(body).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Failed::from(text.or(panic.downcast_ref::<&str>().map(|text| text.to_string())).unwrap_or_default())
    })
}
