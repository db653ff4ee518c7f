"""The preloaded library that hides cancellations of gRPC calls from the embedded tritonserver, on one connection."""

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


def huffman_coded(name: str) -> bytes:
    bits = "".join(HUFFMAN[letter] for letter in name)
    bits += "1" * (-len(bits) % 8)
    return bytes([0x80 | len(bits) // 8]) + int(bits, 2).to_bytes(len(bits) // 8)


def literal(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


REQUEST = frame(HEADERS, 1, b"headers") + frame(DATA, 1, b"an image", END_STREAM)
CANCEL = frame(RST_STREAM, 1, b"\0\0\0\x08")
ANSWER = frame(HEADERS, 1, b"trailers", END_STREAM)


def run(*steps_of: list[tuple], preload: bool = True) -> list[list[bytes | None]]:
    """What the server read at each step of each connection; None if nothing came or it did not read."""
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


def test_rst_stream_of_a_complete_request_is_rewritten_to_stream_0():
    ((got,),) = run([("send", PREFACE + REQUEST + CANCEL)])
    assert got == PREFACE + REQUEST + frame(RST_STREAM, 0, b"\0\0\0\x08")


def test_rst_stream_of_an_incomplete_or_answered_request_is_unchanged():
    half = PREFACE + frame(HEADERS, 1, b"headers") + frame(DATA, 1, b"an im") + CANCEL
    answered = [("send", PREFACE + REQUEST), ("answer", ANSWER), ("send", CANCEL)]
    (first,), (_, _, second) = run([("send", half)], answered)
    assert (first, second) == (half, CANCEL)


@pytest.mark.parametrize("write", [literal, huffman_coded])
def test_the_header_grpc_timeout_is_renamed_in_plain_and_huffman_coding(write):
    sent = PREFACE + frame(HEADERS, 1, b"\x40" + write("grpc-timeout") + b"\x02" + b"1S", END_STREAM)
    ((got,),) = run([("send", sent)])
    assert got == sent.replace(write("grpc-timeout"), write("grpc-timeous")) != sent


def test_image_bytes_are_never_changed():
    image = literal("grpc-timeout") + CANCEL
    sent = PREFACE + frame(HEADERS, 1) + frame(DATA, 1, image, END_STREAM)
    ((got,),) = run([("send", sent)])
    assert got == sent


def test_the_result_does_not_depend_on_how_the_bytes_are_split():
    rng = random.Random(0)  # noqa: S311
    sent = PREFACE + frame(HEADERS, 1, literal("grpc-timeout") + huffman_coded("grpc-timeout")) + REQUEST[16:] + CANCEL
    connections = []
    for _ in range(100):
        cuts = sorted(rng.sample(range(1, len(sent)), rng.randrange(1, 20)))
        pieces = [sent[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
        connections.append([("send", *pieces)])
    whole, *others = run([("send", sent)], *connections)
    assert whole != [sent]
    assert all(other == whole for other in others)


def test_a_closed_connection_is_seen_only_after_its_calls_are_answered():
    """Until then, gRPC reads frames that open its flow-control windows (WINDOW_UPDATE, SETTINGS), then nothing."""
    steps = [("send", PREFACE + REQUEST), ("leave",), ("read",), ("answer", ANSWER), ("read",)]
    ((_, told, waiting, _, end),) = run(steps)
    assert [told[3], told[9 + 4 + 3]] == [8, 4]
    assert (waiting, end) == (None, b"")


def test_a_read_with_no_room_is_not_the_end_of_the_client():
    """gRPC does this when its buffers are full."""
    begun = frame(HEADERS, 3, b"headers")
    ((_, nothing, got),) = run([("send", PREFACE + REQUEST), ("send unread", begun), ("read",)])
    assert (nothing, got) == (b"", begun)


def test_an_unfinished_frame_of_a_closed_connection_is_filled_with_zeros():
    begun = frame(HEADERS, 3, b"headers") + frame(DATA, 3, b"12345678")
    steps = [("send", PREFACE + REQUEST + begun[:-3]), ("leave",), ("read",), ("answer", ANSWER), ("read",)]
    ((_, told, waiting, _, end),) = run(steps)
    assert told.startswith(b"\0\0\0" + frame(8, 0, b"\x10\0\0\0"))
    assert (waiting, end) == (None, b"")


def test_a_connection_without_calls_or_of_another_protocol_ends_at_once():
    idle = [("send", PREFACE + REQUEST), ("answer", ANSWER), ("leave",)]
    other = [("send", b"GET / HTTP/1.1\r\n\r\n" + REQUEST + CANCEL), ("leave",)]
    (_, _, idle_end), (got, other_end) = run(idle, other)
    assert (idle_end, got, other_end) == (b"", other[0][1], b"")


def test_without_the_library_the_server_sees_cancellations():
    steps = [("send", PREFACE + REQUEST + CANCEL), ("leave",)]
    assert run(steps, preload=False) == [[PREFACE + REQUEST + CANCEL, b""]]
