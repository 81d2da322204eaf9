//! Tokenising is a bijection: for well-formed, torn, mutated and arbitrary input, cut and
//! flushed anywhere, the tokens' bytes are the input's bytes.

use proptest::prelude::*;
use vmgang_stream::synthetic::{MultifdBuilder, StreamBuilder};
use vmgang_stream::{ConnectionKind, PAGE_BYTES, Page, Token, Tokenizer, rebuild};

/// Runs `input` through a fresh tokenizer, like [`run_with`].
fn run(input: &[u8], pieces: &[(usize, bool)]) -> (Vec<u8>, usize, usize) {
    run_with(&mut Tokenizer::new(), input, pieces)
}

/// Runs `input` through a tokenizer in pieces of the given sizes, flushing after each piece
/// that says so; returns the rebuilt bytes and the number of pages and zero records in tokens.
fn run_with(
    tokenizer: &mut Tokenizer,
    input: &[u8],
    pieces: &[(usize, bool)],
) -> (Vec<u8>, usize, usize) {
    let mut out = Vec::new();
    let (mut pages, mut zeros) = (0, 0);
    let mut unread = Vec::new();
    let mut rest = input;
    let mut pieces = pieces.iter().cycle();
    loop {
        let (size, flush) = if rest.is_empty() {
            (0, true)
        } else {
            pieces.next().copied().unwrap_or((rest.len(), false))
        };
        let (piece, tail) = rest.split_at(size.clamp(1.min(rest.len()), rest.len()));
        rest = tail;
        unread.extend_from_slice(piece);
        let mut covered = 0;
        let taken = tokenizer.push(&unread, flush, |token| {
            covered += token.stream_len();
            pages += usize::from(matches!(token, Token::Page { .. } | Token::Body(_)));
            if let Token::Zeros { count, .. } = token {
                assert!(count > 0);
                zeros += count;
            }
            rebuild::token(&mut out, &token);
        });
        assert_eq!(covered, taken, "tokens cover what was taken");
        if flush {
            assert_eq!(taken, unread.len(), "a flush takes everything");
        }
        unread.drain(..taken);
        if rest.is_empty() && unread.is_empty() {
            return (out, pages, zeros);
        }
    }
}

fn page(seed: u8) -> Page {
    let mut page = [0; PAGE_BYTES];
    for (i, byte) in page.iter_mut().enumerate() {
        *byte = seed.wrapping_mul(31).wrapping_add((i * 7 + i / 256) as u8);
    }
    page
}

fn well_formed() -> impl Strategy<Value = Vec<u8>> {
    (
        prop::collection::vec(
            prop_oneof![
                any::<u8>().prop_map(|seed| vec![Some(seed)]),
                (1usize..60).prop_map(|zeros| vec![None; zeros]),
            ],
            1..60,
        ),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
    )
        .prop_map(|(pages, dirty)| {
            let first: Vec<_> = pages.concat().iter().map(|seed| seed.map(page)).collect();
            let dirty: Vec<_> = dirty
                .iter()
                .map(|(index, seed)| (index.index(first.len()), page(*seed)))
                .collect();
            StreamBuilder::migration(&first, &dirty)
        })
}

fn address(number: usize) -> u64 {
    (number * PAGE_BYTES) as u64
}

/// A multifd channel with packets of all kinds.
fn multifd() -> impl Strategy<Value = Vec<u8>> {
    let packet = (0usize..70, 0usize..58, any::<u8>(), 0usize..1000, 0u8..5);
    prop::collection::vec(packet, 1..8).prop_map(|packets| {
        let mut builder = MultifdBuilder::new(1);
        for (pages, zeros, seed, first, kind) in packets {
            let pages: Vec<_> = (0..pages)
                .map(|i| (address(first + i), page(seed.wrapping_add(i as u8))))
                .collect();
            let zeros: Vec<_> = (0..zeros).map(|i| address(first + 3000 + i)).collect();
            match kind {
                0 => builder.sync_after(u32::from(seed) * 4096),
                // Without pages there is nothing to compress.
                1 if !pages.is_empty() => builder.compressed(&pages, &[seed; 5000][..first * 3]),
                2 => builder.device(&[seed; 700][..first / 2]),
                _ => builder.packet(&pages, &zeros),
            };
        }
        builder.bytes().to_vec()
    })
}

fn pieces() -> impl Strategy<Value = Vec<(usize, bool)>> {
    prop::collection::vec((1usize..9000, any::<bool>()), 1..20)
}

