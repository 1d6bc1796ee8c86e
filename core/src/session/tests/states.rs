//! Tests by state.

use super::*;
use crate::wire::nbd::answer;

const MIB: u64 = 1 << 20;

fn disk0() -> Export {
    export("disk0", 7, 16 * MIB, 22)
}

/// 64 KiB objects.
fn small() -> Export {
    export("small", 9, MIB, 16)
}

fn answers(rig: &mut Rig) -> Vec<(u32, Vec<u8>)> {
    let answer = |message| match message {
        Message::Answer { answer, data, .. } => (answer, data),
        other => panic!("no answer: {other:?}"),
    };
    messages(&rig.take_wire()).into_iter().map(answer).collect()
}

fn haggling(exports: Vec<Export>) -> Rig {
    let mut rig = Rig::new(config(), exports);
    rig.send(&client::FLAGS);
    rig
}

fn closed_as(rig: &Rig, reason: Reason) {
    assert_eq!(rig.session.poll_closed(), Some(reason));
    assert_eq!(rig.session.state(), State::Closed);
}

fn kinds(rig: &Rig) -> Vec<(RequestKind, u32, u32, u32)> {
    let parts = |(issue, _): &(Issue, Vec<u8>)| {
        let Request { kind, object, offset, len, .. } = issue.request;
        (kind, object, offset, len)
    };
    rig.asked.iter().map(parts).collect()
}

fn ended(cookie: u64, error: u32) -> Vec<Message> {
    vec![Message::Simple { cookie, error }]
}

fn failed(cookie: u64, error: u32) -> Vec<Message> {
    let mut data = error.to_be_bytes().to_vec();
    data.extend([0, 0]);
    vec![Message::Chunk { cookie, kind: chunk::ERROR, done: true, data }]
}

fn data_chunk(cookie: u64, done: bool, offset: u64, bytes: &[u8]) -> Message {
    let data = [&offset.to_be_bytes(), bytes].concat();
    Message::Chunk { cookie, kind: chunk::OFFSET_DATA, done, data }
}

fn status_chunk(cookie: u64, extents: &[(u32, u32)]) -> Vec<Message> {
    let mut data = BASE_ALLOCATION_ID.to_be_bytes().to_vec();
    for (len, state) in extents {
        data.extend(len.to_be_bytes());
        data.extend(state.to_be_bytes());
    }
    vec![Message::Chunk { cookie, kind: chunk::BLOCK_STATUS, done: true, data }]
}

#[test]
fn unknown_client_flags_end_the_session() {
    let mut rig = Rig::new(config(), vec![disk0()]);
    assert_eq!(rig.session.state(), State::Greeting);
    rig.send(&[0, 0, 0]);
    assert_eq!(rig.session.state(), State::Greeting);
    rig.send(&[4]);
    closed_as(&rig, Reason::Malformed("unknown client flags"));
}

#[test]
fn bytes_that_are_no_option_end_the_session() {
    let mut rig = haggling(vec![disk0()]);
    rig.send(&[b'I'; 16]);
    closed_as(&rig, Reason::Malformed("no option magic"));
    assert_eq!(rig.take_wire(), b"");
}

#[test]
fn list_names_every_export() {
    let mut rig = haggling(vec![disk0(), small()]);
    rig.send(&client::option(3, &[]));
    let named = |name: &[u8]| [&5u32.to_be_bytes(), name].concat();
    let expected = vec![(2, named(b"disk0")), (2, named(b"small")), (1, vec![])];
    assert_eq!(answers(&mut rig), expected);
    rig.send(&client::option(3, b"x"));
    assert_eq!(answers(&mut rig), vec![(answer::ERR_INVALID, vec![])]);
}

#[test]
fn options_that_are_not_supported_are_answered_and_haggling_goes_on() {
    let mut rig = haggling(vec![disk0()]);
    for option in [0, 4, 5, 11, 999] {
        rig.send(&client::option(option, b"data"));
        let wire = messages(&rig.take_wire());
        assert_eq!(wire, vec![Message::Answer { option, answer: answer::ERR_UNSUP, data: vec![] }]);
    }
    assert_eq!(rig.session.state(), State::Haggling);
}

