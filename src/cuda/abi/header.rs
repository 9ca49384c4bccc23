//! `kernels/abi.cuh`: how it is compared, value by value, while the library is compiled, and how it is written.

use super::constants::{CHECK_CONSTANTS, CONSTANTS, Constants, GATHER_CONSTANTS, QUERY_CONSTANTS, TERMS_CONSTANTS};
use super::hash::{ABI, CHECK_ABI, GATHER_ABI, QUERY_ABI, TERMS_ABI};
use super::layouts::{CHECK_LAYOUTS, GATHER_LAYOUTS, LAYOUTS, Layout, QUERY_LAYOUTS, TERMS_LAYOUTS};

/// In the order of the header.
const CONSTANT_LISTS: [&[Constants]; 5] =
    [CONSTANTS, TERMS_CONSTANTS, CHECK_CONSTANTS, QUERY_CONSTANTS, GATHER_CONSTANTS];
const HASHES: [(&str, u64); 5] = [
    ("kAbi", ABI),
    ("kTermsAbi", TERMS_ABI),
    ("kCheckAbi", CHECK_ABI),
    ("kQueryAbi", QUERY_ABI),
    ("kGatherAbi", GATHER_ABI),
];
const LAYOUT_LISTS: [&[Layout]; 5] = [LAYOUTS, TERMS_LAYOUTS, CHECK_LAYOUTS, QUERY_LAYOUTS, GATHER_LAYOUTS];

/// Statements `NAME = VALUE` and `NAME == VALUE` of a header, one after the other.
struct Statements<'a> {
    header: &'a [u8],
    at: usize,
}

/// What such a statement says of a number.
struct Statement {
    /// Where its name ends.
    end: usize,
    value: u64,
}

impl Statements<'_> {
    /// The next one of a number.
    const fn next(&mut self) -> Option<Statement> {
        while self.at < self.header.len() {
            if self.header[self.at] != b'=' {
                self.at += 1;
                continue;
            }
            // A number that is not set apart is part of a comment.
            let end = self.at.saturating_sub(1);
            let is_apart = self.header[end] == b' ';
            while self.at < self.header.len() && matches!(self.header[self.at], b'=' | b' ') {
                self.at += 1;
            }
            if is_apart && self.at < self.header.len() && self.header[self.at].is_ascii_digit() {
                return Some(Statement { end, value: self.number() });
            }
        }
        None
    }

    /// The number that begins here, decimal or hexadecimal.
    const fn number(&mut self) -> u64 {
        let hexadecimal =
            self.at + 1 < self.header.len() && self.header[self.at] == b'0' && self.header[self.at + 1] == b'x';
        let base: u64 = if hexadecimal { 16 } else { 10 };
        self.at += if hexadecimal { 2 } else { 0 };
        let mut value: u64 = 0;
        while self.at < self.header.len() && self.header[self.at].is_ascii_hexdigit() {
            let digit = match self.header[self.at] {
                digit @ b'0'..=b'9' => digit - b'0',
                letter => letter.to_ascii_lowercase() - b'a' + 10,
            };
            value = value.wrapping_mul(base).wrapping_add(digit as u64);
            self.at += 1;
        }
        value
    }

    /// Whether the next statement gives the name made of `parts` the value.
    const fn says(&mut self, parts: &[&str], value: u64) -> bool {
        let Some(next) = self.next() else { return false };
        let (mut end, mut i) = (next.end, parts.len());
        while i > 0 {
            i -= 1;
            let (part, mut left) = (parts[i].as_bytes(), parts[i].len());
            if left > end {
                return false;
            }
            while left > 0 {
                left -= 1;
                end -= 1;
                if self.header[end] != part[left] {
                    return false;
                }
            }
        }
        let is_whole = end == 0 || matches!(self.header[end - 1], b' ' | b'(');
        is_whole && next.value == value
    }

    const fn constants(&mut self, lists: &[Constants]) -> Option<&'static str> {
        let mut list = 0;
        while list < lists.len() {
            let (values, mut i) = (lists[list].values, 0);
            while i < values.len() {
                if !self.says(&[values[i].0], values[i].1) {
                    return Some(values[i].0);
                }
                i += 1;
            }
            list += 1;
        }
        None
    }

    const fn layouts(&mut self, lists: &[Layout]) -> Option<&'static str> {
        let mut list = 0;
        while list < lists.len() {
            let Layout { name, size, fields } = lists[list];
            if !self.says(&["sizeof(", name, ")"], size) {
                return Some(name);
            }
            let mut i = 0;
            while i < fields.len() {
                if !self.says(&["offsetof(", name, ", ", fields[i].0, ")"], fields[i].1) {
                    return Some(fields[i].0);
                }
                i += 1;
            }
            list += 1;
        }
        None
    }
}

