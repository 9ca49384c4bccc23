//! The C++ layer: compiles without a warning and does what tests/cpp says.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with the library that was built with this test, under the name that it is loaded by.
fn library_folder() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cpp");
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["libtreeattn.so", concat!("libtreeattn.so.0.", env!("CARGO_PKG_VERSION_MINOR"))] {
        let link = folder.join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(test.parent().unwrap().join("libtreeattn.so"), link).unwrap();
    }
    folder
}

#[test]
fn raii() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = library_folder();
    let program = folder.join("raii");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let compiled = Command::new(&compiler)
        .args(["-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-pthread"])
        .arg("-I")
        .arg(root.join("include"))
        .arg(root.join("tests/cpp/raii.cpp"))
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(&folder)
        .arg("-ltreeattn")
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(&program).env("LD_LIBRARY_PATH", &folder).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
