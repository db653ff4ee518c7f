"""The library that keeps what cancels a gRPC call from the embedded tritonserver, on a connection of its own."""

import json
import os
import random
import subprocess
import sys

import pytest

from clip_tools import c_libraries
from clip_tools.paths import ROOT

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM = 0, 1, 3
END_STREAM = 1
# RFC 7541, appendix B.
HUFFMAN = {
    **{"c": "00100", "e": "00101", "g": "100110", "i": "00110", "m": "101001", "o": "00111", "p": "101011"},
    **{"r": "101100", "s": "01000", "t": "01001", "u": "101101", "-": "010110"},
}


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def coded(name: str) -> bytes:
    bits = "".join(HUFFMAN[letter] for letter in name)
    bits += "1" * (-len(bits) % 8)
    return bytes([0x80 | len(bits) // 8]) + int(bits, 2).to_bytes(len(bits) // 8)


def literal(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


REQUEST = frame(HEADERS, 1, b"headers") + frame(DATA, 1, b"an image", END_STREAM)
CANCEL = frame(RST_STREAM, 1, b"\0\0\0\x08")
ANSWER = frame(HEADERS, 1, b"trailers", END_STREAM)


def run(*steps_of: list[tuple], preload: bool = True) -> list[list[bytes | None]]:
    """What the server read at each step of each connection."""
    library = c_libraries.library_path(c_libraries.IGNORE_CANCELLATION)
    if not library.is_file():
        pytest.skip("ignore_cancellation.c is not built: `make setup` says why")
    steps = [[[what, *(piece.hex() for piece in pieces)] for what, *pieces in steps] for steps in steps_of]
    done = subprocess.run(
        [sys.executable, "-m", "tests.connection"],
        input=json.dumps(steps),
        env={**os.environ, **({"LD_PRELOAD": str(library)} if preload else {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [[None if got is None else bytes.fromhex(got) for got in one] for one in json.loads(done.stdout)]


def test_a_whole_request_is_not_cancelled_but_the_frame_names_a_stream_that_does_not_exist():
    ((got,),) = run([("send", PREFACE + REQUEST + CANCEL)])
    assert got == PREFACE + REQUEST + frame(RST_STREAM, 0, b"\0\0\0\x08")


def test_a_request_that_has_not_come_whole_is_cancelled_and_so_is_one_that_was_answered():
    half = PREFACE + frame(HEADERS, 1, b"headers") + frame(DATA, 1, b"an im") + CANCEL
    answered = [("send", PREFACE + REQUEST), ("answer", ANSWER), ("send", CANCEL)]
    (first,), (_, _, second) = run([("send", half)], answered)
    assert (first, second) == (half, CANCEL)


@pytest.mark.parametrize("write", [literal, coded])
def test_a_deadline_is_renamed_however_hpack_writes_it(write):
    sent = PREFACE + frame(HEADERS, 1, b"\x40" + write("grpc-timeout") + b"\x02" + b"1S", END_STREAM)
    ((got,),) = run([("send", sent)])
    assert got == sent.replace(write("grpc-timeout"), write("grpc-timeous")) != sent


def test_bytes_of_an_image_are_never_touched():
    image = literal("grpc-timeout") + CANCEL
    sent = PREFACE + frame(HEADERS, 1) + frame(DATA, 1, image, END_STREAM)
    ((got,),) = run([("send", sent)])
    assert got == sent


def test_it_is_all_one_in_which_pieces_the_bytes_come():
    rng = random.Random(0)  # noqa: S311
    sent = PREFACE + frame(HEADERS, 1, literal("grpc-timeout") + coded("grpc-timeout")) + REQUEST[16:] + CANCEL
    connections = []
    for _ in range(100):
        cuts = sorted(rng.sample(range(1, len(sent)), rng.randrange(1, 20)))
        pieces = [sent[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
        connections.append([("send", *pieces)])
    whole, *others = run([("send", sent)], *connections)
    assert whole != [sent]
    assert all(other == whole for other in others)


def test_the_end_of_a_client_is_read_once_its_calls_are_answered():
    """Until then gRPC is told that there is room for the answers (WINDOW_UPDATE, SETTINGS), and then nothing."""
    steps = [("send", PREFACE + REQUEST), ("leave",), ("read",), ("answer", ANSWER), ("read",)]
    ((_, told, waiting, _, end),) = run(steps)
    assert [told[3], told[9 + 4 + 3]] == [8, 4]
    assert (waiting, end) == (None, b"")


def test_a_read_with_no_room_is_not_the_end_of_the_client():
    """gRPC reads so once its buffers are full."""
    begun = frame(HEADERS, 3, b"headers")
    ((_, nothing, got),) = run([("send", PREFACE + REQUEST), ("send unread", begun), ("read",)])
    assert (nothing, got) == (b"", begun)


def test_what_a_lost_client_had_begun_to_send_is_filled_up_and_ends_with_the_connection():
    begun = frame(HEADERS, 3, b"headers") + frame(DATA, 3, b"12345678")
    steps = [("send", PREFACE + REQUEST + begun[:-3]), ("leave",), ("read",), ("answer", ANSWER), ("read",)]
    ((_, told, waiting, _, end),) = run(steps)
    assert told.startswith(b"\0\0\0" + frame(8, 0, b"\x10\0\0\0"))
    assert (waiting, end) == (None, b"")


def test_a_client_without_calls_and_another_protocol_end_at_once():
    idle = [("send", PREFACE + REQUEST), ("answer", ANSWER), ("leave",)]
    other = [("send", b"GET / HTTP/1.1\r\n\r\n" + REQUEST + CANCEL), ("leave",)]
    (_, _, idle_end), (got, other_end) = run(idle, other)
    assert (idle_end, got, other_end) == (b"", other[0][1], b"")


def test_without_the_library_all_of_it_cancels():
    steps = [("send", PREFACE + REQUEST + CANCEL), ("leave",)]
    assert run(steps, preload=False) == [[PREFACE + REQUEST + CANCEL, b""]]
