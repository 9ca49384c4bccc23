//! Sets the soname of the shared library (`libtreeattn.so.0.MINOR` before 1.0, `libtreeattn.so.MAJOR` after) and
//! compiles `kernels/*.cu` into the image that the library embeds: one fatbin a file.
//!
//! | variable | meaning |
//! |---|---|
//! | `TREEATTN_CUDA` | `auto` (default: compile if nvcc is found), `required` (fail without nvcc), `off` |
//! | `TREEATTN_CUDA_ARCHS` | what to compile for, as `80,90a,ptx80`: numbers are machine code, `ptx` is for later GPUs |
//! | `TREEATTN_CUDA_DELAYS` | for tests: kernels hold back at random points of an exchange, at most so many ns; default: never |
//! | `TREEATTN_NVCC`, `NVCC` | the nvcc to use; else `CUDA_HOME`, `PATH`, /usr/local/cuda and pip's packages are searched |
//! | `TREEATTN_PREBUILT_KERNELS` | a fatbin, or a folder of them (`OUT_DIR/image` of another build), instead of nvcc |
//!
//! `kernels/bench/*.cu` go into an image of their own, which the command line embeds and the library does not.
//!
//! An empty image is no build error: the library then says at run time what to do about it.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Machine code for these, and PTX for what comes after them.
const ARCHS: &[&str] = &["80", "86", "89", "90a", "100", "120", "ptx80"];
/// Where the sources of the command line's own kernels lie, and their fatbins in an image's folder.
const BENCH: &str = "bench";
/// The file that says what an image was compiled for and by.
const MANIFEST: &str = "image.txt";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    set_soname();
    for name in ["TREEATTN_CUDA", "TREEATTN_CUDA_ARCHS", "TREEATTN_CUDA_DELAYS", "TREEATTN_PREBUILT_KERNELS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(variable("OUT_DIR").unwrap_or_default());
    let image = match image(&out) {
        Ok(image) => image,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    fs::write(out.join("image.rs"), image.source(&image.modules)).expect("OUT_DIR can be written");
    fs::write(out.join("bench.rs"), image.source(&image.bench)).expect("OUT_DIR can be written");
}

fn set_soname() {
    let part = |name: &str| variable(name).unwrap_or_default();
    let (major, minor) = (part("CARGO_PKG_VERSION_MAJOR"), part("CARGO_PKG_VERSION_MINOR"));
    let abi = if major == "0" { format!("0.{minor}") } else { major };
    if part("CARGO_CFG_TARGET_OS") == "linux" && variable("CARGO_FEATURE_SONAME").is_some() {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libtreeattn.so.{abi}");
    }
}

/// What gets embedded.
#[derive(Default)]
struct Image {
    /// Fatbins by the name of their source.
    modules: Vec<(String, PathBuf)>,
    /// Those of the command line.
    bench: Vec<(String, PathBuf)>,
    /// What they were compiled for.
    archs: Vec<String>,
    /// The version of the toolkit that compiled them.
    toolkit: (u32, u32),
    /// Why there are no modules.
    why_empty: String,
}

impl Image {
    fn empty(why: impl Into<String>) -> Image {
        Image { why_empty: why.into(), ..Image::default() }
    }

    fn source(&self, modules: &[(String, PathBuf)]) -> String {
        let mut text = format!(
            "pub const ARCHS: &[&str] = &{:?};\npub const TOOLKIT: (u32, u32) = {:?};\npub const WHY_EMPTY: &str = {:?};\n",
            self.archs, self.toolkit, self.why_empty
        );
        if !modules.is_empty() {
            // As the driver wants what it reads.
            text.push_str("#[repr(C, align(64))]\nstruct Aligned<T>(T);\n");
        }
        text.push_str("pub static MODULES: &[(&str, &[u8])] = &[\n");
        for (name, path) in modules {
            text.push_str(&format!("    ({name:?}, &Aligned(*include_bytes!({path:?})).0),\n"));
        }
        text.push_str("];\n");
        text
    }
}

fn image(out: &Path) -> Result<Image, String> {
    let mode = variable("TREEATTN_CUDA").unwrap_or_else(|| "auto".into());
    if !["auto", "required", "off"].contains(&mode.as_str()) {
        return Err(format!("TREEATTN_CUDA: found {mode:?}, wanted auto, required or off"));
    }
    if mode == "off" {
        return Ok(Image::empty("it was built with TREEATTN_CUDA=off"));
    }
    if let Some(path) = variable("TREEATTN_PREBUILT_KERNELS") {
        return prebuilt(Path::new(&path));
    }
    if variable("DOCS_RS").is_some() {
        return Ok(Image::empty("it was built for its documentation only"));
    }
    println!("cargo:rerun-if-changed=kernels");
    let sources = files("kernels", "cu")?;
    if sources.is_empty() {
        return match mode.as_str() {
            "required" => Err("TREEATTN_CUDA=required: found no kernels/*.cu".into()),
            _ => Ok(Image::empty("there were no kernels to compile")),
        };
    }
    let Some(nvcc) = find_nvcc()? else {
        let places = "TREEATTN_NVCC, NVCC, CUDA_HOME, PATH, /usr/local/cuda and pip's nvidia/cu13";
        let why = format!("nvcc was not found when it was built (searched: {places})");
        if mode == "required" {
            return Err(format!("TREEATTN_CUDA=required: {why}; set TREEATTN_NVCC"));
        }
        println!("cargo:warning=no CUDA kernels in this build: nvcc was not found; TREEATTN_CUDA=off silences this");
        return Ok(Image::empty(why));
    };
    println!("cargo:rerun-if-changed={}", nvcc.display());
    let folder = out.join("image");
    let bench = compile(&nvcc, &files(Path::new("kernels").join(BENCH), "cu")?, &folder.join(BENCH))?.modules;
    Ok(Image { bench, ..compile(&nvcc, &sources, &folder)? })
}

/// An image that was compiled elsewhere.
fn prebuilt(path: &Path) -> Result<Image, String> {
    println!("cargo:rerun-if-changed={}", path.display());
    let path = path.canonicalize().map_err(|e| format!("TREEATTN_PREBUILT_KERNELS: {}: {e}", path.display()))?;
    let (folder, paths) = if path.is_dir() {
        (path.clone(), files(&path, "fatbin")?)
    } else {
        (path.parent().map(Path::to_path_buf).unwrap_or_default(), vec![path.clone()])
    };
    if paths.is_empty() {
        return Err(format!("TREEATTN_PREBUILT_KERNELS: found no .fatbin in {}", path.display()));
    }
    let mut image = Image { archs: vec!["prebuilt".into()], ..Image::default() };
    if let Ok(text) = fs::read_to_string(folder.join(MANIFEST)) {
        println!("cargo:rerun-if-changed={}", folder.join(MANIFEST).display());
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            match key {
                "archs" => image.archs = value.split(',').map(str::to_string).collect(),
                "toolkit" => image.toolkit = version(value).unwrap_or_default(),
                _ => {}
            }
        }
    }
    let named = |paths: Vec<PathBuf>| paths.into_iter().map(|path| (stem(&path), path)).collect();
    image.modules = named(paths);
    image.bench = named(files(folder.join(BENCH), "fatbin")?);
    Ok(image)
}

