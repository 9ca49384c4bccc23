//! Which file of `src` imports which: no circle, and only from a layer to those below it (DESIGN.md, "Layers").
//!
//! Read from the sources without their tests: `use` declarations, and paths that begin with `crate`, `super`, `self` or the
//! name of a module. A name counts for the file that defines it, through whatever re-exports it.

mod lengths;
mod modules;
mod tokens;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use modules::{Crate, Imports, Sources};

/// Layers, the highest first; each may use those below it. Those of one row do not know each other, but for the last two.
const LAYERS: &[&[&str]] = &[
    &["ffi"],
    &["runtime"],
    &["route"],
    &["cpu", "cuda", "comm"],
    &["device", "partial", "attention", "cost"],
    &["error", "fault"],
];

fn sources(folder: &Path) -> Sources {
    fn walk(folder: &Path, prefix: &str, found: &mut Sources) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{prefix}{}", path.file_name().unwrap().to_string_lossy());
            if path.is_dir() {
                walk(&path, &format!("{name}/"), found);
            } else if name.ends_with(".rs") {
                found.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = Sources::new();
    walk(folder, "", &mut found);
    found
}

fn source_of_the_library() -> Sources {
    let mut found = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    found.retain(|name, _| !name.starts_with("bin/"));
    found
}

fn source_of_the_command_line() -> Sources {
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin/treeattn"))
}

/// The shortest circle through each file that lies on one, every set of files once.
fn circles(imports: &Imports) -> Vec<String> {
    let mut next: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, to) in imports.keys() {
        next.entry(from).or_default().push(to);
    }
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for &start in next.keys() {
        let Some(circle) = circle_through(&next, start) else { continue };
        if seen.insert(circle.iter().copied().collect::<BTreeSet<_>>()) {
            let step = |(i, from): (usize, &&str)| {
                let to = circle[(i + 1) % circle.len()];
                let (line, path) = &imports[&(from.to_string(), to.to_string())];
                format!("  {from}:{line} uses {path} of {to}")
            };
            found.push(circle.iter().enumerate().map(step).collect::<Vec<_>>().join("\n"));
        }
    }
    found
}

fn circle_through<'a>(next: &BTreeMap<&'a str, Vec<&'a str>>, start: &'a str) -> Option<Vec<&'a str>> {
    let mut before: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(at) = queue.pop_front() {
        for &to in next.get(at).into_iter().flatten() {
            if to == start {
                let mut circle = vec![at];
                while *circle.last()? != start {
                    circle.push(before[circle.last()?]);
                }
                circle.reverse();
                return Some(circle);
            }
            if !before.contains_key(to) {
                before.insert(to, at);
                queue.push_back(to);
            }
        }
    }
    None
}

/// Imports that go up, or sideways where that is not allowed.
fn against_the_layers(imports: &Imports) -> Vec<String> {
    let layer_of = |file: &str| {
        let room = file.split(['/', '.']).next().unwrap().to_string();
        LAYERS.iter().position(|rooms| rooms.contains(&room.as_str())).map(|layer| (layer, room))
    };
    let mut found = Vec::new();
    for ((from, to), (line, path)) in imports {
        let (Some((above, room)), Some((below, other))) = (layer_of(from), layer_of(to)) else { continue };
        let is_allowed = above < below || room == other || above == below && above >= LAYERS.len() - 2;
        if !is_allowed {
            found.push(format!("  {from}:{line} uses {path} of {to}"));
        }
    }
    found
}

fn check(sources: &Sources, root: &str) -> Crate {
    let read = Crate::read(sources, root);
    let imports = read.imports();
    let (circles, wrong) = (circles(&imports), against_the_layers(&imports));
    assert!(
        circles.is_empty() && wrong.is_empty(),
        "{} circles of imports:\n{}\n{} imports against the layers:\n{}",
        circles.len(),
        circles.join("\n\n"),
        wrong.len(),
        wrong.join("\n")
    );
    read
}

#[test]
fn the_library_has_no_circles_and_keeps_its_layers() {
    let sources = source_of_the_library();
    let read = check(&sources, "lib.rs");
    // Every folder of src has its place.
    for file in read.files() {
        let room = file.split(['/', '.']).next().unwrap();
        assert!(file == "lib.rs" || LAYERS.concat().contains(&room), "{file}: LAYERS has no {room}");
    }
    assert!(read.files().len() > 100, "only {} files were read", read.files().len());
    assert!(read.imports().len() > 300, "only {} imports were found", read.imports().len());
}

