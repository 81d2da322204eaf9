//! Frames: round trips, the frozen bytes of the handshake, and refusal of what is not
//! well-formed.

use proptest::prelude::*;
use uuid::Uuid;
use vmgang_wire::{
    Announce, CONNECTIONS_MAX, Compression, DATA_OVERHEAD_BYTES, Data, Direction, Frame,
    FrameHeader, HEADER_BYTES, Have, Hello, Join, Kind, MemberHello, MoreConnections,
    OFFER_CONTENTS_MAX, Offer, Offered, Outcome, Purpose, RefuseCode, TakenStage, Welcome,
    WireError,
};

fn encode(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = vec![0xee];
    frame.encode(&mut out);
    out.remove(0);
    out
}

fn decode(bytes: &[u8]) -> Result<Frame<'_>, WireError> {
    let header = bytes.first_chunk().ok_or(WireError::Truncated("header"))?;
    let header = FrameHeader::decode(header)?;
    Frame::decode(&header, &bytes[HEADER_BYTES..])
}

fn samples() -> Vec<Frame<'static>> {
    vec![
        Frame::Hello(Hello {
            job: Uuid::from_u128(0x1234),
            integrity_key: [7; 32],
            features: 0,
            purpose: Purpose::Migrate {
                stage: Some(TakenStage {
                    id: Uuid::from_u128(0x77),
                    frames: 12,
                }),
            },
            page_key_id: 0x1122,
            window_budget_bytes: 1 << 30,
            source_host: "a".into(),
            gang: "web".into(),
            members: vec![MemberHello {
                uuid: Uuid::from_u128(0x55),
                memory_bytes: 1 << 28,
                fixed_owner: Some((64055, 107)),
                name: "g1".into(),
            }],
        }),
        Frame::Welcome(Welcome {
            window_budget_bytes: 1 << 29,
            channel_credit_bytes: 1 << 23,
            contents: 99,
            stage: true,
            announced: 5,
            more_connections: None,
        }),
        Frame::Welcome(Welcome {
            window_budget_bytes: 1 << 29,
            channel_credit_bytes: 1 << 23,
            contents: 99,
            stage: true,
            announced: 5,
            more_connections: Some(MoreConnections {
                connections: CONNECTIONS_MAX,
                token: [8; 16],
            }),
        }),
        Frame::Refuse {
            code: RefuseCode::Offer,
            text: "no memory".into(),
        },
        Frame::Open {
            channel: 3,
            member: 1,
        },
        Frame::Data {
            channel: 3,
            data: Data {
                sequence: 9,
                stream_len: 100,
                digest: [9; 16],
                compression: Compression::NewStream { raw_len: 77 },
                payload: b"xyz",
            },
        },
        Frame::Credit {
            channel: 3,
            direction: Direction::Return,
            bytes: 5,
        },
        Frame::Finish { channel: 3 },
        Frame::Reset {
            channel: 3,
            text: "broken pipe".into(),
        },
        Frame::Return {
            channel: 3,
            digest: [1; 16],
            bytes: b"\0\x07\0\0",
        },
        Frame::OutcomeRequest { member: 0 },
        Frame::Outcome {
            member: 0,
            outcome: Some(Outcome {
                downtime_ms: Some(80),
                iterations: None,
                memory_bytes: Some(1),
            }),
        },
        Frame::Outcome {
            member: 1,
            outcome: None,
        },
        Frame::Goodbye,
        Frame::Alive,
        Frame::Join(Join {
            job: Uuid::from_u128(0x1234),
            token: [8; 16],
            connection: 1,
        }),
        Frame::Elsewhere { connection: 15 },
        Frame::Stage(Data {
            sequence: 9,
            stream_len: 8192,
            digest: [9; 16],
            compression: Compression::None,
            payload: b"xyz",
        }),
        Frame::Offer(Offer {
            contents: vec![
                Offered {
                    slot: 70,
                    digest: [1; 16],
                },
                Offered {
                    slot: 7,
                    digest: [2; 16],
                },
            ],
        }),
        Frame::Have(Have {
            contents: vec![true, false, false, true, true, true, false, true, true],
        }),
        Frame::Announce(Announce {
            digests: vec![[1; 16], [2; 16]],
        }),
        Frame::Libvirt,
        Frame::Connected,
        Frame::Control,
    ]
}

#[test]
fn every_kind_comes_back() {
    let mut kinds = Vec::new();
    for frame in samples() {
        let bytes = encode(&frame);
        assert_eq!(decode(&bytes), Ok(frame));
        kinds.push(bytes[5]);
    }
    for kind in Kind::ALL {
        assert!(kinds.contains(&(*kind as u8)), "no sample of {kind:?}");
    }
}

/// Whether a frame of fewer or more bytes is one as well.
fn has_open_end(frame: &Frame<'_>) -> bool {
    matches!(
        frame,
        Frame::Data { .. } | Frame::Stage(_) | Frame::Return { .. }
    )
}