/// Compiles each source to a fatbin in `folder`, as many at once as cargo allows; what is up to date stays.
fn compile(nvcc: &Path, sources: &[PathBuf], folder: &Path) -> Result<Image, String> {
    let toolkit = toolkit(nvcc)?;
    let archs = archs(nvcc)?;
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut flags =
        vec!["-std=c++17".to_string(), "-O3".into(), "--fatbin".into(), "-Ikernels".into(), "-Xptxas=-v".into()];
    if toolkit >= (12, 8) {
        flags.push("--compress-mode=size".into());
    }
    if let Some(asked) = variable("TREEATTN_CUDA_DELAYS") {
        let Some(most) = asked.parse::<u32>().ok().filter(|&most| most > 0) else {
            return Err(format!("TREEATTN_CUDA_DELAYS: found {asked:?}, wanted a number of nanoseconds above 0"));
        };
        flags.push(format!("-DTREEATTN_DELAYS={most}"));
    }
    for arch in &archs {
        let (of, code) = match arch.strip_prefix("ptx") {
            Some(number) => (number, format!("compute_{number}")),
            None => (arch.as_str(), format!("sm_{arch}")),
        };
        flags.push(format!("-gencode=arch=compute_{of},code={code}"));
    }
    let mut shared = DefaultHasher::new();
    shared.write(format!("{} {toolkit:?} {flags:?}", nvcc.display()).as_bytes());
    for header in files("kernels", "cuh")? {
        shared.write(header.to_string_lossy().as_bytes());
        shared.write(&fs::read(&header).map_err(|e| format!("{}: {e}", header.display()))?);
    }
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let jobs = variable("NUM_JOBS").and_then(|n| n.parse().ok()).unwrap_or(1usize).max(1);
    // Architectures of one source side by side, too: some sources take far longer than others.
    flags.push(format!("--threads={}", jobs.min(archs.len())));
    thread::scope(|scope| {
        for _ in 0..jobs.min(sources.len()) {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = compile_one(nvcc, source, &flags, shared.clone(), folder) {
                        errors.lock().expect("no thread panics with it").push(error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("no thread panics with it");
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    let manifest = format!("archs={}\ntoolkit={}.{}\n", archs.join(","), toolkit.0, toolkit.1);
    fs::write(folder.join(MANIFEST), manifest).map_err(|e| format!("{}: {e}", folder.display()))?;
    let stems: Vec<String> = sources.iter().map(|source| stem(source)).collect();
    for old in files(folder, "fatbin")?.into_iter().filter(|path| !stems.contains(&stem(path))) {
        fs::remove_file(&old).map_err(|e| format!("{}: {e}", old.display()))?;
    }
    let modules = stems.into_iter().map(|name| (name.clone(), folder.join(format!("{name}.fatbin")))).collect();
    Ok(Image { modules, archs, toolkit, ..Image::default() })
}

fn compile_one(nvcc: &Path, source: &Path, flags: &[String], mut hash: DefaultHasher, to: &Path) -> Result<(), String> {
    hash.write(&fs::read(source).map_err(|e| format!("{}: {e}", source.display()))?);
    let stamp = format!("{:016x}", hash.finish());
    let fatbin = to.join(format!("{}.fatbin", stem(source)));
    let stamped = to.join(format!("{}.stamp", stem(source)));
    if fatbin.exists() && fs::read_to_string(&stamped).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    let output = Command::new(nvcc)
        .args(flags)
        .arg(source)
        .arg("-o")
        .arg(&fatbin)
        .output()
        .map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        return Err(format!("{}: nvcc failed\n{}", source.display(), String::from_utf8_lossy(&said)));
    }
    // What ptxas says of registers and spills.
    let log = to.join(format!("{}.log", stem(source)));
    fs::write(&log, &output.stderr).map_err(|e| format!("{}: {e}", log.display()))?;
    fs::write(&stamped, stamp).map_err(|e| format!("{}: {e}", stamped.display()))
}

/// What to compile for: what was asked for, or what this nvcc knows of the usual.
fn archs(nvcc: &Path) -> Result<Vec<String>, String> {
    if let Some(asked) = variable("TREEATTN_CUDA_ARCHS") {
        let archs: Vec<String> = asked.split([',', ' ', ';']).filter(|a| !a.is_empty()).map(str::to_string).collect();
        let number = |arch: &str| arch.trim_start_matches("ptx").trim_end_matches(['a', 'f']).parse::<u32>().is_ok();
        return match archs.iter().find(|arch| !number(arch)) {
            Some(odd) => Err(format!("TREEATTN_CUDA_ARCHS: found {odd:?}, wanted the like of 80,90a,ptx80")),
            None if archs.is_empty() => {
                Err("TREEATTN_CUDA_ARCHS: found nothing, wanted the like of 80,90a,ptx80".into())
            }
            None => Ok(archs),
        };
    }
    let known =
        run(Command::new(nvcc).arg("--list-gpu-arch")).ok_or_else(|| format!("{}: no answer", nvcc.display()))?;
    let knows = |arch: &&&str| {
        let number = arch.trim_start_matches("ptx").trim_end_matches('a');
        known.lines().any(|line| line.trim() == format!("compute_{number}"))
    };
    Ok(ARCHS.iter().filter(knows).map(|arch| arch.to_string()).collect())
}

fn toolkit(nvcc: &Path) -> Result<(u32, u32), String> {
    let text = run(Command::new(nvcc).arg("--version")).ok_or_else(|| format!("{}: does not run", nvcc.display()))?;
    let release = text.split("release ").nth(1).and_then(|rest| version(rest.split(',').next()?));
    release.ok_or_else(|| format!("{}: found no release in its --version", nvcc.display()))
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The nvcc that a variable names, or the first that is in one of the usual places.
fn find_nvcc() -> Result<Option<PathBuf>, String> {
    for name in ["TREEATTN_NVCC", "NVCC"] {
        println!("cargo:rerun-if-env-changed={name}");
        if let Some(path) = variable(name).map(PathBuf::from) {
            return if path.is_file() {
                Ok(Some(path))
            } else {
                Err(format!("{name}: found no file {}", path.display()))
            };
        }
    }
    for name in ["CUDA_HOME", "VIRTUAL_ENV", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let mut places = Vec::new();
    places.extend(variable("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")));
    places.extend(env::split_paths(&variable("PATH").unwrap_or_default()).map(|folder| folder.join("nvcc")));
    places.push("/usr/local/cuda/bin/nvcc".into());
    let pip = |python: PathBuf| {
        let code = "import sysconfig; print(sysconfig.get_path('purelib'))";
        let packages = run(Command::new(python).args(["-c", code]))?;
        Some(Path::new(packages.trim()).join("nvidia/cu13/bin/nvcc"))
    };
    places.extend(variable("VIRTUAL_ENV").and_then(|venv| pip(Path::new(&venv).join("bin/python"))));
    places.extend(pip("python3".into()));
    Ok(places.into_iter().find(|path| path.is_file()))
}

/// What a command prints, if it runs and succeeds.
fn run(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

/// The files of a folder with this extension, by name; none if there is no such folder.
fn files(folder: impl AsRef<Path>, extension: &str) -> Result<Vec<PathBuf>, String> {
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(Vec::new()) };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| format!("{}: {e}", folder.as_ref().display()))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// An environment variable that is set to something.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
