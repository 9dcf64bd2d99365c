"""A place: orders are forked from what has imported ahead, and nothing of one is left in the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch

from harness.executors.place import Died, Place
from harness.runner.fan_out import ANSWER
from tests.executors.echo import ECHO, LONG, PREPARED
from tests.executors.test_ahead import line

ROOT = Path(__file__).resolve().parents[2]
DRIVER = f"""
from harness.executors.place import Place
for said in Place({ECHO!r}, {{}}).carry_out(b"slow"):
    print(said.decode(), flush=True)
"""


@pytest.fixture
def place() -> Iterator[Place]:
    with closing(Place(ECHO, {})) as made:
        yield made


def ids(message: bytes) -> list[int]:
    return [int(word) for word in message.split()]


def test_each_order_has_a_process_and_they_are_forked_from_one(place: Place) -> None:
    said = [ids(message) for _ in range(3) for message in place.carry_out(b"order")]
    assert len({own for own, _, _ in said}) == 3 and len({parent for _, parent, _ in said}) == 1
    assert [count for _, _, count in said] == [1, 1, 1]


def test_half_a_message_is_none_and_the_next_order_is_carried_out(place: Place) -> None:
    messages = place.carry_out(b"long")
    os.kill(ids(next(messages))[0], signal.SIGKILL)
    with pytest.raises(Died, match="killed by SIGKILL"):
        next(messages)
    assert [len(message) for message in place.carry_out(b"long")][1:] == [len(LONG)]


def test_what_an_order_raises_is_how_it_died(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Died, match="exit code 1"):
        list(place.carry_out(b"raise"))
    assert "raised by an order" in capfd.readouterr().err
    assert len(list(place.carry_out(b"order"))) == 1


def test_an_order_that_nobody_listens_to_ends_and_its_words_are_not_the_next_ones(place: Place) -> None:
    messages = cast(Generator[bytes], place.carry_out(b"slow"))
    own = ids(next(messages))[0]
    messages.close()
    assert gone(own) and len(list(place.carry_out(b"order"))) == 1


def test_what_orders_share_is_done_in_what_they_are_forked_from() -> None:
    with closing(Place(PREPARED, {})) as place:
        place.start(b"soon")
        parent, *noted = place.carry_out(b"now")
        assert noted == [parent + b" soon", parent + b" now"]
        # Whoever is asked for it fails by himself, or does not.
        assert list(place.carry_out(b"raise")) == [parent, *noted]


@pytest.mark.slow
def test_what_orders_are_forked_from_may_die(place: Place) -> None:
    messages = place.carry_out(b"slow")
    own, parent, _ = ids(next(messages))
    os.kill(parent, signal.SIGKILL)
    threading.Timer(0.2, os.kill, (own, signal.SIGTERM)).start()
    with pytest.raises(Died, match="killed by SIGKILL"):
        next(messages)
    assert gone(own) and len(list(place.carry_out(b"order"))) == 1


@pytest.mark.slow
def test_an_order_ends_with_who_gave_it() -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, cwd=ROOT) as driver:
        assert driver.stdout is not None
        own, parent, _ = ids(driver.stdout.readline())
        driver.kill()
    assert gone(own) and gone(parent)


def gone(process: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended, or does soon."""
    end = time.monotonic() + seconds
    while psutil.pid_exists(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def on_cuda(order: bytes) -> Iterator[bytes]:
    """PyTorch was imported ahead of it."""
    yield b"%d" % int(torch.ones(int(order), device="cuda").sum())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_orders_that_are_forked_have_cuda() -> None:
    with closing(Place(f"{__name__}:on_cuda", {})) as made:
        assert [list(made.carry_out(order)) for order in (b"3", b"4")] == [[b"3"], [b"4"]]


WATCHED = f"""
import sys
import torch
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: exit(f"{{name}} was called"))
from harness.executors.executor import answer_of
assert answer_of({ANSWER!r}).ahead(sys.argv[1].encode())
"""


@pytest.mark.cluster
def test_what_orders_are_forked_from_asks_nothing_of_a_device(tmp_path: Path) -> None:
    # A context that is there before a fork is of no use behind it.
    asked = [sys.executable, "-c", WATCHED, line(tmp_path).decode()]
    assert subprocess.run(asked, check=False).returncode == 0
