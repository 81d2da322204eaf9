//! docs/protocol.md says what this crate does: its kinds, its limits and its worked example
//! are compared with the code, so that neither changes alone.

use std::collections::BTreeMap;

use twox_hash::XxHash3_128;
use vmgang_wire::payload::{
    BLOCKS_MAX, BlockReference, Content, DELTA_BYTES_MAX, Encoder, Operation, Operations,
    PAGE_BYTES, PageBlocks, Place,
};
use vmgang_wire::{
    BODY_BYTES_MAX, CHANNELS_MAX, CONNECTIONS_MAX, Compression, DATA_OVERHEAD_BYTES, Data,
    FRAME_CREDIT_BYTES_MIN, FRAME_DIGEST_CONTEXT, Frame, FrameHeader, HEADER_BYTES, Kind,
    MEMBERS_MAX, NAME_BYTES_MAX, OFFER_CONTENTS_MAX, OFFERS_MAX, RETURN_CREDIT_BYTES,
    STREAM_BYTES_MAX, TEXT_BYTES_MAX, VERSION,
};

const DOCUMENT: &str = include_str!("../../../docs/protocol.md");

/// The text below a heading, up to the next one.
fn section(heading: &str) -> &'static str {
    let (_, below) = DOCUMENT
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("docs/protocol.md has no heading `{heading}`"));
    below.split("\n#").next().unwrap_or(below)
}

/// The cells of each row of the section's table, without its head.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let cells = |line: &'static str| {
        let inner = line.trim_matches('|');
        inner
            .split('|')
            .map(|cell| cell.trim().trim_matches('`'))
            .collect()
    };
    section(heading)
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(cells)
        .collect()
}

/// The bytes of the code block with this name.
fn hex_block(name: &str) -> Vec<u8> {
    let (_, block) = DOCUMENT
        .split_once(&format!("```text {name}\n"))
        .unwrap_or_else(|| panic!("docs/protocol.md has no block `{name}`"));
    let block = block.split("```").next().unwrap_or(block);
    block
        .lines()
        // Two spaces end the bytes of a line; what follows explains them.
        .flat_map(|line| line.split("  ").next().unwrap_or(line).split_whitespace())
        .map(|byte| u8::from_str_radix(byte, 16).unwrap_or_else(|_| panic!("`{byte}` is no byte")))
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    let lines: Vec<String> = bytes
        .chunks(16)
        .map(|line| {
            let bytes: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            bytes.join(" ")
        })
        .collect();
    lines.join("\n")
}

#[test]
fn the_kinds_are_those_of_the_code() {
    let documented: Vec<(String, String, String)> = rows("## Kinds")
        .into_iter()
        .map(|row| {
            (
                row[0].to_owned(),
                row[1].replace('_', ""),
                row[3].to_owned(),
            )
        })
        .collect();
    let coded: Vec<(String, String, String)> = Kind::ALL
        .iter()
        .map(|kind| {
            (
                (*kind as u8).to_string(),
                format!("{kind:?}").to_uppercase(),
                kind.body_bytes_max().to_string(),
            )
        })
        .collect();
    assert_eq!(documented, coded);
    for row in rows("## Kinds") {
        section(&format!("### {} {}", row[0], row[1]));
    }
}

#[test]
fn the_limits_are_those_of_the_code() {
    let documented: BTreeMap<&str, &str> = rows("## Limits")
        .into_iter()
        .map(|row| (row[0], row[1]))
        .collect();
    let coded = BTreeMap::from([
        ("VERSION", u64::from(VERSION)),
        ("HEADER_BYTES", HEADER_BYTES as u64),
        ("BODY_BYTES_MAX", BODY_BYTES_MAX as u64),
        ("STREAM_BYTES_MAX", STREAM_BYTES_MAX as u64),
        ("DATA_OVERHEAD_BYTES", DATA_OVERHEAD_BYTES as u64),
        ("RETURN_CREDIT_BYTES", RETURN_CREDIT_BYTES as u64),
        ("FRAME_CREDIT_BYTES_MIN", FRAME_CREDIT_BYTES_MIN as u64),
        ("MEMBERS_MAX", MEMBERS_MAX as u64),
        ("CHANNELS_MAX", u64::from(CHANNELS_MAX)),
        ("CONNECTIONS_MAX", u64::from(CONNECTIONS_MAX)),
        ("OFFER_CONTENTS_MAX", OFFER_CONTENTS_MAX as u64),
        ("OFFERS_MAX", OFFERS_MAX as u64),
        ("NAME_BYTES_MAX", NAME_BYTES_MAX as u64),
        ("TEXT_BYTES_MAX", TEXT_BYTES_MAX as u64),
        ("PAGE_BYTES", PAGE_BYTES as u64),
        ("DELTA_BYTES_MAX", DELTA_BYTES_MAX as u64),
    ]);
    let coded: BTreeMap<&str, String> = coded
        .into_iter()
        .map(|(name, value)| (name, value.to_string()))
        .collect();
    assert!(
        documented
            .iter()
            .map(|(name, value)| (*name, *value))
            .eq(coded.iter().map(|(name, value)| (*name, value.as_str()))),
        "documented {documented:?}, coded {coded:?}"
    );
}

/// A page that counts from `first` to 250 and begins again at 0.
fn counting_page(first: usize) -> [u8; PAGE_BYTES] {
    std::array::from_fn(|index| ((first + index) % 251) as u8)
}

/// What the example says the two pages in the window are.
fn slot(slot: u32) -> [u8; PAGE_BYTES] {
    counting_page(slot as usize - 5)
}

