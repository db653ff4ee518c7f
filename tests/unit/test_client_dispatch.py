"""When and to which server a request is sent, in simulated time, as servers fail, hang, refuse and come back."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_embed import (
    ContractError,
    DeadlineExceededError,
    EmbeddingError,
    ImageFailure,
    InvalidImageError,
    ModelNotReadyError,
    Retry,
    ServerError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from clip_embed.batches import Batches
from clip_embed.dispatch import Attempt, Dispatch, Probe, RequestLimits
from clip_embed.servers import MOST_MISSED_DEADLINES, Server, Servers

ALWAYS_LONGEST = Retry(random=lambda: 1.0)
ANSWER_S = 0.01


def raising(error):
    def answer():
        raise error

    return answer


@dataclass
class World:
    """A simulated clock and servers.

    `downs` has the times when each server cannot be reached. `faults` has its answers, in turn: an error, "hang" for no
    answer before the deadline, or None for a good one.
    """

    servers: int = 1
    downs: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    faults: dict[int, list[object]] = field(default_factory=dict)
    bad: frozenset[int] = frozenset()
    retry: Retry | None = ALWAYS_LONGEST
    now: float = 0.0

    def __post_init__(self):
        self.all = [Server(str(index), transport=None) for index in range(self.servers)]
        self.fleet = Servers(self.all, self.retry)
        self.attempts: list[tuple[float, int, tuple[int, ...]]] = []  # when, to whom, which images
        self.probes: list[tuple[float, int]] = []
        self.answered: list[int] = []

    def call(self, count, *, timeout_s=30.0, attempt_timeout_s=None, max_in_flight=2, batch_size=1, keep_going=True):
        """All results of a call. The clock advances by the time that it takes."""
        batches = Batches(
            [b"%d" % index for index in range(count)],
            batch_size=batch_size,
            max_batch_bytes=999,
            read_ahead=4 * max_in_flight * batch_size,
            keep_going=keep_going,
        )
        limits = RequestLimits(max_in_flight, timeout_s, is_per_request=keep_going, attempt_timeout_s=attempt_timeout_s)
        dispatch = Dispatch(batches, self.fleet, limits, self.retry, now_s=lambda: self.now)
        started, results = [], []
        try:
            for _ in range(100_000):
                if dispatch.finished:
                    return results
                while True:
                    dispatch.read()
                    if (job := dispatch.next()) is None:
                        break
                    started.append((*self.fate(job), job))
                    assert sum(not isinstance(one[2], Probe) for one in started) <= max_in_flight
                pause_s = dispatch.pause_s()
                first = min(started, key=lambda one: one[0], default=None)
                if first and (pause_s is None or first[0] <= self.now + pause_s):
                    self.now = max(self.now, first[0])
                    started.remove(first)
                    dispatch.settle(first[2], first[1])
                else:
                    assert pause_s is not None, "the call would wait forever"
                    self.now += pause_s
                results.extend(dispatch.ready())
            raise AssertionError("the call does not end")
        finally:
            for one in started:
                dispatch.abandon(one[2])
            assert [server.in_flight for server in self.all] == [0] * self.servers
            assert not any(server.is_probing for server in self.all)

    def fate(self, job):
        """When a job ends, and its answer."""
        who = self.all.index(job.server)
        ends = self.now + ANSWER_S
        images = ()
        if isinstance(job, Attempt):
            images = tuple(item.index for item in job.pending.request)
            self.attempts.append((self.now, who, images))
        for begin, end in self.downs.get(who, []):
            if begin < ends and self.now < end:
                return max(self.now, begin), raising(ServerUnavailableError(f"server {who}: connection refused"))
        if isinstance(job, Probe):
            self.probes.append((self.now, who))
            return ends, lambda: True
        faults = self.faults.get(who, [])
        fault = faults.pop(0) if faults else None
        if fault == "hang":
            return self.now + job.timeout_s, raising(DeadlineExceededError("no answer"))
        if fault is not None:
            return ends, raising(fault)
        if failures := [ImageFailure(i, "corrupt") for i, index in enumerate(images) if index in self.bad]:
            return ends, raising(InvalidImageError(failures))
        self.answered.extend(images)
        return ends, lambda: np.array([[index] * 512 for index in images], np.float32)


def rows(results):
    return [result if isinstance(result, EmbeddingError) else int(result[0]) for result in results]


def test_a_lost_server_is_probed_until_it_is_ready_and_only_then_gets_requests():
    """The only server is down from 0.055 s to 2 s: no image is lost, and no request is sent to it meanwhile."""
    world = World(downs={0: [(0.055, 2.0)]})
    assert rows(world.call(40)) == list(range(40))
    away = [when for when, _, _ in world.attempts if 0.055 <= when < 2]
    assert away == []
    (probed_s,) = [when for when, _ in world.probes]  # only the probe that was answered is recorded
    assert 2 <= probed_s < world.attempts[-1][0]


def test_backoff_doubles_up_to_its_limit_and_begins_anew_after_an_answer():
    retry = Retry(first_wait_s=0.1, factor=2, max_wait_s=0.5, random=lambda: 1.0)
    assert [retry.wait_s(n) for n in (1, 2, 3, 4, 5, 5000)] == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5, 0.5])
    world = World(retry=retry, faults={0: [ServerOverloadedError("full")] * 4})
    assert rows(world.call(1)) == [0]
    starts = [when for when, _, _ in world.attempts]
    assert np.diff(starts) == pytest.approx([0.11, 0.21, 0.41, 0.51])


def test_the_jitter_is_full_and_can_be_seeded():
    """A wait is anything from 0 to its longest, so that clients do not retry in step."""
    waits = [Retry(random=random.Random(0).random).wait_s(3) for _ in range(2)]  # noqa: S311
    assert waits[0] == waits[1]
    many = Retry(random=random.Random(1).random)  # noqa: S311
    drawn = [many.wait_s(3) for _ in range(500)]
    assert 0 <= min(drawn) < 0.02
    assert 0.38 < max(drawn) <= 0.4


@pytest.mark.parametrize("numbers", [{"first_wait_s": -1}, {"first_wait_s": 9}, {"factor": 0.5}])
def test_an_invalid_backoff_is_refused(numbers):
    with pytest.raises(ValueError, match="expected"):
        Retry(**numbers)


@pytest.mark.parametrize(
    "error",
    [InvalidImageError([ImageFailure(0, "corrupt")]), ContractError("another model"), ServerError("boom")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_a_retry_cannot_fix_is_not_retried(error):
    world = World(servers=2, faults={0: [error]})
    (result,) = world.call(1)
    assert type(result) is type(error)
    assert len(world.attempts) == 1


@pytest.mark.parametrize("kind", [ServerUnavailableError, ServerOverloadedError, ModelNotReadyError])
def test_without_retries_each_error_is_final(kind):
    world = World(retry=None, faults={0: [kind("no"), kind("no")]})
    assert [type(result) for result in world.call(3)] == [kind, kind, np.ndarray]
    assert len(world.attempts) == 3


@pytest.mark.parametrize("keep_going", [True, False])
def test_no_attempt_begins_after_the_deadline_and_the_last_error_counts_them(keep_going):
    """A server that stays overloaded: attempts at 0, 0.11, 0.32, 0.73 and 1.54 s; the next would be after 2 s."""
    world = World(faults={0: [ServerOverloadedError("full")] * 99})
    try:
        (error,) = world.call(1, timeout_s=2, keep_going=keep_going)
    except ServerOverloadedError as raised:
        error = raised
    assert [when for when, _, _ in world.attempts] == pytest.approx([0, 0.11, 0.32, 0.73, 1.54])
    assert error.attempts == 5
    assert str(error) == "full (after 5 attempts)"
    assert world.now <= 2


def test_an_attempt_gets_no_more_time_than_is_left():
    """The first attempt takes 0.6 s of the 1 s, so the second gets 0.4 s."""
    world = World(faults={0: ["hang", "hang"]}, retry=Retry(random=lambda: 0.0))
    (error,) = world.call(1, timeout_s=1, attempt_timeout_s=0.6)
    assert isinstance(error, DeadlineExceededError)
    assert [when for when, _, _ in world.attempts] == pytest.approx([0, 0.6])
    assert world.now == pytest.approx(1)


def test_a_server_that_stays_unreachable_is_named_at_the_deadline():
    """The request that was sent has the connection's error. The others say that no server was ready, and why."""
    world = World(downs={0: [(0, 999)]})
    first, second, *_ = world.call(3, timeout_s=5, max_in_flight=1)
    assert (str(first), first.attempts) == ("server 0: connection refused", 1)
    assert isinstance(second, ServerUnavailableError)
    assert "no server was ready within 5 s: server 0: connection refused" in str(second)
    assert len(world.attempts) == 1
    assert world.now == pytest.approx(15, abs=0.5)


