//! A panic in every export comes back to C as a status, and a fault in the middle of a step reaches all ranks. The library
//! that cargo ships has no faults to arm, so the tests build one that has, in a target folder of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command and panics with its output unless it succeeds.
fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{said}", output.status);
    text
}

/// A folder with a library that has faults, under its link name and its soname.
fn faulty_library() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault");
    // As cheap as it gets: the C library alone, not optimised, without debug information.
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--lib", "--no-default-features", "--features", "fault-injection", "--offline", "--quiet"]);
    build.arg("--manifest-path").arg(root().join("Cargo.toml")).arg("--target-dir").arg(&target);
    // What cargo tells this test is about another build.
    for name in ["CARGO_BUILD_TARGET", "CARGO_ENCODED_RUSTFLAGS"] {
        build.env_remove(name);
    }
    succeed(build.env("CARGO_PROFILE_DEV_DEBUG", "0").env("CARGO_INCREMENTAL", "0"));
    let folder = target.join("link");
    std::fs::create_dir_all(&folder).unwrap();
    let soname = concat!("libtreeattn.so.", env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));
    for name in ["libtreeattn.so", soname] {
        let link = folder.join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(target.join("debug/libtreeattn.so"), link).unwrap();
    }
    folder
}

/// Compiles a program of `tests/fault` with a library that has faults, and runs it.
fn run_program(name: &str) {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(faulty_library);
    let program = folder.join(name);
    let mut compile = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    compile.args([
        "-std=c99",
        "-D_POSIX_C_SOURCE=200809L",
        "-Wall",
        "-Wextra",
        "-pedantic",
        "-Werror",
        "-g",
        "-pthread",
    ]);
    compile.arg("-I").arg(root().join("include")).arg(root().join(format!("tests/fault/{name}.c"))).arg("-o");
    succeed(compile.arg(&program).arg("-L").arg(folder).args(["-ltreeattn", "-lm"]));
    let said = succeed(
        Command::new(&program).env("LD_LIBRARY_PATH", folder).env_remove("TREEATTN_FAULTS").env("RUST_BACKTRACE", "0"),
    );
    assert!(said.contains(&format!("{name}: ok")), "{said}");
}

#[test]
fn a_panic_in_every_export_is_a_status() {
    run_program("exports");
}

#[test]
fn a_fault_in_a_step_of_one_rank_ends_it_on_all() {
    run_program("steps");
}

#[test]
fn no_export_is_left_out() {
    let program = std::fs::read_to_string(root().join("tests/fault/exports.c")).unwrap();
    let symbols = std::fs::read_to_string(root().join("cbindings/symbols.txt")).unwrap();
    let symbols: Vec<&str> = symbols.lines().filter(|line| line.starts_with("treeattn_")).collect();
    assert!(symbols.len() > 30);
    for symbol in symbols {
        let forced =
            [format!("PANICS({symbol}("), format!("PANICS_THEN_WORKS({symbol}("), format!("arm(\"{symbol}\")")];
        assert!(forced.iter().any(|text| program.contains(text)), "exports.c forces no panic in {symbol}");
    }
}