proptest! {
    #[test]
    fn well_formed_streams_come_back(input in well_formed(), pieces in pieces()) {
        prop_assert_eq!(run(&input, &pieces).0, input);
    }

    /// Also not with runs of zero records torn in between: what is read of the migration does
    /// not depend on how it is cut.
    #[test]
    fn progress_is_the_same_in_pieces(input in well_formed(), pieces in pieces()) {
        let (mut whole, mut torn) = (Tokenizer::new(), Tokenizer::new());
        let (_, _, zeros) = run_with(&mut whole, &input, &[(input.len(), false)]);
        prop_assert!(whole.progress().zero_records() >= zeros as u64);
        prop_assert!(whole.progress().ram_ended());
        run_with(&mut torn, &input, &pieces);
        prop_assert_eq!(format!("{:?}", whole.progress()), format!("{:?}", torn.progress()));
    }

    #[test]
    fn multifd_channels_come_back(input in multifd(), pieces in pieces()) {
        prop_assert_eq!(run(&input, &pieces).0, input.clone());
        let mut tokenizer = Tokenizer::new();
        run_with(&mut tokenizer, &input, &pieces);
        prop_assert!(!tokenizer.is_opaque() && tokenizer.kind() == ConnectionKind::Multifd);
    }

    #[test]
    fn mutated_streams_come_back(
        mut input in prop_oneof![well_formed(), multifd()],
        pieces in pieces(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30),
    ) {
        for (index, byte) in edits {
            let at = index.index(input.len());
            input[at] = byte;
        }
        prop_assert_eq!(run(&input, &pieces).0, input);
    }

    #[test]
    fn truncated_and_spliced_streams_come_back(
        a in well_formed(),
        b in well_formed(),
        cut_a in any::<prop::sample::Index>(),
        cut_b in any::<prop::sample::Index>(),
        pieces in pieces(),
    ) {
        let mut input = a[..cut_a.index(a.len())].to_vec();
        input.extend_from_slice(&b[cut_b.index(b.len())..]);
        prop_assert_eq!(run(&input, &pieces).0, input);
    }

    #[test]
    fn arbitrary_bytes_come_back(
        input in prop::collection::vec(any::<u8>(), 0..20_000),
        header in any::<bool>(),
        pieces in pieces(),
    ) {
        let mut bytes = if header { b"QEVM\0\0\0\x03".to_vec() } else { Vec::new() };
        bytes.extend(input);
        prop_assert_eq!(run(&bytes, &pieces).0, bytes);
    }
}

#[test]
fn every_page_of_a_well_formed_stream_is_found() {
    let first: Vec<_> = (0..250u8).map(|i| (i % 3 != 0).then(|| page(i))).collect();
    let dirty: Vec<_> = (0..10).map(|i| (i * 20 + 1, page(i as u8))).collect();
    let input = StreamBuilder::migration(&first, &dirty);
    let pages = first.iter().flatten().count() + dirty.len();
    let (out, found_pages, found_zeros) = run(&input, &[(input.len(), false)]);
    assert_eq!(out, input);
    assert_eq!(found_pages, pages);
    // The first record of a section names its block; where that is a zero page, the record
    // stays opaque (three sections here, of which two begin with a zero page).
    let zeros = first.len() - first.iter().flatten().count();
    let named_zeros = [0, 100, 200]
        .iter()
        .filter(|i| first[**i].is_none())
        .count();
    assert_eq!(found_zeros, zeros - named_zeros);
    // Cut into small unflushed pieces nothing is lost either.
    assert_eq!(run(&input, &[(100, false)]).1, pages);
}

#[test]
fn progress_sees_the_pass_boundary_and_the_stop() {
    let mut builder = StreamBuilder::new(8 * PAGE_BYTES as u64);
    builder.begin_part();
    for i in 0..8 {
        builder.page(i * PAGE_BYTES as u64, &page(i as u8));
    }
    builder.end_ram_section();
    let first_pass = builder.bytes().len();
    builder.begin_part().page(0, &page(9)).end_ram_section();
    let second = builder.bytes().len();
    builder.begin_part().end_ram_section();
    let empty = builder.bytes().len();
    builder.switchover_start();
    let bytes = builder.bytes().to_vec();

    let mut tokenizer = Tokenizer::new();
    assert_eq!(
        tokenizer.push(&bytes[..first_pass], false, |_| {}),
        first_pass
    );
    assert!(!tokenizer.progress().first_pass_done());
    tokenizer.push(&bytes[first_pass..second], false, |_| {});
    assert!(tokenizer.progress().first_pass_done());
    assert!(!tokenizer.progress().tail_is_empty_part());
    tokenizer.push(&bytes[second..empty], false, |_| {});
    assert!(tokenizer.progress().tail_is_empty_part());
    assert!(!tokenizer.progress().guest_stopped());
    tokenizer.push(&bytes[empty..], false, |_| {});
    assert!(tokenizer.progress().guest_stopped());
}