#[test]
fn info_describes_and_go_enters() {
    let mut rig = haggling(vec![disk0(), small()]);
    let size = MIB.to_be_bytes();
    let flags = 0b1101_0110_1101u16.to_be_bytes();
    let described = vec![
        (3, [&[0, 0], &size[..], &flags].concat()),
        (3, b"\0\x01small".to_vec()),
        (3, b"\0\x02heeler volume".to_vec()),
        (3, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0".to_vec()),
        (1, vec![]),
    ];
    rig.send(&client::option(6, &client::query("small", &[2, 1, 3, 77, 1])));
    assert_eq!(answers(&mut rig), described);
    assert_eq!((rig.session.state(), rig.session.volume()), (State::Haggling, None));
    rig.send(&client::option(7, &client::query("small", &[])));
    let brief: Vec<_> = [0, 3, 4].map(|at| described[at].clone()).to_vec();
    assert_eq!(answers(&mut rig), brief);
    assert_eq!(rig.session.state(), State::Transmission);
    assert_eq!(rig.session.volume(), Some(VolumeId(9)));
}

#[test]
fn the_empty_name_is_the_first_export() {
    let rig = Rig::simple(disk0());
    assert_eq!(rig.session.volume(), Some(VolumeId(7)));
}

#[test]
fn a_wrong_query_is_answered_with_an_error() {
    let mut rig = haggling(vec![disk0()]);
    rig.send(&client::option(7, &client::query("nobody", &[])));
    assert_eq!(answers(&mut rig), vec![(answer::ERR_UNKNOWN, vec![])]);
    let good = client::query("disk0", &[1]);
    for len in 0..good.len() {
        rig.send(&client::option(7, &good[..len]));
        assert_eq!(answers(&mut rig), vec![(answer::ERR_INVALID, vec![])]);
    }
    assert_eq!(rig.session.state(), State::Haggling);
}

#[test]
fn without_exports_there_is_no_default() {
    let mut session = Session::new(config());
    while session.poll_output().is_some() {}
    let bytes = [&client::FLAGS[..], &client::option(7, &client::query("", &[]))].concat();
    assert_eq!(session.handle_bytes(&bytes, &[]), Taken { consumed: 4, next: Next::Again });
    let taken = session.handle_bytes(&bytes[4..], &[]);
    assert_eq!(taken, Taken { consumed: bytes.len() - 4, next: Next::Again });
    let unknown = crate::wire::nbd::option_reply(7, answer::ERR_UNKNOWN, 0);
    assert_eq!(session.poll_output(), Some(Out::Bytes(&unknown)));
}

#[test]
fn export_name_enters_without_an_answer_header() {
    for (flags, padding) in [([0, 0, 0, 3], 0), ([0, 0, 0, 1], 124), ([0, 0, 0, 0], 124)] {
        let mut rig = Rig::new(config(), vec![disk0()]);
        rig.send(&flags);
        rig.send(&client::option(1, b"disk0"));
        let wire = rig.take_wire();
        assert_eq!(wire[..8], (16 * MIB).to_be_bytes());
        assert_eq!(wire.len(), 10 + padding);
        assert_eq!(rig.session.state(), State::Transmission);
    }
    let mut rig = haggling(vec![disk0()]);
    rig.send(&client::option(1, b"nobody"));
    closed_as(&rig, Reason::UnknownExport);
    assert_eq!(rig.take_wire(), b"");
}

#[test]
fn a_long_option_is_skipped_and_a_huge_one_ends_the_session() {
    let mut rig = haggling(vec![disk0()]);
    let long = client::option(6, &vec![b'x'; OPTION_BYTES_MAX + 1]);
    rig.send(&long[..1000]);
    rig.send(&long[1000..long.len() - 1]);
    assert_eq!(rig.take_wire(), b"");
    rig.send(&long[long.len() - 1..]);
    assert_eq!(answers(&mut rig), vec![(answer::ERR_TOO_BIG, vec![])]);
    rig.send(&client::option(8, &[]));
    assert_eq!(answers(&mut rig), vec![(answer::ACK, vec![])]);

    rig.send(&client::option(1, &vec![b'x'; OPTION_BYTES_MAX + 1]));
    closed_as(&rig, Reason::Malformed("option is too long"));
    let mut rig = haggling(vec![disk0()]);
    rig.send(b"IHAVEOPT\0\0\0\x06\xff\xff\xff\xff");
    closed_as(&rig, Reason::Malformed("option is too long"));
}

#[test]
fn structured_replies_bring_the_df_flag() {
    let mut rig = haggling(vec![disk0()]);
    rig.send(&client::option(8, b"x"));
    assert_eq!(answers(&mut rig), vec![(answer::ERR_INVALID, vec![])]);
    let flags = |rig: &mut Rig| {
        rig.send(&client::option(6, &client::query("", &[])));
        let info = answers(rig).remove(0).1;
        u16::from_be_bytes([info[10], info[11]])
    };
    assert_eq!(flags(&mut rig) & 1 << 7, 0);
    rig.send(&client::option(8, &[]));
    rig.take_wire();
    assert_eq!(flags(&mut rig) & 1 << 7, 1 << 7);
}

#[test]
fn a_read_only_export_says_so() {
    let mut rig = haggling(vec![Export { read_only: true, ..disk0() }]);
    rig.send(&client::option(1, b""));
    assert_eq!(rig.take_wire()[8..], 0b0101_0000_1111u16.to_be_bytes());
}

#[test]
fn metadata_contexts_need_structured_replies() {
    let mut rig = haggling(vec![disk0()]);
    for option in [9, 10] {
        rig.send(&client::option(option, &client::contexts("", &["base:allocation"])));
        assert_eq!(answers(&mut rig), vec![(answer::ERR_INVALID, vec![])]);
    }
}

#[test]
fn metadata_contexts_are_listed_and_set() {
    let mut rig = haggling(vec![disk0()]);
    rig.send(&client::option(8, &[]));
    rig.take_wire();
    let context = |id: u32| (4, [&id.to_be_bytes()[..], b"base:allocation"].concat());
    let ack = (1, vec![]);
    let mut ask = |option, name, contexts: &[&str]| {
        rig.send(&client::option(option, &client::contexts(name, contexts)));
        answers(&mut rig)
    };
    assert_eq!(ask(9, "", &[]), vec![context(0), ack.clone()]);
    assert_eq!(ask(9, "disk0", &["base:"]), vec![context(0), ack.clone()]);
    assert_eq!(ask(9, "", &["qemu:dirty-bitmap:x"]), vec![ack.clone()]);
    let twice = ["base:allocation", "base:allocation", "x:y"];
    assert_eq!(ask(10, "", &twice), vec![context(1), ack.clone()]);
    assert_eq!(ask(10, "", &["base:"]), vec![ack.clone()]);
    assert_eq!(ask(10, "", &[]), vec![ack]);
    assert_eq!(ask(10, "nobody", &["base:allocation"]), vec![(answer::ERR_UNKNOWN, vec![])]);
    rig.send(&client::option(10, b"\0\0\0\x09"));
    assert_eq!(answers(&mut rig), vec![(answer::ERR_INVALID, vec![])]);
}

#[test]
fn a_context_holds_only_for_its_export_and_only_while_set() {
    let status = client::request(0, 7, 1, 0, 4096);
    let set = |name, contexts: &[&str]| client::option(10, &client::contexts(name, contexts));
    let wrong = [
        vec![],
        vec![set("small", &["base:allocation"])],
        vec![set("disk0", &["base:allocation"]), set("disk0", &[])],
        vec![set("disk0", &["base:allocation"]), set("nobody", &["base:allocation"])],
    ];
    for options in wrong {
        let mut rig = haggling(vec![disk0(), small()]);
        rig.send(&client::option(8, &[]));
        options.iter().for_each(|option| rig.send(option));
        rig.send(&client::option(7, &client::query("disk0", &[])));
        rig.take_wire();
        rig.send(&status);
        assert_eq!(messages(&rig.take_wire()), failed(1, errno::EINVAL));
    }
    let mut rig = Rig::structured(disk0());
    rig.send(&status);
    assert_eq!(rig.asked.len(), 1);
}

#[test]
fn abort_is_acknowledged() {
    let mut rig = haggling(vec![disk0()]);
    rig.send(&client::option(2, &[]));
    assert_eq!(answers(&mut rig), vec![(answer::ACK, vec![])]);
    closed_as(&rig, Reason::Aborted);
}

#[test]
fn a_small_read_is_one_request_and_one_reply() {
    let mut rig = Rig::simple(disk0());
    rig.disk.change(4096, &[1; 4096], true);
    rig.disk.change(8192, &[2; 4096], true);
    rig.send(&client::request(0, 0, 0xc0, 4096 + 4000, 200));
    assert_eq!(kinds(&rig), vec![(RequestKind::Read, 0, 8096, 200)]);
    rig.reply(0);
    let wire = rig.take_wire();
    assert_eq!(messages(&wire[..16]), ended(0xc0, 0));
    assert_eq!(wire[16..], [[1; 96].as_slice(), &[2; 104]].concat());
}

#[test]
fn small_reads_are_pipelined_and_answered_in_any_order() {
    let mut rig = Rig::simple(disk0());
    for cookie in 0..3 {
        rig.send(&client::request(0, 0, cookie, cookie * BLOCK, 512));
    }
    assert_eq!(rig.asked.len(), 3);
    for (index, cookie) in [(1, 1), (1, 2), (0, 0)] {
        rig.reply(index);
        assert_eq!(messages(&rig.take_wire()[..16]), ended(cookie, 0));
    }
}

#[test]
fn zeroes_between_pages_are_given_as_a_length() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 0, 1, 100, 5 * 4096));
    let (issue, _) = rig.asked.remove(0);
    let page = |number| BlockRef { page: PageId(number), crc: 0 };
    let zeroes = BlockRef::ZEROES;
    let blocks = [page(4), zeroes, zeroes, page(5), page(6), zeroes];
    let Request { id, kind, .. } = issue.request;
    rig.session.handle_reply(&Reply { id, kind, status: Status::Ok, lease: None }, &blocks);
    assert!(matches!(rig.session.poll_output(), Some(Out::Bytes(header)) if header.len() == 16));
    for (number, from) in [(4, 100), (5, 0), (6, 0)] {
        let expected = Out::Page { page: PageId(number), from, to: 4096 };
        assert_eq!(rig.session.poll_output(), Some(expected));
        if number == 4 {
            assert_eq!(rig.session.poll_output(), Some(Out::Zeroes(8192)));
        }
    }
    assert_eq!(rig.session.poll_output(), Some(Out::Zeroes(100)));
    assert_eq!(rig.session.poll_output(), None);
}

