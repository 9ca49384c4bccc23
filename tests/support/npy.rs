//! Reads `.npy` files of little-endian f16 and f32 in C order.

use std::path::Path;

/// An array, widened to f32.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Reads a file; panics with its name where it is not what is expected.
pub fn read(path: &Path) -> Array {
    let name = path.display();
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(bytes.starts_with(b"\x93NUMPY\x01"), "{name}: not an .npy file of version 1");
    let header_len = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..10 + header_len]).expect("an ASCII header");
    assert!(header.contains("'fortran_order': False"), "{name}: {header}");
    let tuple = header.split_once("'shape': (").and_then(|(_, rest)| rest.split_once(')')).expect("a shape").0;
    let shape: Vec<usize> =
        tuple.split(',').filter(|n| !n.trim().is_empty()).map(|n| n.trim().parse().expect("a size")).collect();
    let body = &bytes[10 + header_len..];
    let data: Vec<f32> = if header.contains("'<f2'") {
        body.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    } else {
        assert!(header.contains("'<f4'"), "{name}: {header}");
        body.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    assert_eq!(data.len(), shape.iter().product::<usize>(), "{name}: {shape:?}");
    Array { shape, data }
}
