"""Processes as threads: who is absent, late, silent or gone is named, to everyone, within the time limit."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from distill_jax.train import peers
from distill_jax.train.lost_rows import LostRows
from distill_jax.train.peers import Absent, call_roll
from distill_jax.train.watchdog import Watchdog


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def meet(numbers, processes, *, seconds=20.0, heartbeat=20.0, counts=None):
    """The connections of processes `numbers`, or what each got instead; and what each was told of those lost."""
    port, lost = free_port(), {}

    def one(i):
        try:
            return call_roll("localhost", port, numbers[i], (counts or {}).get(i, processes), start_seconds=seconds,
                             heartbeat=heartbeat, offer=lambda: {"jax": 7},
                             on_lost=lambda text: lost.setdefault(numbers[i], text))
        except (ValueError, Absent) as e:
            return e

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, range(len(numbers)))), lost, port


def connected(*args, **kwargs):
    found, lost, _ = meet(*args, **kwargs)
    assert all(offer == {"jax": 7} for _, offer in found)
    return [peer for peer, _ in found], lost


def all_at(ours, name, values=None, seconds=20.0):
    def one(peer):
        try:
            return peer.barrier(name, (values or {}).get(peer.process, ""), seconds)
        except Absent as e:
            return e

    with ThreadPoolExecutor(len(ours)) as pool:
        return list(pool.map(one, ours))


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_all_come_and_pass_the_same_barriers():
    ours, lost = connected((2, 0, 1), 3)
    for name in ("start", "checkpoint 5", "start"):  # a name may come again
        assert all_at(ours, name, dict.fromkeys(range(3), "5")) == [None] * 3
    for peer in ours:
        peer.leave()
    assert lost == {}


@dataclass(frozen=True)
class Bad:
    place: str
    lost: int

    def __str__(self):
        return f"{self.place} lost {self.lost}"


def test_what_one_process_left_out_is_said_by_process_0_once(monkeypatch):
    ours, _ = connected((1, 0), 2)
    found = {1: [Bad("shard 3", 16)], 0: []}
    lost = {peer.process: LostRows("train", lambda n=peer.process: found[n]) for peer in ours}
    said, reporter = [], SimpleNamespace(say=lambda line: said.append(line))

    def report():
        for peer in ours:
            monkeypatch.setattr(peers, "_current", peer)
            lost[peer.process].pass_on()
        all_at(ours, "end")
        for peer in ours:
            monkeypatch.setattr(peers, "_current", peer)
            if peer.process == 0:
                lost[0].say(reporter)
        return lost[0].numbers

    assert report() == {"bad_shards": 1, "lost_rows": 16} and said == ["shard 3 lost 16"]
    found[0] = found[1] = [Bad("shard 3", 16), Bad("shard 7", 1)]  # both meet it
    assert report() == report() == {"bad_shards": 2, "lost_rows": 17} and said == ["shard 3 lost 16", "shard 7 lost 1"]
    for peer in ours:
        peer.leave()


def test_a_barrier_lets_nobody_through_before_the_last_has_come():
    ours, _ = connected((0, 1), 2)
    passed = threading.Event()
    first = threading.Thread(target=lambda: (ours[0].barrier("stage", seconds=20.0), passed.set()))
    first.start()
    assert not passed.wait(0.3)
    ours[1].barrier("stage", seconds=20.0)
    assert passed.wait(20)


def test_processes_that_do_not_come_are_named_to_those_who_did():
    found, _, _ = meet((0, 2), 4, seconds=0.5)
    for error in found:
        assert isinstance(error, Absent)
        assert str(error).startswith("2 of 4 processes did not come within 0.5 s: processes 1, 3; here are 0 (")


def test_without_process_0_the_others_say_whom_they_waited_for():
    found, _, port = meet((1,), 2, seconds=0.5)
    assert isinstance(found[0], Absent)
    assert f"process 0 did not answer at localhost:{port} within 0.5 s" in str(found[0])


def test_two_of_one_number():
    found, _, _ = meet((0, 1, 1), 3)
    assert all(isinstance(e, ValueError) and str(e).startswith("two processes call themselves 1: ") for e in found)


def test_told_of_another_number_of_processes():
    found, _, _ = meet((0, 1), 2, counts={1: 3})
    assert all("was told of 3 processes, process 0 of 2" in str(e) for e in found)


def test_a_late_process_is_not_let_into_a_run_that_has_begun():
    found, _, port = meet((0, 1), 2)
    with pytest.raises(Absent, match=r"process 1 .* came after the run had begun with all its 2 processes"):
        call_roll("localhost", port, 1, 2, start_seconds=5, heartbeat=20)
    assert all_at([peer for peer, _ in found], "on") == [None, None]


def test_a_port_in_use_and_a_stranger_on_it():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"process 0 cannot listen on port {port}: .*in use"):
            call_roll("localhost", port, 0, 2, start_seconds=5, heartbeat=5)

        def http():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=http, daemon=True).start()
        with pytest.raises(ValueError, match="in use by another program than process 0"):
            call_roll("localhost", port, 1, 2, start_seconds=5, heartbeat=5)


def test_a_stranger_disturbs_nobody():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        call = lambda i: call_roll("localhost", port, i, 2, start_seconds=20, heartbeat=20)
        first = pool.submit(call, 0)
        wait_for(lambda: not socket.socket().connect_ex(("localhost", port)))
        with socket.create_connection(("localhost", port)) as scan:
            scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert scan.recv(10) == b""
        assert pool.submit(call, 1).result()[1] == first.result()[1] == {}


def test_an_address_that_does_not_resolve():
    with pytest.raises(ValueError, match=r"'nowhere.invalid' does not resolve .* after 0.3 s"):
        call_roll("nowhere.invalid", 1234, 1, 2, start_seconds=0.3, heartbeat=5)


def test_a_barrier_names_the_absent_one_and_where_it_was():
    ours, lost = connected((0, 1, 2), 3, heartbeat=3.0)
    ours[2].note("train: update 7")
    wait_for(lambda: time.sleep(0.6) is None)  # longer than a beat
    errors = all_at(ours[:2], "train: checkpoint 8", seconds=0.3)
    for error in errors:
        assert "train: checkpoint 8: its time is up and 1 of 3 processes did not come: process 2 (" in str(error)
        assert str(error).endswith("last seen at train: update 7")
    wait_for(lambda: len(lost) == 3)


def test_what_they_bring_to_a_barrier_must_be_equal():
    ours, _ = connected((0, 1), 2)
    errors = all_at(ours, "train: start", {0: "checkpoint 5", 1: "checkpoint None"})
    assert all("at train: start process 0 has checkpoint 5, but process 1 (" in str(e) for e in errors)
    assert all("has checkpoint None; do all processes see the same run folder" in str(e) for e in errors)


def test_waiting_for_each_other_at_different_places():
    ours, _ = connected((0, 1), 2)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(peer.barrier, name, "", 60.0) for peer, name in zip(ours, ("stage a", "stage b"))]
        errors = [w.exception(20) for w in waits]
    for error in errors:
        assert isinstance(error, Absent) and "at different places (stage" in str(error)
        assert "stage a: 0" in str(error) and "stage b: 1" in str(error)


def test_a_process_that_is_gone_is_noticed_at_once():
    ours, lost = connected((0, 1, 2), 3)
    ours[1]._lines.sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: {0, 2} <= lost.keys(), 5.0)  # much less than the heartbeat
    assert lost[0].startswith("process 1 (") and "is gone; last seen at" in lost[0]


def test_a_silent_process_is_lost_after_the_heartbeat():
    port = free_port()
    lost = []
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(call_roll, "localhost", port, 0, 2, start_seconds=20, heartbeat=0.5, on_lost=lost.append)
        wait_for(lambda: not socket.socket().connect_ex(("localhost", port)))
        silent = socket.create_connection(("localhost", port))
        silent.sendall(json.dumps({"hello": 1, "processes": 2, "place": "b, pid 3"}).encode() + b"\n")
        first.result()
    wait_for(lambda: lost)
    assert lost[0].startswith("process 1 (b, pid 3) has been silent for ")


def test_an_error_of_one_ends_the_others_and_its_own_end_stays_its_own(monkeypatch):
    monkeypatch.setattr("distill_jax.train.hub.GRACE", 0.1)
    ours, lost = connected((0, 1), 2)
    ours[1].note("train: update 3")
    ours[1].leave(2, "ValueError: no space")
    wait_for(lambda: 0 in lost)
    assert lost[0].endswith("ended at train: update 3: ValueError: no space") and 1 not in lost


def test_waiting_for_one_that_has_left():
    ours, _ = connected((0, 1), 2, heartbeat=3.0)
    ours[1].leave()
    errors = all_at(ours[:1], "stage b", seconds=20.0)
    assert "process 1" in str(errors[0]) and "others wait for it at stage b" in str(errors[0])


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_seconds_that_are_none(monkeypatch, text):
    monkeypatch.setenv("DISTILL_JAX_STALL_SECONDS", text)
    with pytest.raises(ValueError, match=r"DISTILL_JAX_STALL_SECONDS=.*expected a positive number of seconds"):
        Watchdog()


def test_the_watchdog_waits_for_the_first_update_and_while_it_is_paused():
    stalls = []
    dog = Watchdog(0.2, stalls.append)
    with dog.watching():
        time.sleep(0.4)
        assert not stalls
        dog.alive()
        with dog.paused():
            time.sleep(0.4)
        assert not stalls
        wait_for(lambda: stalls)
    assert stalls == ["no update was done for 0.2 s (DISTILL_JAX_STALL_SECONDS)"]


def test_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("DISTILL_JAX_STALL_SECONDS", raising=False)
    assert peers.current() is peers.ALONE
    peers.current().barrier("anything", "x", 0.0)
    assert Watchdog().seconds == float("inf")
