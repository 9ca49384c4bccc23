//! The C ABI from C: every program of tests/c is compiled against the header, linked with the library, and run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The longest that a program may run; far more than any needs.
const HANG: Duration = Duration::from_secs(120);
const WARNINGS: &[&str] = &["-Wall", "-Wextra", "-pedantic", "-Werror"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder with the shared library that was built with this test, under its link name and its soname.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let built = std::env::current_exe().unwrap().parent().unwrap().join("libtreeattn.so");
        assert!(built.exists(), "{} is not there", built.display());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("c_api_{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        // As the build script says.
        let soname = match env!("CARGO_PKG_VERSION_MAJOR") {
            "0" => concat!("libtreeattn.so.0.", env!("CARGO_PKG_VERSION_MINOR")),
            _ => concat!("libtreeattn.so.", env!("CARGO_PKG_VERSION_MAJOR")),
        };
        for name in ["libtreeattn.so", soname] {
            let link = folder.join(name);
            // Left by an earlier process of the same number.
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&built, link).unwrap();
        }
        folder
    })
}

/// Runs a command and panics with its output unless it succeeds.
fn succeed(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
}

fn compiler(variable: &str, default: &str, standard: &str) -> Command {
    let mut command = Command::new(std::env::var_os(variable).unwrap_or(default.into()));
    command.arg(format!("-std={standard}")).args(WARNINGS).arg("-I").arg(root().join("include"));
    command
}

fn c_compiler(standard: &str) -> Command {
    let mut command = compiler("CC", "cc", standard);
    command.args(["-D_POSIX_C_SOURCE=200809L", "-pthread"]);
    command
}

/// Compiles tests/c/`name`.c as C11 and as C99, and links the latter into `program`.
fn build_as(name: &str, program: &str) -> PathBuf {
    let source = root().join(format!("tests/c/{name}.c"));
    let program = libraries().join(program);
    succeed(c_compiler("c11").arg("-fsyntax-only").arg(&source));
    let mut link = c_compiler("c99");
    if cfg!(debug_assertions) {
        // Without optimisation a step takes about 200 KiB where it takes 32 otherwise, and the header promises nothing of it.
        link.arg("-DSMALL_STACK=(1024 * 1024)");
    }
    link.args(["-O1", "-g"]).arg(&source).arg("-o").arg(&program).arg("-L").arg(libraries());
    succeed(link.args(["-ltreeattn", "-lm"]));
    program
}

/// Runs a command to its end, and panics with its output unless it gives 0 in time.
fn run(command: &mut Command, log: &Path) {
    let output = fs::File::create(log).unwrap();
    command.env("LD_LIBRARY_PATH", libraries()).stdin(Stdio::null());
    let mut child = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
    let started = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if started.elapsed() > HANG => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let text = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
    let status = status.unwrap_or_else(|| panic!("{command:?} did not end within {HANG:?}:\n{text}"));
    assert!(status.success(), "{command:?}: {status}\n{text}");
}

fn build_and_run(name: &str) {
    let program = build_as(name, name);
    run(&mut Command::new(&program), &program.with_extension("log"));
}

macro_rules! programs {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            build_and_run(stringify!($name));
        })*
        const PROGRAMS: &[&str] = &[$(stringify!($name)),*];
    };
}

programs! {
    arguments,
    comm,
    conventions,
    decode,
    energy,
    executor,
    formats,
    faults,
    floats,
    fork,
    handles,
    lifetimes,
    local,
    merge,
    nccl,
    outputs,
    pages,
    plan,
    runtime,
    selfcheck,
    team,
    terms,
    threads,
    transport,
    transport_faults,
    version,
    waits,
}

/// The sources of the programs by name.
fn sources() -> Vec<(String, String)> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(root().join("tests/c")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "c") {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            sources.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
    sources
}

#[test]
fn every_program_is_run() {
    let found: BTreeSet<String> = sources().into_iter().map(|(name, _)| name).collect();
    let listed: BTreeSet<String> = PROGRAMS.iter().map(|&name| name.to_owned()).collect();
    assert_eq!(found, listed, "tests/c and the list of programs differ");
}

/// They run on a GPU only (`tests/gpu/pack.sh`).
#[test]
fn programs_for_a_gpu_compile() {
    for entry in fs::read_dir(root().join("tests/gpu/c")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "c") {
            for standard in ["c99", "c11"] {
                succeed(c_compiler(standard).arg("-fsyntax-only").arg(&path));
            }
        }
    }
}

#[test]
fn every_symbol_is_called() {
    let sources = sources();
    let is_called = |symbol: &String| sources.iter().any(|(_, text)| text.contains(&format!("{symbol}(")));
    let missing: Vec<String> = symbols().into_iter().filter(|symbol| !is_called(symbol)).collect();
    assert!(missing.is_empty(), "no program of tests/c calls {missing:?}");
}

/// The symbols of the library.
fn symbols() -> Vec<String> {
    let text = fs::read_to_string(root().join("cbindings/symbols.txt")).unwrap();
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn every_symbol_is_called_under_odd_floating_point_settings() {
    let text = fs::read_to_string(root().join("tests/c/floats.c")).unwrap();
    let is_checked = |symbol: &String| {
        [format!("KEEPS({symbol}("), format!("KEEPS_ANYHOW({symbol}(")].iter().any(|call| text.contains(call))
    };
    let missing: Vec<String> = symbols().into_iter().filter(|symbol| !is_checked(symbol)).collect();
    assert!(missing.is_empty(), "floats.c does not check {missing:?}");
}

/// Memory that the library touches is memory that the caller gave or that it got itself. Valgrind knows no AVX-512.
#[test]
fn steps_are_clean_under_valgrind() {
    if !Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: no valgrind here");
        return;
    }
    for name in ["decode", "pages"] {
        let program = build_as(name, &format!("{name}_valgrind"));
        let mut command = Command::new("valgrind");
        command.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
        run(command.arg(&program).env("TREEATTN_CPU_ISA", "avx2"), &program.with_extension("log"));
    }
}

#[test]
fn header_compiles_alone_and_twice() {
    let folder = libraries();
    let text = "#include <treeattn.h>\n#include <treeattn.h>\nint treeattn_header_included(void);\n";
    for (name, mut command) in [
        ("alone_99.c", c_compiler("c99")),
        ("alone_11.c", c_compiler("c11")),
        ("alone_17.cpp", compiler("CXX", "c++", "c++17")),
    ] {
        let source = folder.join(name);
        fs::write(&source, text).unwrap();
        succeed(command.arg("-fsyntax-only").arg(&source));
    }
}