#[test]
fn an_unknown_section_is_skipped_to_its_footer() {
    let mut builder = StreamBuilder::new(4 * PAGE_BYTES as u64);
    builder.raw(b"\x04\x00\x00\x00\x09\x03dev\x00\x00\x00\x00\x00\x00\x00\x01");
    builder.raw(&[0x7e; 700]).raw(b"\x7e\x00\x00\x00\x09");
    builder.begin_part().page(0, &page(1));
    builder.page(4096, &page(2)).end_ram_section();
    let (out, pages, _) = run(builder.bytes(), &[(50, false)]);
    assert_eq!(out, builder.bytes());
    assert_eq!(pages, 2);
}

/// A quiet source makes the tokenizer hand out what it has; that must not make it lose its
/// place, wherever it happens.
#[test]
fn flushes_anywhere_before_the_pages_do_not_hide_them() {
    let mut builder = StreamBuilder::new(4 * PAGE_BYTES as u64);
    builder.raw(b"\x04\x00\x00\x00\x09\x03dev\x00\x00\x00\x00\x00\x00\x00\x01");
    builder.raw(&[0x7e; 20]).raw(b"\x7e\x00\x00\x00\x09");
    let head = builder.bytes().len();
    builder.begin_part().page(0, &page(1));
    builder.page(4096, &page(2)).end_ram_section();
    let bytes = builder.bytes();
    for size in 1..12 {
        for cut in 0..=head {
            // Flush in pieces of `size` up to `cut`, then hand over the rest at once.
            let mut pieces = vec![(size, true); cut / size];
            pieces.push((bytes.len(), false));
            let (out, pages, _) = run(bytes, &pieces);
            assert_eq!(out, bytes);
            assert_eq!(pages, 2, "pieces of {size} up to {cut}");
        }
    }
}

/// What other QEMUs and options write: several blocks, post-copy's page sizes, XBZRLE
/// deltas, compressed pages of old versions.
#[test]
fn other_dialects_are_followed() {
    let mut bytes = b"QEVM\0\0\0\x03".to_vec();
    // POSTCOPY_ADVISE, then a block of huge pages with its page size, and a plain one.
    bytes.extend(b"\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0");
    bytes.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend(0x40_1004u64.to_be_bytes());
    bytes.extend(b"\x04huge");
    bytes.extend(0x40_0000u64.to_be_bytes());
    bytes.extend(0x20_0000u64.to_be_bytes());
    bytes.extend(b"\x03rom");
    bytes.extend(0x1000u64.to_be_bytes());
    let end = |bytes: &mut Vec<u8>| {
        bytes.extend(0x10u64.to_be_bytes());
        bytes.extend(b"\x7e\0\0\0\x02");
    };
    end(&mut bytes);
    let record = |bytes: &mut Vec<u8>, word: u64, block: &[u8], body: &[u8]| {
        bytes.extend(word.to_be_bytes());
        bytes.extend(block);
        bytes.extend(body);
    };
    bytes.extend(b"\x02\0\0\0\x02");
    record(&mut bytes, 0x08, b"\x04huge", &page(1));
    record(&mut bytes, 0x1000 | 0x28, b"", &page(2));
    record(&mut bytes, 0x2000 | 0x60, b"", b"\x01\0\x03abc");
    record(&mut bytes, 0x3000 | 0x120, b"", b"\0\0\0\x05zlib!");
    record(&mut bytes, 0x08, b"\x03rom", &page(3));
    end(&mut bytes);
    let first_pass = bytes.len();
    bytes.extend(b"\x02\0\0\0\x02");
    record(&mut bytes, 0x08, b"\x04huge", &page(4));
    end(&mut bytes);

    assert_eq!(run(&bytes, &[(bytes.len(), false)]).1, 4);
    let mut tokenizer = Tokenizer::new();
    assert_eq!(
        tokenizer.push(&bytes[..first_pass], false, |_| {}),
        first_pass
    );
    assert!(!tokenizer.is_opaque());
    assert!(!tokenizer.progress().first_pass_done());
    // Going back to an earlier block is the next pass.
    tokenizer.push(&bytes[first_pass..], false, |_| {});
    assert!(tokenizer.progress().first_pass_done());
}