#[test]
fn every_cut_and_every_trailing_byte_is_refused() {
    for frame in samples() {
        let bytes = encode(&frame);
        for cut in 0..bytes.len() {
            let mut short = bytes[..cut].to_vec();
            assert!(decode(&short).is_err(), "{frame:?} cut at {cut}");
            // Also with a length field that fits the cut (data and return may be shorter).
            if cut >= HEADER_BYTES && !has_open_end(&frame) {
                let len = (cut - HEADER_BYTES) as u32;
                short[12..16].copy_from_slice(&len.to_le_bytes());
                assert!(decode(&short).is_err(), "{frame:?} cut at {cut}");
            }
        }
        if !has_open_end(&frame) {
            let mut long = bytes.clone();
            long.push(0);
            let len = (long.len() - HEADER_BYTES) as u32;
            long[12..16].copy_from_slice(&len.to_le_bytes());
            assert!(decode(&long).is_err(), "{frame:?} with a trailing byte");
        }
    }
}

/// The bytes that let two versions refuse each other; they never change.
#[test]
fn the_frame_header_is_frozen() {
    assert_eq!(encode(&Frame::Goodbye), b"vmga\x01\x0c\0\0\0\0\0\0\0\0\0\0");
    let refuse = Frame::Refuse {
        code: RefuseCode::Version,
        text: "no".into(),
    };
    assert_eq!(
        encode(&refuse),
        b"vmga\x01\x03\0\0\0\0\0\0\x06\0\0\0\x01\0\x02\0no"
    );
}

#[test]
fn another_version_is_named() {
    let mut bytes = encode(&Frame::Alive);
    bytes[4] = 9;
    assert_eq!(decode(&bytes), Err(WireError::Version { theirs: 9 }));
    bytes[0] = b'G';
    assert_eq!(decode(&bytes), Err(WireError::Magic));
}