def test_requests_go_to_the_server_with_the_fewest_in_turn():
    world = World(servers=3)
    world.call(30, max_in_flight=6)
    assert [sum(who == server for _, who, _ in world.attempts) for server in range(3)] == [10, 10, 10]


def test_another_server_takes_over_at_once():
    """The requests of a server that dies are retried on the other without a wait, and it gets no more."""
    world = World(servers=2, downs={1: [(0.095, 999)]})
    assert rows(world.call(100, max_in_flight=4)) == list(range(100))
    assert world.now < 100 * ANSWER_S / 2
    assert not any(who == 1 for when, who, _ in world.attempts if when >= 0.1)
    assert sorted(world.answered) == list(range(100))


def test_a_server_that_comes_back_gets_work_again():
    world = World(servers=2, downs={1: [(0.095, 0.3)]})
    assert rows(world.call(400, max_in_flight=4)) == list(range(400))
    assert any(who == 1 for when, who, _ in world.attempts if when > 0.5)


def test_the_request_of_an_overloaded_server_goes_to_another_and_the_server_stays_in_use():
    world = World(servers=2, faults={0: [ServerOverloadedError("full")]})
    assert rows(world.call(20, max_in_flight=1)) == list(range(20))
    (second,) = [who for _, who, images in world.attempts if images == (0,)][1:]
    assert second == 1
    assert sum(who == 0 for _, who, _ in world.attempts) > 5
    assert world.probes == []