#[test]
fn a_write_is_cut_at_objects_and_at_units() {
    let mut rig = Rig::simple(disk0());
    let payload: Vec<u8> = (0..300_000u32).map(|at| (at / 256) as u8).collect();
    let offset = 4 * MIB - 100_000;
    rig.send(&client::request(flag::FUA, 1, 5, offset, 300_000));
    assert_eq!(rig.asked.len(), 0);
    rig.send(&payload[..100_000]);
    let object = 4 << 20;
    let mut expected = vec![(RequestKind::Write, 0, object - 100_000, 100_000)];
    assert_eq!(kinds(&rig), expected);
    rig.send(&payload[100_000..]);
    expected.push((RequestKind::Write, 1, 0, UNIT as u32));
    expected.push((RequestKind::Write, 1, UNIT as u32, 200_000 - UNIT as u32));
    assert_eq!(kinds(&rig), expected);
    assert!(rig.asked.iter().all(|(issue, _)| issue.request.fua));
    rig.reply(1);
    rig.reply(1);
    assert_eq!(rig.take_wire(), b"");
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), ended(5, 0));
    assert_eq!(rig.disk.bytes[offset as usize..][..300_000], payload);
}

#[test]
fn the_same_payload_is_offered_until_it_is_taken() {
    let mut rig = Rig::simple(disk0());
    let header = client::request(0, 1, 5, 0, 4096);
    let first = rig.session.handle_bytes(&header, &rig.exports);
    assert_eq!(first.consumed, 28);
    assert_eq!(rig.session.poll_output(), None);
    let again = rig.session.handle_bytes(&[], &rig.exports);
    assert_eq!(again, Taken { consumed: 0, next: first.next });
    rig.session.handle_payload(4096);
    assert_eq!(rig.session.in_flight(), 1);
    let idle = rig.session.handle_bytes(&[], &rig.exports);
    assert_eq!(idle, Taken { consumed: 0, next: Next::Bytes });
}

