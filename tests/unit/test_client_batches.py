"""How the client cuts a call into requests, and the bytes of requests and answers; without sockets."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from clip_embed import ContractError, ImageFailure, InvalidImageError
from clip_embed.batches import Batches
from clip_embed.wire import grpc_request, http_request, read_grpc_answer, read_http_answer


def vectors_of(images: list[bytes]) -> np.ndarray:
    return np.array([[int(image)] * 512 for image in images], np.float32)


@given(data=st.data(), sizes=st.lists(st.integers(1, 12), max_size=60), batch_size=st.integers(1, 9))
def test_any_order_of_answers_gives_the_order_of_images(data, sizes, batch_size):
    """Ragged sizes, bad images, and answers in any order: result i is image i's, and the limits hold."""
    limit, read_ahead = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bad = data.draw(st.sets(st.integers(0, 59)))
    images = [str(index).zfill(size).encode() for index, size in enumerate(sizes)]
    batches = Batches(images, batch_size=batch_size, max_batch_bytes=limit, read_ahead=read_ahead, keep_going=True)
    in_flight, results = [], []
    while not batches.finished:
        while len(in_flight) < 4 and (request := batches.next_request()):
            contents = [item.image for item in request]
            assert len(contents) <= batch_size
            assert len(contents) == 1 or sum(map(len, contents)) <= limit
            in_flight.append(request)
        if in_flight:
            request = in_flight.pop(data.draw(st.integers(0, len(in_flight) - 1)))
            if failures := [ImageFailure(i, "corrupt") for i, item in enumerate(request) if item.index in bad]:
                batches.fail(request, InvalidImageError(failures))
            else:
                batches.succeed(request, vectors_of([item.image for item in request]))
        results.extend(batches.ready())
    assert len(results) == len(images)
    for index, result in enumerate(results):
        if index in bad:
            assert result.failures == (ImageFailure(index, "corrupt"),)
        else:
            assert (result == index).all()


@pytest.mark.parametrize(("max_batch_bytes", "limit"), [(1000, 32 << 20), (40 << 20, 40 << 20)])
def test_a_file_over_the_servers_limit_is_too_large_and_not_read(tmp_path, max_batch_bytes, limit):
    """A larger `max_batch_bytes` raises the limit, for a server that accepts more."""
    paths = [tmp_path / name for name in ("largest.jpg", "larger.jpg", "huge.jpg")]
    for path, size in zip(paths, (limit, limit + 1, 1 << 40), strict=True):
        with path.open("wb") as file:
            file.truncate(size)
    batches = Batches(paths, batch_size=8, max_batch_bytes=max_batch_bytes, read_ahead=9, keep_going=True)
    ((item,),) = iter(batches.next_request, None)
    assert (item.index, len(item.image)) == (0, limit)
    batches.succeed((item,), vectors_of([b"0"]))
    _, *others = batches.ready()
    assert [[failure.code for failure in other.failures] for other in others] == [["too_large"], ["too_large"]]


def test_a_failure_that_names_no_image_of_the_request_fails_all_of_them():
    """Otherwise a server that names images which were not sent would make the client retry forever."""
    batches = Batches([b"0", b"1"], batch_size=2, max_batch_bytes=9, read_ahead=9, keep_going=True)
    error = InvalidImageError([ImageFailure(7, "corrupt")])
    batches.fail(batches.next_request(), error)
    assert list(batches.ready()) == [error, error]
    assert batches.next_request() is None
    assert batches.finished


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=9), st.sampled_from([0, 1 << 14, 1 << 21]))
def test_the_grpc_request_is_the_one_that_protobuf_writes(images, padding):
    """The hand-written encoding equals protobuf's own, at every width of the length field."""
    images[0] += bytes(padding)
    request = service_pb2.ModelInferRequest.FromString(grpc_request("clip_ensemble", [memoryview(i) for i in images]))
    expected = service_pb2.ModelInferRequest(model_name="clip_ensemble")
    expected.inputs.add(name="image_bytes", datatype="BYTES", shape=[len(images), 1])
    expected.outputs.add(name="embedding")
    expected.raw_input_contents.append(b"".join(struct.pack("<I", len(image)) + image for image in images))
    assert request == expected


def test_the_http_body_is_a_json_header_and_raw_elements():
    headers, body = http_request([b"abc", b""])
    end = int(headers["Inference-Header-Content-Length"])
    assert json.loads(body[:end])["inputs"] == [
        {"name": "image_bytes", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": 11}}
    ]
    assert body[end:] == b"\x03\0\0\0abc\0\0\0\0"


def test_other_outputs_before_the_embedding_are_skipped():
    """The bytes of the outputs follow each other in the order of the JSON header."""
    row = np.full((1, 512), 512**-0.5, np.float32)
    other = {"name": "other", "datatype": "INT8", "shape": [3], "parameters": {"binary_data_size": 3}}
    ours = {"name": "embedding", "datatype": "FP32", "shape": [1, 512], "parameters": {"binary_data_size": 2048}}
    head = json.dumps({"outputs": [other, ours]}).encode()
    assert np.array_equal(read_http_answer(head + b"xyz" + row.tobytes(), str(len(head)), 1), row)


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"", None),
        (b"<html>", None),
        (b"{}", "2"),
        (b'{"outputs":[]}', "14"),
        (b'{"outputs":[{"name":"embedding"}]}', "34"),
    ],
)
def test_an_invalid_http_answer_is_a_contract_error(body, length):
    with pytest.raises(ContractError, match="expected"):
        read_http_answer(body, length, 1)


def test_a_grpc_answer_without_the_output_is_a_contract_error():
    with pytest.raises(ContractError, match="embedding"):
        read_grpc_answer(service_pb2.ModelInferResponse(), 1)
