"""Which answers the soak accepts, and which it reports as problems."""

import time

import numpy as np
import pytest

from clip_embed.errors import ContractError, InvalidImageError, RequestTooLargeError, ServerError
from clip_tools.errors import ToolError
from clip_tools.measuring import soak_traffic
from clip_tools.measuring.soak_traffic import BAD_REQUESTS, Caller, Photographs, Traffic
from clip_tools.measuring.watch import listener, sample

PHOTOGRAPHS = Photographs([bytes(1000), bytes(2000)], np.eye(2, 512, dtype=np.float32))


@pytest.fixture
def caller():
    return Caller("grpc://localhost:1", PHOTOGRAPHS, seed=0)


def test_a_vector_is_right_if_it_is_the_photographs_own(caller):
    own, other = PHOTOGRAPHS.embeddings
    assert caller.check([0, 1], [own, other]) == (0, "")
    lost, why = caller.check([0, 1], [own, own])
    assert lost == 1
    assert "another's vector: cosine 0.000" in why
    lost, why = caller.check([0, 1], [ServerError("broken"), own])
    assert lost == 2


@pytest.mark.parametrize(
    ("answer", "lost"),
    [(RequestTooLargeError("65 images"), 0), (ContractError("shape"), 65), ("vectors", 65)],
)
def test_a_bad_request_without_its_expected_error_is_a_problem(answer, lost):
    def ask():
        if isinstance(answer, Exception):
            raise answer
        return answer

    images, seen, why = soak_traffic._expect(RequestTooLargeError, 65, ask)
    assert (images, seen) == (65, lost)
    assert bool(why) == bool(lost)


def test_a_bad_image_that_gets_a_vector_is_a_problem(caller, monkeypatch):
    for middle, expected in ((InvalidImageError([]), 0), (PHOTOGRAPHS.embeddings[0], 1)):
        monkeypatch.setattr(caller, "choose", lambda _count: [0, 1])
        answers = [PHOTOGRAPHS.embeddings[0], middle, PHOTOGRAPHS.embeddings[1]]
        monkeypatch.setattr(caller.client, "embed_many", lambda _images, answers=answers: iter(answers))
        assert BAD_REQUESTS["broken"][0](caller)[:2] == (3, expected)


def test_an_unexpected_exception_is_a_problem_and_does_not_end_the_client(monkeypatch):
    def fail(_caller):
        raise KeyError("surprise")

    monkeypatch.setattr(soak_traffic, "REQUESTS", {"few": (fail, 1.0)})
    monkeypatch.setattr(soak_traffic, "BAD_REQUESTS", {})
    traffic = Traffic("grpc://localhost:1", PHOTOGRAPHS, clients=1, bad_share=0.0, seed=0)
    traffic.start()
    deadline = time.monotonic() + 60
    while len(traffic.ended) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert traffic.stop() == 0
    assert len(traffic.ended) >= 3
    assert {(one.lost, one.problem) for one in traffic.ended} == {(1, "KeyError: 'surprise'")}


def test_a_server_process_that_is_gone_is_named():
    with pytest.raises(ToolError, match="process 4194304, is gone"):
        sample(4194304, 0.0)  # Linux gives no process this number
    with pytest.raises(ToolError, match="nothing of this user listens on port 1"):
        listener(1)