/// The first name of the lists of which a header does not say the value in its place, in the order of the lists; or what it
/// has beyond them.
pub(super) const fn first_difference(header: &[u8]) -> Option<&'static str> {
    let mut header = Statements { header, at: 0 };
    let mut part = 0;
    while part < CONSTANT_LISTS.len() {
        if let Some(name) = header.constants(CONSTANT_LISTS[part]) {
            return Some(name);
        }
        part += 1;
    }
    let mut i = 0;
    while i < HASHES.len() {
        if !header.says(&[HASHES[i].0], HASHES[i].1) {
            return Some(HASHES[i].0);
        }
        i += 1;
    }
    part = 0;
    while part < LAYOUT_LISTS.len() {
        if let Some(name) = header.layouts(LAYOUT_LISTS[part]) {
            return Some(name);
        }
        part += 1;
    }
    if header.next().is_some() { Some("a value that src/cuda/abi does not have") } else { None }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn header() -> String {
        let mut text = String::from(
            "// Generated from src/cuda/abi: TREEATTN_BLESS=1 cargo test --lib abi writes it anew.\n//\n\
             // What the library and its kernels agree on. TREEATTN_CHECK_LAYOUT asserts that the structs of params.cuh and\n\
             // rows.cuh are those of the library, field by field.\n\
             #pragma once\n\n#include <stddef.h>\n#include <stdint.h>\n\nnamespace treeattn {\n\n",
        );
        for constants in CONSTANT_LISTS.into_iter().flatten() {
            writeln!(text, "// {}\nenum : {} {{", constants.about, constants.kind).unwrap();
            for (name, value) in constants.values {
                writeln!(text, "    {name} = {value},").unwrap();
            }
            text.push_str("};\n");
        }
        text.push_str(
            "\n// The hashes of what all kernels know, and of what those that take further parameters do; each image carries its own.\n",
        );
        for (name, hash) in HASHES {
            writeln!(text, "constexpr uint64_t {name} = 0x{hash:016x};").unwrap();
        }
        text.push_str("\n}  // namespace treeattn\n\n// Once in each kernels/NAME.cu: the image's word that it was compiled from this.\n");
        for (name, _) in HASHES {
            // kTermsAbi: TREEATTN_TERMS_ABI.
            let part = name[1..name.len() - "Abi".len()].to_uppercase();
            let part = if part.is_empty() { part } else { part + "_" };
            writeln!(
                text,
                "#define TREEATTN_{part}ABI(NAME) \\\n    \
                 extern \"C\" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::{name};"
            )
            .unwrap();
        }
        text.push_str("\n#define TREEATTN_CHECK_LAYOUT");
        for layout in LAYOUT_LISTS.into_iter().flatten() {
            let name = layout.name;
            write!(text, " \\\n    static_assert(sizeof({name}) == {}, \"{name}\");", layout.size).unwrap();
            for (field, offset) in layout.fields {
                write!(text, " \\\n    static_assert(offsetof({name}, {field}) == {offset}, \"{name}::{field}\");")
                    .unwrap();
            }
        }
        text.push('\n');
        text
    }

    #[test]
    fn the_kernels_have_the_same_constants_and_layouts() {
        let (path, wanted) = (format!("{}/kernels/abi.cuh", env!("CARGO_MANIFEST_DIR")), header());
        if std::env::var_os("TREEATTN_BLESS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == wanted, "{path} is not what src/cuda/abi says: run this test with TREEATTN_BLESS=1");
        assert_eq!(first_difference(found.as_bytes()), None);
    }

    #[test]
    fn every_value_of_the_header_is_compared() {
        let text = header();
        let numbers: Vec<_> = text.match_indices("= ").map(|(at, _)| at + 2).collect();
        let mut compared = 0;
        for at in numbers.into_iter().filter(|&at| text.as_bytes()[at].is_ascii_digit()) {
            // Another last digit, and the name of the line is told.
            let end = at + text[at..].find([',', ';', ')']).expect("a statement ends");
            let mut changed = text.clone();
            let digit = if text[..end].ends_with('1') { "2" } else { "1" };
            changed.replace_range(end - 1..end, digit);
            let name = first_difference(changed.as_bytes()).expect("a value that differs");
            let line = text[..at].rsplit('\n').next().unwrap();
            assert!(line.contains(name), "{name}: {line}");
            compared += 1;
        }
        let values =
            |lists: &[&[Constants]]| lists.iter().flat_map(|l| l.iter()).map(|c| c.values.len()).sum::<usize>();
        let fields =
            |lists: &[&[Layout]]| lists.iter().flat_map(|l| l.iter()).map(|l| 1 + l.fields.len()).sum::<usize>();
        let constants = values(&CONSTANT_LISTS);
        assert_eq!(compared, constants + HASHES.len() + fields(&LAYOUT_LISTS));
    }

    #[test]
    fn names_that_are_missing_added_or_longer_are_told() {
        let text = header();
        let told = |text: &str| first_difference(text.as_bytes());
        assert_eq!(told(&text), None);
        assert_eq!(told(&text.replace("    kF16 = 2,\n", "")), Some("kF16"));
        assert_eq!(told(&text.replace("    kF16 = 2,\n", "    kF16 = 2,\n    kF17 = 2,\n")), Some("kBf16"));
        assert_eq!(told(&text.replace(" kF16 = 2", " xkF16 = 2")), Some("kF16"));
        assert_eq!(told(&format!("{text}enum {{ kMore = 1 }};\n")), Some("a value that src/cuda/abi does not have"));
        assert_eq!(told(""), Some("kF32"));
    }
}