#[test]
fn the_command_line_has_no_circles() {
    check(&source_of_the_command_line(), "main.rs");
}

fn invented(files: &[(&str, &str)]) -> Sources {
    files.iter().map(|(name, source)| (name.to_string(), source.to_string())).collect()
}

#[test]
fn a_circle_is_written_out() {
    let sources = invented(&[
        ("lib.rs", "mod device; mod error;"),
        ("error.rs", "pub struct Error;"),
        ("device/mod.rs", "mod a; mod b; mod c; pub use a::A; pub(crate) use self::b::{B, b};"),
        ("device/a.rs", "use super::B;\nuse crate::error::Error; pub struct A; // use super::c::C"),
        ("device/b.rs", "pub struct B; pub fn b() { let text = \"super::c::C\"; crate::device::c::C::new() }"),
        (
            "device/c.rs",
            "pub struct C;\n#[cfg(test)]\nmod tests { use super::super::b::B; }\nimpl C { fn x<'a>(a: &'a super::A) {} }",
        ),
    ]);
    let read = Crate::read(&sources, "lib.rs");
    let found = circles(&read.imports());
    let wanted = "  device/a.rs:1 uses super::B of device/b.rs
  device/b.rs:1 uses crate::device::c::C::new of device/c.rs
  device/c.rs:4 uses super::A of device/a.rs";
    assert_eq!(found, [wanted]);
}

#[test]
fn what_is_no_import_is_no_circle() {
    let sources = invented(&[
        ("lib.rs", "pub mod partial;"),
        (
            "partial/mod.rs",
            "mod a; mod tree; #[cfg(test)] mod tests; pub use a::*; pub use tree::Tree; pub const N: u8 = b'\"';",
        ),
        ("partial/tests.rs", "use super::*; fn t() { Tree }"),
        (
            "partial/tree.rs",
            "use super::a::A; /* super::tests */ use super::N; pub struct Tree(A, char); const C: char = '\"';",
        ),
        (
            "partial/a.rs",
            "#[cfg(all(test, loom))] use super::Tree; pub struct A; #[test] fn t() { super::Tree } const R: &str = r#\"\"super::Tree\"#;",
        ),
    ]);
    check(&sources, "lib.rs");
}

#[test]
fn names_of_globs_and_of_modules_count_for_their_files() {
    let sources = invented(&[
        ("lib.rs", "pub mod partial;"),
        ("partial/mod.rs", "mod a; pub mod b; pub use a::*;"),
        ("partial/a.rs", "pub struct A(super::b::B);"),
        ("partial/b.rs", "use crate::partial::*; use crate::partial; pub struct B; fn f() { A }"),
    ]);
    assert_eq!(circles(&Crate::read(&sources, "lib.rs").imports()).len(), 1);
    let sources = invented(&[
        ("lib.rs", "pub mod partial;"),
        ("partial/mod.rs", "mod a; pub mod b; pub use a::{A as Made};"),
        ("partial/a.rs", "pub struct A(super::b::B);"),
        ("partial/b.rs", "use crate::partial; pub struct B; fn f() -> partial::Made {}"),
    ]);
    assert_eq!(circles(&Crate::read(&sources, "lib.rs").imports()).len(), 1);
}

#[test]
fn an_import_from_above_is_told() {
    let sources = invented(&[
        ("lib.rs", "mod cpu; mod comm; mod device; mod runtime;"),
        ("runtime/mod.rs", "pub struct Plan;"),
        ("comm/mod.rs", "use crate::device::Device; pub struct Rank;"),
        ("cpu/mod.rs", "use crate::comm::Rank; use crate::device::Device;"),
        ("device/mod.rs", "pub struct Device(crate::runtime::Plan);"),
    ]);
    let read = Crate::read(&sources, "lib.rs");
    let found = against_the_layers(&read.imports());
    assert_eq!(
        found,
        [
            "  cpu/mod.rs:1 uses crate::comm::Rank of comm/mod.rs",
            "  device/mod.rs:1 uses crate::runtime::Plan of runtime/mod.rs",
        ]
    );
}
