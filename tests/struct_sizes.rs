//! Programs compiled with the header of an older and of a newer version work with this library: the older one's structs
//! are shorter, the newer one's longer.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every struct of the header that says its size, with its body between the braces.
fn structs(header: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for text in header.split("typedef struct ").skip(1) {
        if let Some((name, text)) = text.split_once(" {\n") {
            let body = text.split_once(&format!("}} {name};")).unwrap().0;
            if body.contains("size_t struct_size;") {
                found.push((name, body));
            }
        }
    }
    assert!(found.len() >= 12, "only {} structs were found", found.len());
    found
}

/// The fields that each struct had in the first version, `struct_size` among them.
const FIRST_FIELDS: &[(&str, usize)] = &[
    ("treeattn_runtime_config_t", 2),
    ("treeattn_device_info_t", 6),
    ("treeattn_comm_config_t", 7),
    ("treeattn_comm_status_t", 8),
    ("treeattn_attention_desc_t", 30),
    ("treeattn_decode_args_t", 27),
    ("treeattn_merge_args_t", 13),
    ("treeattn_plan_memory_t", 3),
    ("treeattn_plan_stats_t", 13),
    ("treeattn_transport_t", 6),
    ("treeattn_selfcheck_config_t", 6),
    ("treeattn_selfcheck_report_t", 9),
];

/// The header with its structs as the first version had them.
fn older(header: &str) -> String {
    let mut text = header.to_string();
    for (name, body) in structs(header) {
        let fields: Vec<&str> = body.split_inclusive(";\n").collect();
        let first = FIRST_FIELDS.iter().find(|(known, _)| *known == name);
        // A later version's struct has grown by nothing yet.
        let first = first.map_or(fields.len(), |&(_, first)| first);
        assert!(first <= fields.len(), "{name} has lost fields");
        text = text.replace(body, &fields[..first].concat());
    }
    text
}

/// The header after its structs got one more field.
fn newer(header: &str) -> String {
    let mut text = header.to_string();
    for (_, body) in structs(header) {
        text = text.replace(body, &format!("{body}    int64_t future[3];\n"));
    }
    text
}

/// Compiles the program with a header and runs it with the library that was built with this test.
fn run(version: &str, header: &str) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("struct_sizes").join(version);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("treeattn.h"), header).unwrap();
    let library = std::env::current_exe().unwrap().with_file_name("libtreeattn.so");
    let soname = concat!("libtreeattn.so.", env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));
    for name in ["libtreeattn.so", soname] {
        let _ = std::fs::remove_file(folder.join(name));
        std::os::unix::fs::symlink(&library, folder.join(name)).unwrap();
    }
    let program = folder.join("main");
    let mut compile = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    compile.args(["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-g"]).arg(format!("-D{version}"));
    compile.arg("-I").arg(&folder).arg(root().join("tests/struct_sizes/main.c")).arg("-o").arg(&program);
    for command in
        [compile.arg("-L").arg(&folder).arg("-ltreeattn"), Command::new(&program).env("LD_LIBRARY_PATH", &folder)]
    {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    }
}

#[test]
fn older_newer_and_present_programs_work() {
    let header = std::fs::read_to_string(root().join("include/treeattn.h")).unwrap();
    let (older, newer) = (older(&header), newer(&header));
    assert!(older.len() <= header.len() && newer.matches("future[3]").count() == structs(&header).len());
    run("OLDER", &older);
    run("PRESENT", &header);
    run("NEWER", &newer);
}
