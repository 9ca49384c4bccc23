//! The layout of messages over a transport: a header of 64-bit words, then payload.

/// Bytes of a message's header, a multiple of the alignment of payloads.
pub(super) const HEADER_BYTES: usize = 64;
/// Payload of a first message: a decode step of 32 heads of 128 in f32 and its lse, with room to spare.
pub(super) const INLINE_BYTES: usize = 16_896;
/// Bytes of a first message, whatever its payload.
pub(super) const FIRST_BYTES: usize = HEADER_BYTES + INLINE_BYTES;
/// Says that a message is one of these, and which version of them.
pub(super) const MAGIC: u64 = 0x7ee5_a77e_0000_0004;
/// Longest setup blob.
pub(super) const MAX_BLOB: u64 = 1 << 20;

/// Writes words to the front of a message.
pub(super) fn put_words(message: &mut [u8], words: &[u64]) {
    for (to, word) in message.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

/// 64-bit word `i` of a message.
pub(super) fn word(message: &[u8], i: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&message[i * 8..][..8]);
    u64::from_le_bytes(bytes)
}