#[test]
fn the_rest_of_a_write_that_failed_is_thrown_away() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 1, 5, 0, 300_000));
    rig.send(&vec![1; 140_000]);
    assert_eq!(rig.asked.len(), 1);
    rig.fail(0, Status::Full);
    rig.send(&vec![1; 159_999]);
    assert_eq!((rig.asked.len(), rig.take_wire()), (0, vec![]));
    rig.send(&[1]);
    assert_eq!(messages(&rig.take_wire()), ended(5, errno::ENOSPC));
    rig.send(&client::request(0, 0, 6, 0, 1));
    assert_eq!(rig.asked.len(), 1);
}

#[test]
fn a_refused_write_is_answered_when_its_payload_has_come() {
    let size = 16 * MIB;
    let cases = [
        (disk0(), 0, size - 10, 11, errno::ENOSPC),
        (disk0(), 0, u64::MAX - 5, 10, errno::ENOSPC),
        (disk0(), flag::DF, 0, 10, errno::EINVAL),
        (disk0(), 1 << 5, 0, 10, errno::EINVAL),
        (export("big", 1, 64 * MIB, 22), 0, 0, (32 << 20) + 1, errno::EINVAL),
        (Export { read_only: true, ..disk0() }, 0, 0, 10, errno::EPERM),
    ];
    for (export, flags, offset, len, error) in cases {
        let mut rig = Rig::simple(export);
        rig.send(&client::request(flags, 1, 5, offset, len));
        let mut left = len as usize;
        while left > 0 {
            assert_eq!(rig.take_wire(), b"");
            let piece = left.min(1 << 20);
            rig.send(&vec![0x25; piece]);
            left -= piece;
        }
        assert_eq!(messages(&rig.take_wire()), ended(5, error));
        rig.send(&client::request(0, 0, 6, 0, 10));
        assert_eq!(kinds(&rig), vec![(RequestKind::Read, 0, 0, 10)]);
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let size = 16 * MIB;
    let cases = [
        (0, 0, size, 1, errno::EINVAL),
        (0, 0, u64::MAX, u32::MAX, errno::EINVAL),
        (flag::NO_HOLE, 0, 0, 1, errno::EINVAL),
        (flag::DF, 0, 0, 1, errno::EINVAL),
        (0, 3, 1, 0, errno::EINVAL),
        (0, 3, 0, 1, errno::EINVAL),
        (0, 4, size, 1, errno::EINVAL),
        (0, 5, size - 1, 2, errno::EINVAL),
        (0, 6, size - 1, 2, errno::ENOSPC),
        (flag::REQ_ONE, 6, 0, 1, errno::EINVAL),
        (flag::NO_HOLE | flag::FAST_ZERO, 6, 0, 4096, errno::ENOTSUP),
        (0, 7, 0, 4096, errno::EINVAL),
        (0, 8, 0, 0, errno::EINVAL),
        (0, 0xffff, 0, 0, errno::EINVAL),
    ];
    let mut rig = Rig::simple(disk0());
    for (flags, command, offset, len, error) in cases {
        rig.send(&client::request(flags, command, 5, offset, len));
        assert_eq!(messages(&rig.take_wire()), ended(5, error), "command {command} at {offset}");
        assert!(rig.asked.is_empty());
    }
    let mut rig = Rig::simple(Export { read_only: true, ..disk0() });
    for command in [4, 6] {
        rig.send(&client::request(0, command, 5, 0, 4096));
        assert_eq!(messages(&rig.take_wire()), ended(5, errno::EPERM));
    }
    let mut rig = Rig::simple(export("big", 1, 64 * MIB, 22));
    rig.send(&client::request(0, 0, 5, 0, (32 << 20) + 1));
    assert_eq!(messages(&rig.take_wire()), ended(5, errno::EINVAL));
}

#[test]
fn an_export_that_changes_is_judged_by_what_it_is_now() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 0, 5, 0, 4096));
    let asked = rig.asked.len();
    let now = Export { bytes: 8 * MIB, read_only: true, ..disk0() };
    rig.session.handle_export(&now);
    for (command, offset, error) in
        [(0, 8 * MIB, errno::EINVAL), (4, 0, errno::EPERM), (6, 0, errno::EPERM)]
    {
        rig.send(&client::request(0, command, 6, offset, 4096));
        assert_eq!(messages(&rig.take_wire()), ended(6, error), "command {command}");
    }
    assert_eq!(rig.asked.len(), asked, "no shard is asked");
    rig.session.handle_export(&Export { read_only: false, ..now });
    rig.send(&client::request(0, 6, 6, 8 * MIB, 4096));
    assert_eq!(messages(&rig.take_wire()), ended(6, errno::ENOSPC));
    rig.send(&client::request(0, 6, 6, 0, 4096));
    assert_eq!(rig.asked.len(), asked + 1);
}

