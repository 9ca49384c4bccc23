//! Starts this program again on the GPUs that `tests/emulator` makes out of the CPU, with an NCCL for them.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Set where the emulator is what the loader finds.
const READY: &str = "TREEATTN_TEST_EMULATOR";

/// Builds the emulator, which takes a minute of the CPU the first time, and starts this program on it with the same
/// words and with `variables`, where they are not set. Gives back in the program that runs on it; or why there is none.
/// Call it first, with no other thread running.
pub fn enter(variables: &[(&str, &str)]) -> Result<(), String> {
    if std::env::var_os(READY).is_some() {
        return Ok(());
    }
    let folder = build()?;
    let mut paths = vec![folder];
    paths.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    let unset = variables.iter().filter(|(name, _)| std::env::var_os(name).is_none());
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let error = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env("LD_LIBRARY_PATH", std::env::join_paths(paths).map_err(|error| error.to_string())?)
        .env(READY, "1")
        .envs(unset.copied())
        .exec();
    Err(error.to_string())
}

/// The folder with the emulator's `libcuda.so`, built if it is not up to date. A compiler that fails is a failed test,
/// one that is missing is not.
pub fn build() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/build.sh");
    let output = Command::new(script).arg(&folder).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => build_nccl(&folder).map(|()| folder),
        Some(77) => Err(said.trim().to_string()),
        _ => panic!("the emulator does not compile: {said}"),
    }
}

/// Puts the stand-in for NCCL beside the driver. Renamed into place: other programs may be opening it.
fn build_nccl(folder: &Path) -> Result<(), String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mock_nccl/nccl.c");
    let temporary = folder.join(format!("libnccl.{}", std::process::id()));
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", "-O1", "-pthread", "-Wl,-soname,libnccl.so.2", "-o"])
        .arg(&temporary)
        .arg(source);
    let status = compiler.status().map_err(|error| error.to_string())?;
    assert!(status.success(), "the stand-in for NCCL does not compile");
    std::fs::rename(temporary, folder.join("libnccl.so.2")).map_err(|error| error.to_string())
}