/// The example as operations: one RAM section of a stream.
fn operations() -> Vec<Operation<'static>> {
    let record = |address, content| Operation::Page {
        place: Place::Record { address },
        content,
    };
    let reference = |slot| Content::Reference { slot, group: 0 };
    let zero = |address| Operation::Zero { address, fill: 0 };
    vec![
        Operation::Opaque(&[0x02, 0, 0, 0, 2]),
        zero(0x10_0000),
        zero(0x10_1000),
        zero(0x10_2000),
        record(0x10_3000, Content::Uniform { fill: 0xff }),
        record(0x10_4000, reference(5)),
        record(0x10_5000, reference(6)),
        Operation::Opaque(&[0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2]),
    ]
}

/// The stream bytes that the operations stand for, built as the document says.
fn stream() -> Vec<u8> {
    let mut stream = Vec::new();
    for operation in operations() {
        match operation {
            Operation::Opaque(bytes) => stream.extend_from_slice(bytes),
            Operation::Zero { address, fill } => {
                stream.extend_from_slice(&(address | 0x22).to_be_bytes());
                stream.push(fill);
            }
            Operation::Keep { .. } | Operation::Address { .. } => unreachable!("there is none"),
            Operation::Page { place, content } => {
                if let Place::Record { address } = place {
                    stream.extend_from_slice(&(address | 0x28).to_be_bytes());
                }
                match content {
                    Content::Literal(page) | Content::Define { page, .. } => {
                        stream.extend_from_slice(page);
                    }
                    Content::Reference { slot: number, .. } => {
                        stream.extend_from_slice(&slot(number));
                    }
                    Content::Uniform { fill } => stream.extend_from_slice(&[fill; PAGE_BYTES]),
                    Content::Delta { .. } | Content::Blocks { .. } => {
                        panic!("not in this example");
                    }
                }
            }
        }
    }
    stream
}

#[test]
fn the_worked_example_is_what_the_encoder_writes() {
    let mut encoder = Encoder::default();
    for operation in operations() {
        match operation {
            Operation::Opaque(bytes) => encoder.opaque(bytes),
            Operation::Zero { address, fill } => encoder.zero(address, fill),
            Operation::Page { place, content } => encoder.page(place, content),
            Operation::Keep { .. } | Operation::Address { .. } => unreachable!("there is none"),
        }
    }
    let mut payload = Vec::new();
    encoder.finish(&mut payload);

    let stream = stream();
    let key: [u8; 32] = std::array::from_fn(|index| index as u8);
    let mut secret = [0; 192];
    blake3::Hasher::new_derive_key(FRAME_DIGEST_CONTEXT)
        .update(&key)
        .finalize_xof()
        .fill(&mut secret);
    let mut digest = XxHash3_128::oneshot_with_secret(&secret, &stream)
        .expect("a secret of the right length")
        .to_le_bytes();
    // Of channel 1 and member 0.
    digest[0] ^= 1;
    let mut frame = Vec::new();
    Frame::Data {
        channel: 1,
        data: Data {
            sequence: 42,
            stream_len: stream.len() as u32,
            digest,
            compression: Compression::None,
            payload: &payload,
        },
    }
    .encode(&mut frame);
    let documented = hex_block("example");
    assert!(
        documented == frame,
        "docs/protocol.md has\n{}\nthe encoder writes\n{}",
        hex(&documented),
        hex(&frame)
    );
    let length = format!(
        "{} bytes of stream in a frame of {} bytes",
        stream.len(),
        frame.len()
    );
    assert!(DOCUMENT.contains(&length), "not in the document: {length}");
}

#[test]
fn the_worked_example_reads_back() {
    let bytes = hex_block("example");
    let header = FrameHeader::decode(bytes.first_chunk().expect("a header")).expect("valid");
    let frame = Frame::decode(&header, &bytes[HEADER_BYTES..]).expect("valid");
    let Frame::Data { channel: 1, data } = frame else {
        panic!("not a DATA frame of channel 1: {frame:?}");
    };
    let read: Result<Vec<_>, _> = Operations::new(data.payload).expect("valid").collect();
    assert_eq!(read.expect("valid"), operations());
}

#[test]
fn the_operations_of_the_example_are_what_the_encoder_writes() {
    let page = [0; PAGE_BYTES];
    let source = |slot, index| Some(BlockReference { slot, index });
    let mut sources = [None; BLOCKS_MAX];
    sources[..4].copy_from_slice(&[source(5, 0), source(5, 1), source(2, 2), source(2, 3)]);
    let blocks = PageBlocks::of_page(1024, sources, &page).expect("well-formed");
    let delta = &[0x10, 0x00, 0xaa][..];
    let contents = [
        Content::Delta {
            slot: 7,
            base: 3,
            delta,
        },
        Content::Delta {
            slot: 8,
            base: 4,
            delta,
        },
        Content::Blocks { slot: 9, blocks },
    ];
    let mut encoder = Encoder::default();
    for (number, content) in contents.into_iter().enumerate() {
        let address = 0x10_0000 + (number * PAGE_BYTES) as u64;
        encoder.page(Place::Record { address }, content);
    }
    let mut payload = Vec::new();
    encoder.finish(&mut payload);
    let documented = hex_block("operations");
    let written = &payload[1..payload.len() - 2 * delta.len()];
    assert!(
        documented == written,
        "docs/protocol.md has\n{}\nthe encoder writes\n{}",
        hex(&documented),
        hex(written)
    );
}

#[test]
fn the_kept_page_of_the_example_is_what_the_encoder_writes() {
    let mut encoder = Encoder::default();
    encoder.passed(4200);
    encoder.keep(8, 3);
    let mut payload = Vec::new();
    encoder.finish(&mut payload);
    assert_eq!(hex(&hex_block("keep")), hex(&payload[1..]));
}