#[test]
fn requests_of_no_bytes_are_done_at_once() {
    let mut rig = Rig::simple(disk0());
    for command in [0, 1, 4, 5, 6] {
        rig.send(&client::request(0, command, 5, 0, 0));
        assert_eq!(messages(&rig.take_wire()), ended(5, 0));
    }
    let mut rig = Rig::structured(disk0());
    rig.send(&client::request(0, 0, 5, 0, 0));
    let none = Message::Chunk { cookie: 5, kind: chunk::NONE, done: true, data: vec![] };
    assert_eq!(messages(&rig.take_wire()), vec![none]);
    rig.send(&client::request(0, 7, 5, 0, 0));
    assert_eq!(messages(&rig.take_wire()), failed(5, errno::EINVAL));
}

#[test]
fn bytes_that_are_no_request_end_the_session() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 0, 5, 0, 10));
    rig.send(&[0; 28]);
    closed_as(&rig, Reason::Malformed("no request magic"));
    assert_eq!(rig.session.in_flight(), 1);
    rig.reply(0);
    assert_eq!((rig.session.in_flight(), rig.take_wire()), (0, vec![]));
}

#[test]
fn a_flush_asks_every_shard_once() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(flag::FUA, 3, 5, 0, 0));
    let shards: Vec<_> = rig.asked.iter().map(|(issue, _)| issue.shard.0).collect();
    assert_eq!(shards, vec![0, 1, 2, 3]);
    for _ in 0..3 {
        rig.reply(0);
    }
    assert_eq!(rig.take_wire(), b"");
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), ended(5, 0));
}

#[test]
fn zeroes_are_unmapped_in_the_middle_and_written_at_the_edges() {
    let mut rig = Rig::simple(disk0());
    let object = 4 << 20;
    rig.send(&client::request(flag::FUA | flag::FAST_ZERO, 6, 5, 4096 - 10, object + 30));
    let expected = vec![
        (RequestKind::Write, 0, 4086, 10),
        (RequestKind::Zero, 0, 4096, object - 4096),
        (RequestKind::Zero, 1, 0, 4096),
        (RequestKind::Write, 1, 4096, 20),
    ];
    assert_eq!(kinds(&rig), expected);
    assert!(rig.asked.iter().all(|(issue, _)| issue.request.fua));
    rig.reply_all();
    assert_eq!(messages(&rig.take_wire()), ended(5, 0));

    rig.send(&client::request(0, 6, 6, 5000, 100));
    assert_eq!(kinds(&rig), vec![(RequestKind::Write, 0, 5000, 100)]);
    assert_eq!(rig.asked[0].0.payload, Payload::Zeroes);
}

#[test]
fn zeroes_without_a_hole_are_written() {
    let mut rig = Rig::simple(small());
    rig.send(&client::request(flag::NO_HOLE, 6, 5, 100, 70_000));
    let expected =
        vec![(RequestKind::Write, 0, 100, 65436), (RequestKind::Write, 1, 0, 70_000 - 65436)];
    assert_eq!(kinds(&rig), expected);
    assert!(rig.asked.iter().all(|(issue, _)| issue.payload == Payload::Zeroes));
}

