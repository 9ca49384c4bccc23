//! The checked-in header is what the sources say, and the library exports what the header declares.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The shared library that was built with this test: cargo puts it beside the test executable.
fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().join("libtreeattn.so")
}

fn generate() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindings/cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    // File by file, in the order of the header; nothing outside the C ABI is read.
    for file in ["codes", "types", "version", "runtime", "comm", "plan", "local", "selfcheck"] {
        builder = builder.with_src(root().join(format!("src/ffi/{file}.rs")));
    }
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    String::from_utf8(text).unwrap()
}

fn functions(header: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in header.lines().filter(|line| !line.starts_with([' ', '#', '/'])) {
        if let Some((before, _)) = line.split_once('(') {
            let name = before.rsplit([' ', '*']).next().unwrap_or_default();
            if name.starts_with("treeattn_") && !line.starts_with("typedef") {
                found.insert(name.to_owned());
            }
        }
    }
    found
}

#[test]
fn header_is_up_to_date() {
    let path = root().join("include/treeattn.h");
    let wanted = generate();
    if std::env::var_os("TREEATTN_BLESS").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((line, (found, wanted))) =
        found.lines().zip(wanted.lines()).enumerate().find(|(_, (found, wanted))| found != wanted)
    {
        panic!(
            "include/treeattn.h:{}: found {found:?}, the sources say {wanted:?}; TREEATTN_BLESS=1 rewrites",
            line + 1
        );
    }
    assert_eq!(found.len(), wanted.len(), "include/treeattn.h differs at its end; TREEATTN_BLESS=1 rewrites it");
}

#[test]
fn header_library_and_list_name_the_same_functions() {
    let listed: BTreeSet<String> = std::fs::read_to_string(root().join("cbindings/symbols.txt"))
        .unwrap()
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    let declared = functions(&generate());
    assert!(!declared.is_empty());
    assert_eq!(declared, listed, "header and cbindings/symbols.txt differ");

    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(library()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let exported: BTreeSet<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .map(str::to_owned)
        .filter(|name| name != "treeattn_fault_arm")
        .collect();
    assert_eq!(exported, listed, "the library's symbols and cbindings/symbols.txt differ");
}

#[test]
fn every_declaration_is_documented() {
    let header = generate();
    let lines: Vec<&str> = header.lines().collect();
    for name in functions(&header) {
        let at =
            lines.iter().position(|line| line.contains(&format!("{name}(")) && !line.starts_with([' ', '/'])).unwrap();
        assert_eq!(lines[at - 1].trim(), "*/", "{name} has no comment");
        let start = lines[..at].iter().rposition(|line| line.trim() == "/**").unwrap();
        let comment = lines[start..at].join("\n");
        assert!(comment.contains("**Since**"), "{name} does not say since when");
        assert!(comment.contains("**Threads**"), "{name} does not say which threads may call it");
    }
}