/// Every page of a packet is found, and a list of addresses becomes one token; what was in the list
/// before is one as well.
#[test]
fn the_pages_of_a_packet_are_found() {
    let pages: Vec<_> = (0..100).map(|i| (address(i), page(i as u8))).collect();
    let zeros: Vec<_> = (0..28).map(|i| address(500 + i)).collect();
    let mut builder = MultifdBuilder::new(0);
    builder.packet(&pages, &zeros).sync();
    builder
        .packet(&pages[..1], &[])
        .compressed(&pages[..7], b"zstd");
    builder.device(b"state").packet(&pages[..50], &[]);
    let mut tokenizer = Tokenizer::new();
    let mut lists = Vec::new();
    let (mut bodies, mut opaque) = (0, 0);
    let taken = tokenizer.push(builder.bytes(), false, |token| match token {
        Token::Addresses { address, count } => lists.push((address / 4096, count)),
        Token::Body(body) => {
            assert!(pages.iter().any(|(_, page)| page == body));
            bodies += 1;
        }
        Token::Opaque(bytes) => opaque += bytes.len(),
        other => panic!("{other:?}"),
    });
    assert_eq!(taken, builder.bytes().len());
    assert_eq!(bodies, 151);
    assert_eq!(lists.len(), 10, "{lists:?}");
    assert!(
        lists
            .iter()
            .all(|list| [(0, 100), (500, 28)].contains(list))
    );
    // Starts of packets, and what is compressed.
    assert_eq!(opaque, 64 + 5 * 320 + 276 + 4 + 5);
    let progress = tokenizer.progress();
    assert_eq!(
        (progress.page_records(), progress.zero_records()),
        (158, 28)
    );
    assert_eq!(run(builder.bytes(), &[(77, true)]).0, builder.bytes());
}

#[test]
fn what_a_packet_without_pages_says_of_its_size_is_not_believed() {
    let pages: Vec<_> = (0..3).map(|i| (address(i), page(i as u8))).collect();
    let mut builder = MultifdBuilder::new(0);
    for _ in 0..2 {
        builder.packet(&pages, &[]).sync_after(3 * 4096);
    }
    let mut tokenizer = Tokenizer::new();
    let mut bodies = 0;
    tokenizer.push(builder.bytes(), true, |token| {
        bodies += usize::from(matches!(token, Token::Body(_)));
    });
    assert_eq!(bodies, 6);
}

#[test]
fn with_multifd_passes_end_where_everything_is_flushed() {
    let mut builder = StreamBuilder::new(8 * PAGE_BYTES as u64);
    let mut tokenizer = Tokenizer::new();
    let mut from = 0;
    let mut look = |builder: &StreamBuilder| {
        let taken = tokenizer.push(&builder.bytes()[from..], true, |_| {});
        from += taken;
        let progress = tokenizer.progress();
        (
            progress.multifd(),
            progress.first_pass_done(),
            progress.passes(),
        )
    };
    assert_eq!(look(&builder), (false, false, 0));
    // QEMU flushes in the first section, and writes sections while others have pages.
    builder.raw(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    builder.multifd_flush().end_ram_section();
    assert_eq!(look(&builder), (true, false, 0));
    builder
        .begin_part()
        .end_ram_section()
        .begin_part()
        .end_ram_section();
    assert_eq!(look(&builder), (true, false, 0));
    builder.begin_part().multifd_flush().end_ram_section();
    assert_eq!(look(&builder), (true, true, 1));
    builder.begin_part().multifd_flush().end_ram_section();
    assert_eq!(look(&builder), (true, true, 2));
}

/// Behind the package come the pages that nobody has asked for; those that somebody has come on a
/// connection of their own.
#[test]
fn post_copy_pages_are_found_on_both_connections() {
    let mut builder = StreamBuilder::new(8 * PAGE_BYTES as u64);
    builder.begin_part().page(0, &page(1)).end_ram_section();
    builder.command(6, b"\0\x06pc.ram\0");
    builder.command(7, &300u32.to_be_bytes());
    // A stream inside the stream, which is not looked into.
    builder.raw(&[0x02; 300]);
    builder
        .begin_part()
        .page(4096, &page(2))
        .page(8192, &page(3))
        .end_ram_section();
    builder.begin_end().end_ram_section().raw(&[0]);
    for pieces in [[(builder.bytes().len(), false)], [(100, true)]] {
        let mut tokenizer = Tokenizer::new();
        let (out, pages, _) = run_with(&mut tokenizer, builder.bytes(), &pieces);
        assert_eq!(out, builder.bytes());
        let progress = tokenizer.progress();
        assert!(progress.guest_stopped() && progress.ram_ended() && progress.post_copy());
        assert!(pieces[0].1 || pages == 3, "{pages}");
    }

    let mut requested = 0x5008u64.to_be_bytes().to_vec();
    requested.extend(b"\x06pc.ram");
    requested.extend(page(4));
    rebuild::page_record(&mut requested, 0x9000, &page(5));
    rebuild::zero_record(&mut requested, 0x2000, 0);
    requested.extend(0x10u64.to_be_bytes());
    let mut tokenizer = Tokenizer::new();
    let whole = [(requested.len(), false)];
    let (out, pages, zeros) = run_with(&mut tokenizer, &requested, &whole);
    assert_eq!(out, requested);
    assert_eq!((pages, zeros), (2, 1));
    assert_eq!(tokenizer.kind(), ConnectionKind::Preempt);
    assert_eq!(run(&requested, &[(3, true)]).0, requested);
}