#[test]
fn a_discard_leaves_the_edges_alone() {
    let mut rig = Rig::simple(small());
    rig.send(&client::request(0, 4, 5, 1, 80_000));
    let expected =
        vec![(RequestKind::Discard, 0, 4096, 65536 - 4096), (RequestKind::Discard, 1, 0, 12288)];
    assert_eq!(kinds(&rig), expected);
    rig.reply_all();
    rig.take_wire();
    rig.send(&client::request(0, 4, 6, 1, 4095 + 4095));
    assert!(rig.asked.is_empty());
    assert_eq!(messages(&rig.take_wire()), ended(6, 0));
}

#[test]
fn cache_asks_for_every_unit() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 5, 5, 100, UNIT as u32));
    let unit = UNIT as u32;
    let expected =
        vec![(RequestKind::Cache, 0, 100, unit - 100), (RequestKind::Cache, 0, unit, 100)];
    assert_eq!(kinds(&rig), expected);
    assert!(rig.asked.iter().all(|(issue, _)| issue.request.advice == Advice::WillNeed));
    rig.fail(1, Status::Io);
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), ended(5, errno::EIO));
}

#[test]
fn a_structured_read_is_answered_in_any_order() {
    let mut rig = Rig::structured(disk0());
    rig.disk.change(0, &vec![1; UNIT as usize], true);
    rig.disk.change(2 * UNIT, &vec![3; UNIT as usize], true);
    rig.send(&client::request(0, 0, 5, UNIT - 10, UNIT as u32 + 20));
    rig.send(&client::request(0, 0, 6, 0, 1));
    assert_eq!(rig.asked.len(), 4);
    rig.reply(2);
    let expected = data_chunk(5, false, 2 * UNIT, &[3; 10]);
    assert_eq!(messages(&rig.take_wire()), vec![expected]);
    rig.reply(1);
    let data = [UNIT.to_be_bytes().as_slice(), &(UNIT as u32).to_be_bytes()].concat();
    let hole = Message::Chunk { cookie: 5, kind: chunk::OFFSET_HOLE, done: false, data };
    assert_eq!(messages(&rig.take_wire()), vec![hole]);
    rig.reply(1);
    assert_eq!(messages(&rig.take_wire()), vec![data_chunk(6, true, 0, &[1])]);
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), vec![data_chunk(5, true, UNIT - 10, &[1; 10])]);
}

#[test]
fn a_failed_part_of_a_structured_read_ends_it_after_the_others() {
    let mut rig = Rig::structured(disk0());
    rig.send(&client::request(0, 0, 5, 0, 1 << 20));
    // The window holds two units.
    assert_eq!(rig.asked.len(), 2);
    rig.fail(0, Status::Io);
    assert_eq!((rig.asked.len(), rig.take_wire()), (1, vec![]));
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), failed(5, errno::EIO));
    rig.send(&client::request(0, 0, 6, 0, 1 << 18));
    assert_eq!(rig.asked.len(), 2, "the window is free again");
}

#[test]
fn a_long_simple_read_runs_alone_and_in_order() {
    let mut rig = Rig::simple(disk0());
    let unit = UNIT as usize;
    rig.disk.change(0, &[vec![1; unit], vec![2; unit], vec![3; unit]].concat(), true);
    rig.send(&client::request(0, 0, 4, 0, 1));
    rig.send(&client::request(0, 0, 5, UNIT - 1, 2 + UNIT as u32));
    rig.send(&client::request(0, 0, 6, 0, 1));
    assert_eq!(rig.asked.len(), 1);
    rig.reply(0);
    rig.take_wire();
    for _ in 0..3 {
        assert_eq!(rig.asked.len(), 1);
        rig.reply(0);
    }
    let wire = rig.take_wire();
    assert_eq!(messages(&wire[..16]), ended(5, 0));
    assert_eq!(wire[16..], [vec![1], vec![2; unit], vec![3]].concat());
    assert_eq!(rig.asked.len(), 1, "the next request goes on");
}

#[test]
fn a_long_simple_read_fails_before_its_header_or_tears_the_connection() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 0, 5, 0, 1 << 20));
    rig.fail(0, Status::Gone);
    assert_eq!(messages(&rig.take_wire()), ended(5, errno::ESHUTDOWN));
    assert!(rig.asked.is_empty());
    rig.send(&client::request(0, 0, 6, 0, 1 << 20));
    rig.reply(0);
    rig.take_wire();
    rig.fail(0, Status::Io);
    closed_as(&rig, Reason::Torn);
    assert_eq!((rig.asked.len(), rig.take_wire()), (0, vec![]));
}

