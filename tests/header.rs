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

/// The files of `src/ffi` that make the header, in its order.
const SECTIONS: &[&str] = &[
    "codes",
    "types/objects",
    "types/shape",
    "types/step",
    "types/report",
    "version",
    "runtime",
    "comm",
    "nccl",
    "plan",
    "local",
    "selfcheck",
];

fn path(section: &str) -> PathBuf {
    root().join("src/ffi").join(section).with_extension("rs")
}

fn source(section: &str) -> String {
    std::fs::read_to_string(path(section)).unwrap()
}

/// What cbindgen makes of the sources, arranged for readers.
fn generate() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindings/cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    // File by file; nothing outside the C ABI is read.
    for section in SECTIONS {
        builder = builder.with_src(path(section));
    }
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    arrange(&String::from_utf8(text).unwrap())
}

/// Moves every code behind its type, which cbindgen puts at the end, sets a heading before each section of calls, and
/// leaves out what Rust callers are told about safety: the header says it once, under POINTERS.
fn arrange(header: &str) -> String {
    let header = &without_safety(header);
    let codes = source("codes");
    let type_of = |constant: &str| {
        let line = codes.lines().find(|line| line.starts_with(&format!("pub const {constant}: ")))?;
        Some(line.split_once(": ")?.1.split_once(" =")?.0.to_string()).filter(|t| t.starts_with("treeattn_"))
    };
    let headings: Vec<(String, String)> = SECTIONS
        .iter()
        .filter_map(|section| {
            let text = source(section);
            let title = text.strip_prefix("//! ")?.split_once(".\n")?.0.replace("\n//!", "");
            let first = text.split_once("extern \"C\" fn ")?.1.split_once('(')?.0.to_string();
            text.contains("no_mangle").then_some((first, title))
        })
        .collect();
    let (moved, stay): (Vec<&str>, Vec<&str>) =
        header.split("\n\n").partition(|block| defined(block).and_then(type_of).is_some());
    let mut blocks: Vec<String> = Vec::new();
    for block in stay {
        if let Some((_, title)) =
            headings.iter().find(|(first, _)| block.ends_with(");") && block.contains(&format!("{first}(")))
        {
            let rule = "-".repeat(113usize.saturating_sub(title.len()));
            blocks.push(format!("/* {title} {rule} */"));
        }
        blocks.push(block.trim_start_matches('\n').to_string());
        if let Some(name) = block.lines().last().and_then(|line| line.strip_prefix("typedef int32_t ")) {
            let name = name.trim_end_matches(';');
            blocks.extend(
                moved
                    .iter()
                    .filter(|block| defined(block).and_then(type_of).as_deref() == Some(name))
                    .map(|block| block.trim_start_matches('\n').to_string()),
            );
        }
    }
    one_line_docs(&blocks.join("\n\n"))
}

/// Leaves out the last section of a comment where it is `# Safety`.
fn without_safety(header: &str) -> String {
    let mut parts = header.split("\n *\n * # Safety\n");
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |text, part| text + "\n" + &part[part.find(" */").unwrap()..])
}

/// Sets a doc comment of one line on one line.
fn one_line_docs(header: &str) -> String {
    let lines: Vec<&str> = header.lines().collect();
    let mut out = String::with_capacity(header.len());
    let mut at = 0;
    while at < lines.len() {
        let text = match lines[at..] {
            [open, text, close, ..] if open.trim() == "/**" && close.trim() == "*/" => text.trim().strip_prefix("* "),
            _ => None,
        };
        match text {
            Some(text) => {
                out.push_str(&lines[at].replace("/**", &format!("/** {text} */")));
                at += 3;
            }
            None => {
                out.push_str(lines[at]);
                at += 1;
            }
        }
        out.push('\n');
    }
    out
}

/// The constant that a block of the header defines.
fn defined(block: &str) -> Option<&str> {
    block.lines().last()?.strip_prefix("#define ")?.split(' ').next()
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

/// What a comment says and what it does not: the header is the manual.
#[test]
fn every_function_is_documented() {
    let header = generate();
    for name in functions(&header) {
        let (before, after) = header.rsplit_once(&format!("{name}(")).unwrap();
        let declaration = after.split_once(");").unwrap().0;
        let comment = before.rsplit_once("/**").unwrap().1;
        assert!(comment.trim_end().lines().count() > 3 && comment.contains("*/\n"), "{name} has no comment");
        for parameter in declaration.split(',').filter(|text| text.trim() != "void") {
            let parameter = parameter.rsplit([' ', '*']).next().unwrap();
            assert!(comment.contains(&format!("@param {parameter} ")), "{name} does not say what {parameter} is");
        }
        for word in ["@return", "Thread safety", "Since 0."] {
            assert!(comment.contains(word), "{name} has no {word}");
        }
        // Whether it blocks or enqueues.
        assert!(
            ["lock", "nqueue", "Waits", "wait"].iter().any(|word| comment.contains(word)),
            "{name} does not say whether it blocks"
        );
        if name.contains("create") || name.contains("alloc") {
            assert!(comment.contains("Ownership: "), "{name} does not say who owns what it makes");
        }
    }
}

/// Every type, field and constant has a comment of its own.
#[test]
fn every_declaration_is_documented() {
    let header = generate();
    let lines: Vec<&str> = header.lines().collect();
    let body = lines.iter().position(|line| line.contains("_INIT_(type)")).unwrap();
    let mut checked = 0;
    for (at, line) in lines.iter().enumerate().skip(body) {
        let constant = line.starts_with("#define TREEATTN_") && !line.contains("INIT");
        let field = line.starts_with("    ") && line.ends_with(';') && !lines[at - 1].ends_with(',');
        if constant || field || line.starts_with("typedef ") {
            checked += 1;
            assert!(lines[at - 1].trim_end().ends_with("*/"), "line {} has no comment: {line}", at + 1);
        }
    }
    assert!(checked > 200, "only {checked} declarations were found");
}
