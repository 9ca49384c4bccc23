//! No source file has more than [`MOST`] lines, whatever its language: a longer one has more than one purpose.

use std::collections::BTreeMap;
use std::path::Path;

const MOST: usize = 500;

const FOLDERS: &[&str] = &["src", "tests", "kernels", "examples", "examples-c", "cbindings"];
const LANGUAGES: &[&str] = &["rs", "c", "cpp", "h", "hpp", "cu", "cuh"];
/// Folders of that name hold what builds leave behind.
const BUILT: &[&str] = &["build", "target"];

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
fn complaints(found: &BTreeMap<String, usize>) -> Vec<String> {
    let longer = found.iter().filter(|&(_, &lines)| lines > MOST);
    longer.map(|(file, lines)| format!("{file}: found {lines} lines, wanted at most {MOST}")).collect()
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
    let wrong = complaints(&found);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_long_file_is_told() {
    let found = [("a.c", 500), ("b.c", 501)].map(|(file, lines)| (file.to_owned(), lines)).into();
    assert_eq!(complaints(&found), ["b.c: found 501 lines, wanted at most 500"]);
}