#[test]
fn df_gives_one_chunk_across_objects() {
    let mut rig = Rig::structured(small());
    rig.disk.change(65536 - 4096, &[1; 8192], true);
    rig.send(&client::request(flag::DF, 0, 5, 65536 - 100, 200));
    assert_eq!(kinds(&rig), vec![(RequestKind::Read, 0, 65436, 100)]);
    rig.reply(0);
    assert_eq!(kinds(&rig), vec![(RequestKind::Read, 1, 0, 100)]);
    rig.reply(0);
    let wire = messages(&rig.take_wire());
    assert_eq!(wire, vec![data_chunk(5, true, 65436, &[1; 200])]);
    rig.send(&client::request(flag::DF, 0, 6, 65536 - 100, 200));
    rig.fail(0, Status::Io);
    assert_eq!(messages(&rig.take_wire()), failed(6, errno::EIO));
}

#[test]
fn block_status_merges_and_clips() {
    let mut rig = Rig::structured(disk0());
    rig.disk.allocated[31..40].fill(true);
    let end = 60 * 4096;
    rig.send(&client::request(0, 7, 5, 100, end - 100 - 10));
    assert_eq!(kinds(&rig), vec![(RequestKind::Status, 0, 0, UNIT as u32)]);
    rig.reply(0);
    assert_eq!(kinds(&rig), vec![(RequestKind::Status, 0, UNIT as u32, end - UNIT as u32)]);
    rig.reply(0);
    let expected = [(31 * 4096 - 100, 3), (9 * 4096, 0), (20 * 4096 - 10, 3)];
    assert_eq!(messages(&rig.take_wire()), status_chunk(5, &expected));

    rig.send(&client::request(flag::REQ_ONE, 7, 6, 4096, 1 << 20));
    rig.reply(0);
    assert!(rig.asked.is_empty(), "the first extent has ended");
    assert_eq!(messages(&rig.take_wire()), status_chunk(6, &[(30 * 4096, 3)]));
}

#[test]
fn block_status_stops_at_the_object_and_at_its_room() {
    let mut rig = Rig::structured(small());
    rig.send(&client::request(0, 7, 5, 65536 - 4096, 65536));
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), status_chunk(5, &[(4096, 3)]));

    let mut rig = Rig::structured(disk0());
    rig.disk.allocated.iter_mut().step_by(2).for_each(|allocated| *allocated = true);
    rig.send(&client::request(0, 7, 6, 0, 1 << 20));
    rig.reply_all();
    let expected: Vec<_> = (0..32).map(|at| (4096, if at % 2 == 0 { 0 } else { 3 })).collect();
    assert_eq!(messages(&rig.take_wire()), status_chunk(6, &expected));
}

#[test]
fn block_status_answers_what_it_was_told() {
    let mut rig = Rig::structured(disk0());
    let extent = |blocks, crc| BlockRef { page: PageId(blocks), crc };
    let cases = [
        (vec![extent(1, 0), extent(1, 0)], status_chunk(5, &[(8192, 0)])),
        (vec![extent(0, 1), extent(100, 0)], status_chunk(5, &[(4 * 4096, 0)])),
        (vec![extent(u32::MAX, 9)], status_chunk(5, &[(4 * 4096, 3)])),
        (vec![], failed(5, errno::EIO)),
    ];
    for (blocks, expected) in cases {
        rig.send(&client::request(0, 7, 5, 0, 4 * 4096));
        let (issue, _) = rig.asked.remove(0);
        rig.answer(&issue.request, Status::Ok, &blocks);
        assert_eq!(messages(&rig.take_wire()), expected);
    }
    rig.send(&client::request(0, 7, 5, 0, 1 << 20));
    rig.reply(0);
    rig.fail(0, Status::Io);
    assert_eq!(messages(&rig.take_wire()), failed(5, errno::EIO));
    assert!(rig.asked.is_empty());
}

#[test]
fn every_status_has_its_error() {
    let cases = [
        (Status::Io, errno::EIO),
        (Status::Full, errno::ENOSPC),
        (Status::Gone, errno::ESHUTDOWN),
        (Status::Invalid, errno::EINVAL),
    ];
    for (status, error) in cases {
        let mut rig = Rig::simple(disk0());
        rig.send(&client::request(0, 0, 5, 0, 100));
        rig.fail(0, status);
        assert_eq!(messages(&rig.take_wire()), ended(5, error));
    }
}

#[test]
fn the_number_of_requests_is_bounded() {
    let config = Config { chunks_max: 100, ..config() };
    let mut rig = Rig::new(config, vec![disk0()]);
    rig.send(&client::FLAGS);
    rig.send(&client::option(1, b""));
    for cookie in 0..20 {
        rig.send(&client::request(0, 0, cookie, 0, 1));
    }
    assert_eq!(rig.asked.len(), usize::from(config.requests_max));
    assert_eq!(rig.session.handle_bytes(&rig.rx, &rig.exports).next, Next::Wait);
    rig.reply(0);
    assert_eq!(rig.asked.len(), usize::from(config.requests_max));
    rig.reply_all();
    assert_eq!(rig.rx.len(), 0);
}

