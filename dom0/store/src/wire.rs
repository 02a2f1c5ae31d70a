//! Messages: headers, payloads, and finding them in a stream of bytes.

use crate::Error;
use alloc::vec::Vec;
use hypercall_abi::io::xenstore::{MessageHeader, PAYLOAD_MAX};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a header.
pub const HEADER: usize = size_of::<MessageHeader>();

/// A client announced a payload that no message may have; the stream cannot be understood any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl core::fmt::Display for TooLong {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "a message is longer than {PAYLOAD_MAX} bytes")
    }
}

impl core::error::Error for TooLong {}

/// Finds messages in bytes that come in any pieces. It keeps at most one message.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// How many bytes may be fed before there is a message, or it is known how long it will be. Never 0.
    ///
    /// # Errors
    /// [`TooLong`].
    pub fn wanted(&self) -> Result<usize, TooLong> {
        let whole = HEADER + self.header().map_or(Ok(0), payload_of)?;
        Ok(whole.saturating_sub(self.bytes.len()).max(1))
    }

    /// Takes at most [`wanted`](Self::wanted) bytes; gives the message when they complete one.
    ///
    /// # Errors
    /// [`TooLong`].
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<(MessageHeader, Vec<u8>)>, TooLong> {
        self.bytes.extend_from_slice(bytes);
        let Some(header) = self.header() else { return Ok(None) };
        let whole = HEADER + payload_of(header)?;
        if self.bytes.len() < whole {
            return Ok(None);
        }
        let rest = self.bytes.split_off(whole);
        let mut message = core::mem::replace(&mut self.bytes, rest);
        message.drain(..HEADER);
        Ok(Some((header, message)))
    }

    /// Whether a message has begun and not ended.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        !self.bytes.is_empty()
    }

    fn header(&self) -> Option<MessageHeader> {
        MessageHeader::read_from_bytes(self.bytes.get(..HEADER)?).ok()
    }
}

fn payload_of(header: MessageHeader) -> Result<usize, TooLong> {
    let len = header.len as usize;
    if len > PAYLOAD_MAX { Err(TooLong) } else { Ok(len) }
}

/// A message as bytes; its header says the payload's length whatever `len` was.
#[must_use]
pub fn encode(header: MessageHeader, payload: &[u8]) -> Vec<u8> {
    let header = MessageHeader { len: payload.len() as u32, ..header };
    [header.as_bytes(), payload].concat()
}

/// The payload's only string: it ends with its only zero byte.
pub(crate) fn only_string(payload: &[u8]) -> Result<&[u8], Error> {
    match payload.split_last() {
        Some((0, text)) if !text.contains(&0) => Ok(text),
        _ => Err(Error::Invalid),
    }
}

/// The first string, and what follows its zero byte.
pub(crate) fn first_string(payload: &[u8]) -> Result<(&[u8], &[u8]), Error> {
    let end = payload.iter().position(|&byte| byte == 0).ok_or(Error::Invalid)?;
    payload.split_at_checked(end).and_then(|(text, rest)| Some((text, rest.get(1..)?))).ok_or(Error::Invalid)
}

/// All strings; what follows the last zero byte is not looked at.
pub(crate) fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = payload;
    core::iter::from_fn(move || {
        let (text, after) = first_string(rest).ok()?;
        rest = after;
        Some(text)
    })
}

#[cfg(test)]
mod tests {
    use super::{Decoder, HEADER, TooLong, encode, first_string, only_string, strings};
    use alloc::vec::Vec;
    use hypercall_abi::io::xenstore::MessageHeader;
    use proptest::prelude::*;

    #[test]
    fn payloads() {
        assert_eq!(only_string(b"a\0"), Ok(&b"a"[..]));
        for bad in [&b""[..], b"a", b"a\0b", b"a\0b\0", b"a\0\0"] {
            assert!(only_string(bad).is_err(), "{bad:?}");
        }
        assert_eq!(first_string(b"p\0v\0w"), Ok((&b"p"[..], &b"v\0w"[..])));
        assert!(first_string(b"p").is_err());
        assert_eq!(strings(b"a\0\0b\0rest").collect::<Vec<_>>(), [&b"a"[..], b"", b"b"]);
    }

    #[test]
    fn a_length_that_cannot_be_is_an_error_as_soon_as_it_is_known() {
        for len in [4097, u32::MAX, 1 << 31] {
            let header = MessageHeader { len: 0, ..MessageHeader::default() };
            let mut bytes = encode(header, &[]);
            bytes.splice(12..16, len.to_le_bytes());
            let mut decoder = Decoder::default();
            assert_eq!(decoder.wanted(), Ok(HEADER));
            assert_eq!(decoder.feed(&bytes[..15]), Ok(None));
            assert_eq!(decoder.feed(&bytes[15..]), Err(TooLong));
            assert_eq!(decoder.wanted(), Err(TooLong));
        }
        assert!(Decoder::default().feed(&encode(MessageHeader::default(), &[7; 4096])).is_ok());
    }

    proptest! {
        #[test]
        fn messages_come_out_whole_however_they_are_cut(
            sizes in proptest::collection::vec(0usize..5000, 1..6),
            cuts in proptest::collection::vec(1usize..2000, 1..200),
        ) {
            let messages: Vec<(MessageHeader, Vec<u8>)> = sizes
                .iter()
                .enumerate()
                .map(|(at, &size)| {
                    let size = size.min(4096);
                    let header = MessageHeader { kind: 2, req_id: at as u32, tx_id: 9, len: size as u32 };
                    (header, (0..size).map(|byte| (byte ^ at) as u8).collect())
                })
                .collect();
            let stream: Vec<u8> = messages.iter().flat_map(|(header, payload)| encode(*header, payload)).collect();
            let (mut decoder, mut got, mut at) = (Decoder::default(), Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                let count = decoder.wanted().unwrap().min(*cut).min(stream.len() - at);
                got.extend(decoder.feed(&stream[at..at + count]).unwrap());
                at += count;
                if at == stream.len() {
                    break;
                }
            }
            prop_assert!(!decoder.is_midway());
            prop_assert_eq!(got, messages);
        }
    }
}
