//! No source file has more than [`MOST`] lines, whatever its language: a longer one has more than one purpose.

use std::collections::BTreeMap;
use std::path::Path;

const MOST: usize = 500;

const FOLDERS: &[&str] = &["src", "tests", "kernels", "examples", "examples-c", "cbindings"];
const LANGUAGES: &[&str] = &["rs", "c", "cpp", "h", "hpp", "cu", "cuh"];
/// Folders of that name hold what builds leave behind.
const BUILT: &[&str] = &["build", "target"];

/// Files that are longer, and the length that they may not pass. An entry leaves the list once its file is short enough.
const LONGER: &[(&str, usize)] = &[("tests/emulator/driver.cpp", 875)];

/// The lengths of the sources below a folder, by their paths from `root`.
fn lengths(root: &Path, folder: &str, found: &mut BTreeMap<String, usize>) {
    for entry in std::fs::read_dir(root.join(folder)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let inside = format!("{folder}/{name}");
        if path.is_dir() {
            if !BUILT.contains(&name.as_str()) {
                lengths(root, &inside, found);
            }
        } else if path.extension().is_some_and(|extension| LANGUAGES.iter().any(|language| extension == *language)) {
            found.insert(inside, std::fs::read_to_string(&path).unwrap().lines().count());
        }
    }
}

/// What is wrong with these lengths.
fn complaints(found: &BTreeMap<String, usize>, longer: &[(&str, usize)]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (file, &lines) in found {
        let most = longer.iter().find(|(name, _)| name == file).map_or(MOST, |&(_, most)| most);
        if lines > most {
            wrong.push(format!("{file}: found {lines} lines, wanted at most {most}"));
        }
    }
    for (file, _) in longer {
        match found.get(*file) {
            Some(&lines) if lines > MOST => {}
            Some(lines) => wrong.push(format!("{file}: has {lines} lines and is still on the list of longer files")),
            None => wrong.push(format!("{file}: is on the list of longer files and does not exist")),
        }
    }
    wrong
}

#[test]
fn no_file_is_long() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeMap::new();
    for folder in FOLDERS {
        lengths(root, folder, &mut found);
    }
    for language in LANGUAGES.iter().filter(|language| **language != "hpp") {
        assert!(found.keys().any(|file| file.ends_with(&format!(".{language}"))), "no file of {language} was read");
    }
    let wrong = complaints(&found, LONGER);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_list_of_longer_files_only_shrinks() {
    let found = |lines: &[(&str, usize)]| lines.iter().map(|&(file, lines)| (file.to_owned(), lines)).collect();
    assert_eq!(complaints(&found(&[("a.c", 500), ("b.c", 600)]), &[("b.c", 600)]), [""; 0]);
    let wrong =
        complaints(&found(&[("a.c", 501), ("b.c", 601), ("c.c", 500)]), &[("b.c", 600), ("c.c", 600), ("d.c", 600)]);
    assert_eq!(
        wrong,
        [
            "a.c: found 501 lines, wanted at most 500",
            "b.c: found 601 lines, wanted at most 600",
            "c.c: has 500 lines and is still on the list of longer files",
            "d.c: is on the list of longer files and does not exist",
        ]
    );
}