#[test]
fn the_number_of_chunks_is_bounded() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 5, 5, 0, 2 << 20));
    assert_eq!(rig.asked.len(), 6);
    rig.send(&client::request(0, 1, 6, 0, 1));
    rig.send(&[1]);
    let mut most = 0;
    while !rig.asked.is_empty() {
        most = most.max(rig.asked.len());
        rig.reply(0);
    }
    assert_eq!(most, 6);
    assert_eq!(messages(&rig.take_wire()), [ended(5, 0), ended(6, 0)].concat());
}

#[test]
fn writes_wait_for_the_bound_on_chunks() {
    let mut rig = Rig::simple(disk0());
    for cookie in 0..8 {
        rig.send(&[client::request(0, 1, cookie, 0, 1), vec![1]].concat());
    }
    assert_eq!(rig.asked.len(), 6);
    rig.reply(0);
    assert_eq!(rig.asked.len(), 6);
    rig.reply_all();
    assert_eq!(messages(&rig.take_wire()).len(), 8);
}

#[test]
fn what_is_in_flight_fits_the_transmit_buffer() {
    let config = Config { requests_max: 20, chunks_max: 100, ..config() };
    let mut rig = Rig::new(config, vec![disk0()]);
    rig.send(&client::FLAGS);
    rig.send(&client::option(8, &[]));
    rig.send(&client::option(1, b""));
    rig.take_wire();
    for cookie in 0..19 {
        rig.send(&client::request(0, 5, cookie, 0, 1));
    }
    rig.disk.allocated.fill(true);
    rig.send(&client::request(0, 0, 19, 0, 1 << 20));
    let reads = rig.asked.iter().filter(|(issue, _)| issue.request.kind == RequestKind::Read);
    assert_eq!(reads.count(), 2);
    for (issue, _) in core::mem::take(&mut rig.asked) {
        let Request { id, kind, len, .. } = issue.request;
        let blocks = if kind == RequestKind::Read { rig.lend(0, len) } else { vec![] };
        let reply = Reply { id, kind, status: Status::Ok, lease: None };
        rig.session.handle_reply(&reply, &blocks);
        rig.drain();
    }
    let put_out = rig.take_wire().len();
    assert!(put_out > 2 * UNIT as usize && put_out <= config.tx_bytes_max(), "{put_out}");
}

#[test]
fn disconnect_finishes_what_is_in_progress() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 0, 5, 0, 10));
    rig.send(&client::request(0, 2, 0, 0, 0));
    rig.send(&client::request(0, 0, 6, 0, 10));
    assert_eq!((rig.session.state(), rig.asked.len()), (State::Draining, 1));
    rig.reply(0);
    assert_eq!(rig.take_wire().len(), 26);
    closed_as(&rig, Reason::Disconnected);

    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 2, 0, 0, 0));
    closed_as(&rig, Reason::Disconnected);
}

#[test]
fn after_a_hangup_replies_are_taken_and_nothing_is_put_out() {
    let mut rig = Rig::structured(disk0());
    rig.send(&client::request(0, 0, 5, 0, 1 << 20));
    rig.session.handle_hangup();
    closed_as(&rig, Reason::HungUp);
    while !rig.asked.is_empty() {
        rig.reply(0);
    }
    assert_eq!((rig.session.in_flight(), rig.take_wire()), (0, vec![]));
}

#[test]
fn shutdown_finishes_requests_but_not_payloads_to_come() {
    let mut rig = Rig::structured(disk0());
    rig.send(&client::request(0, 0, 5, 0, 1 << 20));
    rig.session.handle_shutdown();
    rig.drain();
    assert_eq!(rig.session.state(), State::Draining);
    rig.reply_all();
    assert_eq!(messages(&rig.take_wire()).len(), 8);
    closed_as(&rig, Reason::Shutdown);

    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 1, 5, 0, 200_000));
    rig.send(&vec![1; 150_000]);
    rig.session.handle_shutdown();
    rig.drain();
    assert_eq!(rig.take_wire(), b"");
    rig.reply(0);
    assert_eq!(messages(&rig.take_wire()), ended(5, errno::ESHUTDOWN));
    closed_as(&rig, Reason::Shutdown);

    let mut rig = haggling(vec![disk0()]);
    rig.session.handle_shutdown();
    closed_as(&rig, Reason::Shutdown);
}

#[test]
fn a_reply_that_belongs_to_nothing_is_counted() {
    let mut rig = Rig::simple(disk0());
    rig.send(&client::request(0, 0, 5, 0, 10));
    let late = rig.asked[0].0.request;
    rig.reply(0);
    rig.take_wire();
    rig.answer(&late, Status::Ok, &[]);
    assert_eq!(rig.session.strays(), 1);
    // The slot has a new owner.
    rig.send(&client::request(0, 0, 6, 0, 10));
    rig.answer(&late, Status::Ok, &[]);
    let next = rig.asked[0].0.request;
    for id in [u64::MAX, next.id | 1 << ID_BITS, next.id + 1] {
        rig.answer(&Request { id, ..next }, Status::Ok, &[]);
    }
    assert_eq!((rig.session.strays(), rig.take_wire()), (5, vec![]));
    rig.reply(0);
    assert_eq!(rig.take_wire().len(), 26);
}
