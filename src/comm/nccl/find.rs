//! Looks for NCCL: in the process, where `nccl_path` says, among the system's libraries, in Python's packages.

use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};

use libloading::os::unix::Library as Handle;

use crate::device::environment;
use crate::error::{Error, ErrorKind, Result};

/// NCCL's soname, and the name of its development link.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// A library that was opened.
pub(super) struct Found {
    pub handle: Handle,
    /// How it was found, for messages.
    pub origin: String,
}

/// The library at `path`. `Unavailable` where it cannot be loaded.
pub(super) fn at(path: &str) -> Result<Found> {
    match open(path, 0) {
        Ok(handle) => Ok(Found { handle, origin: format!("nccl_path = {path}") }),
        Err(why) => {
            let message = format!("NCCL: found none at nccl_path = {path} ({why}), wanted the path of libnccl.so.2");
            Err(Error::new(ErrorKind::Unavailable, message))
        }
    }
}

/// The copy that is in the process: the one at `path` or, without one, any. `Unavailable` where there is none.
pub(super) fn in_process(path: Option<&str>) -> Result<Found> {
    let found = match path {
        Some(path) => open(path, libc::RTLD_NOLOAD).ok().map(|handle| Found { handle, origin: path.to_string() }),
        None => loaded(),
    };
    found.ok_or_else(|| {
        let what = path.map_or(NAMES.join(" and "), str::to_string);
        let message = format!(
            "NCCL: {what} found not loaded in this process, wanted the one that the communicator belongs to (nccl_path \
             names a copy under another name)"
        );
        Error::new(ErrorKind::Unavailable, message)
    })
}

/// The copy that is in the process, else the system's, else one that pip installed. `Unavailable`, with what was tried, where
/// there is none.
pub(super) fn anywhere() -> Result<Found> {
    if let Some(found) = loaded() {
        return Ok(found);
    }
    let mut tried = vec!["not loaded in this process".to_string()];
    match open(NAMES[0], 0) {
        Ok(handle) => return Ok(Found { handle, origin: NAMES[0].to_string() }),
        Err(why) => tried.push(why),
    }
    let packages = packages();
    if packages.is_empty() {
        tried.push("no packages in $VIRTUAL_ENV or beside the python of $PATH".to_string());
    }
    for folder in packages {
        let file = folder.join("nvidia/nccl/lib").join(NAMES[0]);
        let name = file.to_string_lossy().into_owned();
        if !file.exists() {
            tried.push(format!("{name} is not there"));
            continue;
        }
        match open(&name, 0) {
            Ok(handle) => return Ok(Found { handle, origin: name }),
            Err(why) => tried.push(why),
        }
    }
    let message = format!(
        "NCCL: found none ({}), wanted libnccl.so.2: install NCCL (pip: nvidia-nccl-cu12 or nvidia-nccl-cu13) or name \
         it in nccl_path; communicators within a process need none",
        tried.join("; ")
    );
    Err(Error::new(ErrorKind::Unavailable, message))
}

fn loaded() -> Option<Found> {
    for name in NAMES {
        if let Ok(handle) = open(name, libc::RTLD_NOLOAD) {
            return Some(Found { handle, origin: format!("{name} of this process") });
        }
    }
    // Linked into the program, or loaded for all under another name.
    let program = Handle::this();
    // SAFETY: the symbol is used as a pointer that is compared with nothing and not followed.
    let is_there = unsafe { program.get::<*mut c_void>(b"ncclGetVersion\0") }.is_ok();
    is_there.then(|| Found { handle: program, origin: "NCCL of this program".to_string() })
}

fn open(name: &str, flags: i32) -> std::result::Result<Handle, String> {
    // SAFETY: runs the initialisers of a library that the user named, or that is called NCCL, as every user of NCCL does; with
    // RTLD_NOLOAD none run.
    unsafe { Handle::open(Some(name), libc::RTLD_NOW | libc::RTLD_LOCAL | flags) }.map_err(|error| {
        let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), |source| source.to_string());
        if why.contains(name) { why } else { format!("{name}: {why}") }
    })
}

/// The path of the file that an address was loaded from.
pub(super) fn file_of(address: usize) -> Option<String> {
    // SAFETY: Dl_info is plain data for which zero is a value; dladdr writes it, for any address. The name is null or a string
    // that lives as long as the file is loaded: the caller's address is of a library that stays.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let found = libc::dladdr(address as *const c_void, &mut info) != 0 && !info.dli_fname.is_null();
        found.then(|| CStr::from_ptr(info.dli_fname).to_string_lossy().into_owned())
    }
}

/// The package folders of the virtual environment and of the first python in `PATH`.
fn packages() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = environment().virtual_env.as_ref().map(PathBuf::from).into_iter().collect();
    let path = environment().path.clone().unwrap_or_default();
    let python = std::env::split_paths(&path)
        .flat_map(|folder| ["python3", "python"].map(|name| folder.join(name)))
        .find(|python| python.is_file());
    if let Some(python) = python {
        // A virtual environment's python is a link to the system's, whose packages it may use.
        prefixes.extend(prefix(&python));
        prefixes.extend(python.canonicalize().ok().as_deref().and_then(prefix));
    }
    let mut folders = Vec::new();
    for prefix in &prefixes {
        for folder in package_folders(prefix) {
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
    }
    folders
}

/// The folder that holds the `bin` of a program.
fn prefix(program: &Path) -> Option<PathBuf> {
    Some(program.parent()?.parent()?.to_path_buf())
}

/// The package folders under a prefix: `lib/python3.N/site-packages` and its variants.
fn package_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for lib in ["lib", "lib64", "local/lib"] {
        let Ok(entries) = std::fs::read_dir(prefix.join(lib)) else { continue };
        let mut versions: Vec<PathBuf> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
            .map(|entry| entry.path())
            .collect();
        versions.sort();
        let kinds = |version: PathBuf| ["site-packages", "dist-packages"].map(|kind| version.join(kind));
        folders.extend(versions.into_iter().flat_map(kinds).filter(|folder| folder.is_dir()));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_lie_where_python_puts_them() {
        let root = std::env::temp_dir().join(format!("treeattn-packages-{}", std::process::id()));
        let wanted = [root.join("lib/python3.11/site-packages"), root.join("local/lib/python3.13/dist-packages")];
        for folder in &wanted {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::create_dir_all(root.join("lib/other/site-packages")).unwrap();
        assert_eq!(package_folders(&root), wanted);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(prefix(Path::new("/usr/bin/python3")), Some("/usr".into()));
    }

    #[test]
    fn an_address_leads_to_its_file() {
        let file = file_of(libc::getpid as *const () as usize).unwrap();
        assert!(file.contains("libc"), "{file}");
    }
}