def test_a_server_that_hangs_is_left_out_after_some_deadlines():
    """Its requests are retried on the other server. A probe that it answers brings it back."""
    world = World(servers=2, faults={0: ["hang"] * MOST_MISSED_DEADLINES})
    assert rows(world.call(40, attempt_timeout_s=1, max_in_flight=2 * MOST_MISSED_DEADLINES)) == list(range(40))
    assert {who for _, who in world.probes} == {0}


def test_the_only_server_gets_requests_however_slow_it_is():
    world = World(faults={0: ["hang"] * 9})
    assert rows(world.call(1, timeout_s=300, attempt_timeout_s=1)) == [0]
    assert world.probes == []


def test_one_server_is_probed_once_at_a_time():
    """However many calls wait for it."""
    servers = Servers([Server("a", None)], ALWAYS_LONGEST)
    server = servers.take()
    servers.settle(server, ServerUnavailableError("gone"), 0.0)
    assert servers.take() is None
    assert servers.next_probe(0.05) is None
    assert servers.next_probe(0.2) is server
    assert servers.next_probe(0.2) is None
    servers.settle_probe(server, None, 0.2)  # given up: the next call may probe
    assert servers.next_probe(0.2) is server
    servers.settle_probe(server, False, 0.3)
    assert servers.next_probe(0.4) is None
    assert servers.next_probe(0.51) is server
    servers.settle_probe(server, True, 0.6)
    assert servers.take() is server


def test_eight_requests_lost_at_once_count_as_one_failure():
    """Otherwise the first wait would be the longest."""
    servers = Servers([Server("a", None)], ALWAYS_LONGEST)
    for server in [servers.take() for _ in range(8)]:
        servers.settle(server, ServerUnavailableError("gone"), 0.0)
    assert servers.next_probe(0.11) is not None


OUTAGE = st.tuples(st.floats(0, 20), st.floats(0.001, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))
FAULT = st.sampled_from([None, None, "hang", ServerOverloadedError, ServerUnavailableError, ModelNotReadyError])


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 60),
    downs=st.lists(st.lists(OUTAGE, max_size=3), min_size=1, max_size=3),
    faults=st.lists(st.lists(FAULT, max_size=12), min_size=3, max_size=3),
    bad=st.frozensets(st.integers(0, 59), max_size=6),
    batch_size=st.integers(1, 5),
    max_in_flight=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_every_image_has_one_result_whatever_the_servers_do(count, downs, faults, bad, batch_size, max_in_flight, seed):
    """With enough time each good image is answered exactly once, in its place, and each bad one is an error."""
    world = World(
        servers=len(downs),
        downs=dict(enumerate(downs)),
        faults={
            i: [kind("no") if isinstance(kind, type) else kind for kind in kinds] for i, kinds in enumerate(faults)
        },
        bad=bad,
        retry=Retry(random=random.Random(seed).random),  # noqa: S311
    )
    results = rows(
        world.call(count, timeout_s=500, attempt_timeout_s=2, batch_size=batch_size, max_in_flight=max_in_flight)
    )
    assert len(results) == count
    for index, result in enumerate(results):
        if index in bad:
            assert result.failures == (ImageFailure(index, "corrupt"),)
        else:
            assert result == index
    assert sorted(world.answered) == [index for index in range(count) if index not in bad]


@settings(max_examples=100, deadline=None)
@given(
    downs=st.lists(st.lists(OUTAGE, max_size=3), min_size=1, max_size=3),
    timeout_s=st.floats(0.05, 8),
    seed=st.integers(0, 99),
)
def test_no_attempt_begins_after_the_deadline_whatever_the_outages(downs, timeout_s, seed):
    """Each image has its vector or an error that says why."""
    world = World(servers=len(downs), downs=dict(enumerate(downs)), retry=Retry(random=random.Random(seed).random))  # noqa: S311
    begun = {}
    results = world.call(60, timeout_s=timeout_s, max_in_flight=3)
    assert len(results) == 60
    for when, _, images in world.attempts:
        assert when < begun.setdefault(images, when) + timeout_s
    for index, result in enumerate(rows(results)):
        assert result == index or isinstance(result, ServerUnavailableError)