#[test]
fn a_length_beyond_the_kinds_maximum_is_refused_before_reading() {
    let mut header = [0; HEADER_BYTES];
    for kind in Kind::ALL {
        let mut bytes = Vec::new();
        FrameHeader {
            kind: *kind,
            channel: 0,
            body_len: kind.body_bytes_max() as u32 + 1,
        }
        .encode(&mut bytes);
        header.copy_from_slice(&bytes);
        assert!(matches!(
            FrameHeader::decode(&header),
            Err(WireError::Length { .. })
        ));
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic(
        kind in 0u8..20,
        channel in 0u32..3,
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = b"vmga\x01".to_vec();
        bytes.extend([kind, 0, 0]);
        bytes.extend(channel.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
        // What decodes must encode to the same bytes: one value, one form.
        if let Ok(frame) = decode(&bytes)
            && !matches!(frame, Frame::Outcome { .. })
        {
            prop_assert_eq!(encode(&frame), bytes);
        }
    }
}

#[test]
fn a_sealed_buffer_is_the_encoded_frame() {
    for compression in [
        Compression::None,
        Compression::Frame { raw_len: 1 },
        Compression::Stream { raw_len: 70_000 },
        Compression::NewStream { raw_len: 5 },
    ] {
        let data = Data {
            sequence: 0x1122_3344_5566_7788,
            stream_len: 4096,
            digest: [3; 16],
            compression,
            payload: b"payload",
        };
        // Also with a part of the payload that is sent after the buffer.
        for behind in [0, 3, data.payload.len()] {
            let (inside, after) = data.payload.split_at(data.payload.len() - behind);
            let mut buffer = vec![0xaa; DATA_OVERHEAD_BYTES];
            buffer.extend_from_slice(inside);
            data.seal(7, &mut buffer, behind).expect("there is room");
            buffer.extend_from_slice(after);
            let frame = data.clone();
            assert_eq!(
                buffer,
                encode(&Frame::Data {
                    channel: 7,
                    data: frame
                })
            );
            data.seal(0, &mut buffer, 0).expect("there is room");
            assert_eq!(buffer, encode(&Frame::Stage(data.clone())));
        }
        assert_eq!(data.seal(7, &mut [0; DATA_OVERHEAD_BYTES - 1], 0), None);
    }
}

#[test]
fn a_compression_must_say_its_length_and_no_compression_none() {
    let data = Data {
        sequence: 0,
        stream_len: 1,
        digest: [0; 16],
        compression: Compression::Frame { raw_len: 9 },
        payload: b"x",
    };
    let good = encode(&Frame::Data { channel: 1, data });
    let number = DATA_OVERHEAD_BYTES - 5;
    assert!(decode(&good).is_ok());
    for wrong in [0, 4, 255] {
        let mut bytes = good.clone();
        bytes[number] = wrong;
        assert!(decode(&bytes).is_err(), "compression {wrong}");
    }
    let mut bytes = good;
    bytes[number + 1] = 0;
    assert!(decode(&bytes).is_err(), "no length");
}

proptest! {
    #[test]
    fn joining_comes_back_and_only_with_connections_there_may_be(
        job in any::<u128>(),
        token in any::<[u8; 16]>(),
        number in any::<u8>(),
    ) {
        let join = Frame::Join(Join { job: Uuid::from_u128(job), token, connection: number });
        let elsewhere = Frame::Elsewhere { connection: number };
        let welcome = Frame::Welcome(Welcome {
            window_budget_bytes: 1,
            channel_credit_bytes: 2,
            contents: 0,
            stage: false,
            announced: 0,
            more_connections: Some(MoreConnections { connections: number, token }),
        });
        for (frame, allowed) in [
            (join, 1..CONNECTIONS_MAX),
            (elsewhere, 1..CONNECTIONS_MAX),
            (welcome, 2..CONNECTIONS_MAX + 1),
        ] {
            let bytes = encode(&frame);
            if allowed.contains(&number) {
                prop_assert_eq!(decode(&bytes), Ok(frame));
            } else {
                prop_assert!(matches!(decode(&bytes), Err(WireError::Value(_))));
            }
        }
    }
}

#[test]
fn a_feature_that_no_source_offers_cannot_be_granted() {
    let mut bytes = encode(&Frame::Welcome(Welcome {
        window_budget_bytes: 1,
        channel_credit_bytes: 2,
        contents: 0,
        stage: false,
        announced: 0,
        more_connections: None,
    }));
    bytes[HEADER_BYTES] = 2;
    assert_eq!(decode(&bytes), Err(WireError::Value("features")));
}

#[test]
fn a_purpose_has_its_own_fields_and_no_other() {
    let hello = |purpose| {
        let Some(Frame::Hello(hello)) = samples().into_iter().next() else {
            panic!("the first sample is a HELLO");
        };
        Frame::Hello(Hello { purpose, ..hello })
    };
    let at = HEADER_BYTES + 16 + 32 + 4;
    for purpose in [
        Purpose::Migrate { stage: None },
        Purpose::Stage { seconds: 60 },
        Purpose::Ambient,
    ] {
        let frame = hello(purpose);
        let bytes = encode(&frame);
        assert_eq!(decode(&bytes), Ok(frame));
        for number in 0..5 {
            let mut wrong = bytes.clone();
            wrong[at] = number;
            // These two have no fields.
            let bare = |number| matches!(number, 0 | 3);
            let allowed = number == bytes[at] || (bare(number) && bare(bytes[at]));
            assert_eq!(decode(&wrong).is_ok(), allowed, "{purpose:?} as {number}");
        }
    }
    let never = encode(&hello(Purpose::Stage { seconds: 0 }));
    assert_eq!(decode(&never), Err(WireError::Value("purpose")));
}

#[test]
fn offers_and_answers_are_bounded() {
    let offered = Offered {
        slot: 1,
        digest: [1; 16],
    };
    for (count, allowed) in [
        (0, false),
        (1, true),
        (OFFER_CONTENTS_MAX, true),
        (OFFER_CONTENTS_MAX + 1, false),
    ] {
        let offer = encode(&Frame::Offer(Offer {
            contents: vec![offered; count],
        }));
        assert_eq!(decode(&offer).is_ok(), allowed, "{count} offered");
        let have = encode(&Frame::Have(Have {
            contents: vec![true; count],
        }));
        assert_eq!(decode(&have).is_ok(), allowed, "{count} answered");
        let announce = encode(&Frame::Announce(Announce {
            digests: vec![[1; 16]; count],
        }));
        assert_eq!(decode(&announce).is_ok(), allowed, "{count} announced");
    }
    let mut padded = encode(&Frame::Have(Have {
        contents: vec![true; 3],
    }));
    padded[HEADER_BYTES + 2] |= 8;
    assert_eq!(decode(&padded), Err(WireError::Value("padding")));
}

#[test]
fn a_stage_is_whole_pages() {
    let stage = |stream_len| {
        encode(&Frame::Stage(Data {
            sequence: 0,
            stream_len,
            digest: [0; 16],
            compression: Compression::None,
            payload: b"",
        }))
    };
    assert!(decode(&stage(4096)).is_ok());
    assert_eq!(decode(&stage(4097)), Err(WireError::Value("page_bytes")));
}

/// What fuzzing begins with: a frame of each kind that has fields, as this version has them.
#[test]
fn seeds_of_fuzzing_are_frames() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/corpus/frame");
    let mut kinds = Vec::new();
    for seed in std::fs::read_dir(corpus).expect("the corpus is there") {
        let path = seed.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("a file");
        assert!(decode(&bytes).is_ok(), "{}", path.display());
        kinds.push(bytes[5]);
    }
    for kind in [1, 2, 5, 14, 15, 16, 17, 18, 19] {
        assert!(kinds.contains(&kind), "no seed of kind {kind}");
    }
}
