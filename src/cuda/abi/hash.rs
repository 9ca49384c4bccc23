//! The lists that `abi` holds, their hash, and how a hash is found in the generated header.

/// Constants of one kind.
pub(super) struct Constants {
    /// What they are.
    pub about: &'static str,
    /// Their type in C++.
    pub kind: &'static str,
    pub values: &'static [(&'static str, u64)],
}

/// Where the fields of a struct lie.
pub(super) struct Layout {
    pub name: &'static str,
    pub size: u64,
    pub fields: &'static [(&'static str, u64)],
}

/// FNV-1a.
const fn hash_bytes(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

const fn hash_values(mut hash: u64, values: &[(&str, u64)]) -> u64 {
    let mut i = 0;
    while i < values.len() {
        hash = hash_bytes(hash_bytes(hash, values[i].0.as_bytes()), &values[i].1.to_le_bytes());
        i += 1;
    }
    hash
}

/// The hash of two lists, and of what `hash` is of.
pub(super) const fn hash_lists(mut hash: u64, constants: &[Constants], layouts: &[Layout]) -> u64 {
    let mut i = 0;
    while i < constants.len() {
        hash = hash_bytes(hash_bytes(hash, constants[i].about.as_bytes()), constants[i].kind.as_bytes());
        hash = hash_values(hash, constants[i].values);
        i += 1;
    }
    i = 0;
    while i < layouts.len() {
        hash = hash_bytes(hash, layouts[i].name.as_bytes());
        hash = hash_values(hash_bytes(hash, &layouts[i].size.to_le_bytes()), layouts[i].fields);
        i += 1;
    }
    hash
}

/// What `kernels/abi.cuh` says of a hash: the hexadecimal number after `before`; 0 if there is none.
pub(super) const fn said(header: &[u8], before: &[u8]) -> u64 {
    let (mut at, mut matched) = (0, 0);
    while at < header.len() && matched < before.len() {
        matched = if header[at] == before[matched] { matched + 1 } else { (header[at] == before[0]) as usize };
        at += 1;
    }
    let mut value = 0;
    while at < header.len() && header[at].is_ascii_hexdigit() {
        let digit = if header[at] <= b'9' { header[at] - b'0' } else { header[at] - b'a' + 10 };
        value = value << 4 | digit as u64;
        at += 1;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_header_is_found() {
        let said = |header: &[u8]| said(header, b"kAbi = 0x");
        assert_eq!(said(b"x kkAbi = 0x00ff;"), 0xff);
        assert_eq!((said(b"kAbi = 12;"), said(b"")), (0, 0));
    }
}
