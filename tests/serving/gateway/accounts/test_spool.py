"""The spool file: order, bound, lock, adoption, and what is left when the process dies between any two system calls."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.serving.gateway.accounts.interface import UsageRecord
from penstock.serving.gateway.accounts.prices import PricedUsage
from penstock.serving.gateway.accounts.spool import Spool, SpoolFolder

LIMIT = 4096


def item(number: int, padding: int = 0) -> PricedUsage:
    usage = UsageRecord(
        request_id=f"r{number}" + "x" * padding,
        at=float(number),
        key_id="key",
        tenant="tenant",
        model="model",
        outcome="completed",
        cache="miss",
        prompt_tokens=number,
        cached_tokens=0,
        output_tokens=1,
    )
    return PricedUsage(usage, number)


def numbers(spool: Spool, most: int = 10_000) -> list[int]:
    return [entry.cost_micros for entry in spool.peek(most)]


def image(spool: Spool, folder: Path) -> Spool:
    """What a process finds that opens the file after its owner died right now."""
    folder.mkdir(exist_ok=True)
    shutil.copy(spool.path, folder / "usage-1-dead.spool")
    adopted = SpoolFolder(folder, LIMIT).adopt()
    assert adopted is not None
    return adopted


def test_records_come_back_in_order(tmp_path: Path) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    items = [item(number) for number in range(10)]
    assert spool.append(items[:4]) == 4
    assert spool.append(items[4:]) == 6
    assert spool.peek(3) == items[:3]
    spool.acknowledge(2)
    assert len(spool) == 8
    assert spool.peek(100) == items[2:]
    spool.acknowledge(8)
    assert (len(spool), spool.peek(1)) == (0, [])
    assert spool.size_bytes == 16
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_closed_with_records_it_waits_for_the_next_process(tmp_path: Path) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    spool.append([item(1), item(2), item(3)])
    spool.peek(1)
    spool.acknowledge(1)
    spool.close()
    spool.close()
    successor = SpoolFolder(tmp_path, LIMIT).open()
    assert successor.path == spool.path
    assert numbers(successor) == [2, 3]
    successor.append([item(4)])
    assert numbers(successor) == [2, 3, 4]
    successor.close()


def test_readable_by_its_user_only(tmp_path: Path) -> None:
    spool = SpoolFolder(tmp_path / "new" / "folder", LIMIT).open()
    assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(spool.path.parent.stat().st_mode) == 0o700
    spool.close()


def test_spool_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    first = SpoolFolder(tmp_path, LIMIT).open()
    first.append([item(1)])
    second = SpoolFolder(tmp_path, LIMIT).open()
    assert second.path != first.path
    assert SpoolFolder(tmp_path, LIMIT).adopt() is None
    first.close()
    adopted = SpoolFolder(tmp_path, LIMIT).adopt()
    assert adopted is not None
    assert adopted.path == first.path
    adopted.close()
    second.close()


def test_many_processes_that_start_at_once_share_out_what_is_left(tmp_path: Path) -> None:
    dead = [SpoolFolder(tmp_path, LIMIT).open() for _ in range(3)]
    for number, spool in enumerate(dead):
        spool.append([item(number)])
    for spool in dead:
        spool.close()
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: SpoolFolder(tmp_path, LIMIT).open(), range(8)))
    assert len({spool.path for spool in opened}) == 8
    assert sorted(number for spool in opened for number in numbers(spool)) == [0, 1, 2]
    for spool in opened:
        spool.close()


def test_files_that_cannot_be_used_are_left_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "precious"
    target.write_text("do not touch")
    (tmp_path / "usage-0-link.spool").symlink_to(target)
    other = tmp_path / "usage-1-abc.spool"
    other.write_bytes(b"PNSPOOL9 and whatever")
    folder = SpoolFolder(tmp_path, LIMIT)
    spool = folder.open()
    assert folder.adopt() is None
    assert spool.path != other
    assert target.read_text() == "do not touch"
    assert other.read_bytes() == b"PNSPOOL9 and whatever"
    assert [message.split(" is not used: ")[1] for message in caplog.messages] == [
        "Too many levels of symbolic links",
        "it is not a spool of this version",
    ]
    spool.close()


def test_size_is_bounded_and_space_is_used_again(tmp_path: Path) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    taken = spool.append([item(number) for number in range(100)])
    assert 0 < taken < 100
    assert spool.append([item(1)]) == 0
    assert spool.path.stat().st_size <= LIMIT
    # Acknowledged space comes back once there is room to move the rest.
    kept = taken // 3
    spool.peek(taken - kept)
    spool.acknowledge(taken - kept)
    assert spool.append([item(1000)]) == 1
    assert numbers(spool) == [*range(taken - kept, taken), 1000]
    assert spool.path.stat().st_size <= LIMIT
    spool.close()


def test_acknowledged_after_an_append_that_moved_the_records(tmp_path: Path) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    taken = spool.append([item(number) for number in range(100)])
    spool.peek(taken - 4)
    spool.acknowledge(taken - 4)
    assert numbers(spool, 2) == [taken - 4, taken - 3]
    assert spool.append([item(500), item(501)]) == 2
    spool.acknowledge(2)
    assert numbers(spool) == [taken - 2, taken - 1, 500, 501]
    spool.close()


@pytest.mark.parametrize("missing", range(1, 60, 7))
def test_torn_tail_is_dropped(tmp_path: Path, missing: int, caplog: pytest.LogCaptureFixture) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    spool.append([item(number) for number in range(5)])
    os.truncate(spool.path, spool.path.stat().st_size - missing)
    found = image(spool, tmp_path / "copy")
    assert numbers(found) == [0, 1, 2, 3]
    assert "not whole records" in caplog.text
    found.append([item(9)])
    assert numbers(found) == [0, 1, 2, 3, 9]
    found.close()
    spool.close()


@pytest.mark.parametrize("length", [0, 2**32 - 1, 65537, 3])
def test_damaged_length_ends_the_file(tmp_path: Path, length: int) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    spool.append([item(1)])
    with spool.path.open("ab") as file:
        file.write(struct.pack(">II", length, 0) + b"abc")
    found = image(spool, tmp_path / "copy")
    assert numbers(found) == [1]
    found.close()
    spool.close()


def test_failed_append_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = SpoolFolder(tmp_path, LIMIT).open()
    spool.append([item(1)])
    real, calls = os.pwrite, 0

    def full_disk(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(descriptor, data[:10], offset)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_disk)
        with pytest.raises(OSError, match="No space"):
            spool.append([item(2)])
    assert numbers(spool) == [1]
    spool.append([item(3)])
    found = image(spool, tmp_path / "copy")
    assert numbers(found) == [1, 3]
    found.close()
    spool.close()


@pytest.fixture
def crash_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Spool], list[list[int]]]:
    """Copies the spool before every call that changes it; gives what each copy holds."""
    copies: list[Path] = []
    watched: list[Spool] = []
    numbering = itertools.count()

    def before(function: Callable[..., int | None]) -> Callable[..., int | None]:
        def call(*arguments: object) -> int | None:
            if watched:
                target = tmp_path / f"image{next(numbering)}"
                target.mkdir()
                copies.append(Path(shutil.copy(watched[0].path, target / "usage-1-dead.spool")))
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "pwrite", before(os.pwrite))
    monkeypatch.setattr(os, "ftruncate", before(os.ftruncate))

    def watch(spool: Spool) -> list[list[int]]:
        if not watched:
            watched.append(spool)
            return []
        watched.clear()
        held = []
        for copy in copies:
            found = SpoolFolder(copy.parent, LIMIT).adopt()
            assert found is not None
            held.append(numbers(found))
            found.close()
        copies.clear()
        return held

    return watch


def test_killed_while_records_are_moved(tmp_path: Path, crash_images: Callable[[Spool], list[list[int]]]) -> None:
    spool = SpoolFolder(tmp_path / "spool", LIMIT).open()
    taken = spool.append([item(number, number % 7) for number in range(100)])
    for kept in (taken // 3, 5, 1):
        spool.peek(len(spool) - kept)
        spool.acknowledge(len(spool) - kept)
        before = numbers(spool)
        crash_images(spool)
        added = spool.append([item(number, number % 5) for number in range(200, 300)])
        states = crash_images(spool)
        after = numbers(spool)
        assert after == [*before, *range(200, 200 + added)]
        assert len(states) >= 4
        assert all(state == before for state in states)


def test_killed_while_records_are_acknowledged(
    tmp_path: Path, crash_images: Callable[[Spool], list[list[int]]]
) -> None:
    spool = SpoolFolder(tmp_path / "spool", LIMIT).open()
    spool.append([item(number) for number in range(10)])
    for count in (3, 7):
        before = numbers(spool)
        spool.peek(count)
        crash_images(spool)
        spool.acknowledge(count)
        states = crash_images(spool)
        assert states
        assert all(state in (before, numbers(spool)) for state in states)
    assert len(spool) == 0
    spool.close()


class SpoolMachine(RuleBasedStateMachine):
    """Any order of appends, acknowledgements and deaths: the spool is a bounded queue."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="penstock-spool-"))
        self.spool = SpoolFolder(self.folder / "live", LIMIT).open()
        self.expected: list[int] = []
        self.peeked = 0
        self.next = 0
        self.images = 0

    @rule(count=st.integers(1, 40), padding=st.integers(0, 300))
    def append(self, count: int, padding: int) -> None:
        items = [item(self.next + number, padding) for number in range(count)]
        taken = self.spool.append(items)
        self.expected += range(self.next, self.next + taken)
        self.next += count

    @rule(most=st.integers(1, 50))
    def peek(self, most: int) -> None:
        assert numbers(self.spool, most) == self.expected[:most]
        self.peeked = min(most, len(self.expected))

    @precondition(lambda self: self.peeked)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.peeked))
        self.spool.acknowledge(count)
        del self.expected[:count]
        self.peeked -= count

    @rule(torn=st.integers(0, 40))
    def die(self, torn: int) -> None:
        """A successor continues with a copy of the file; an unfinished append may be at its end."""
        self.images += 1
        folder = self.folder / f"image{self.images}"
        folder.mkdir()
        copy = shutil.copy(self.spool.path, folder)
        with Path(copy).open("ab") as file:
            file.write(b"\x00\x00\x00\x50" + bytes(torn))
        self.spool.close()
        self.spool = SpoolFolder(folder, LIMIT).open()
        assert self.spool.path == Path(copy)
        self.peeked = 0

    @invariant()
    def holds_what_is_expected(self) -> None:
        assert len(self.spool) == len(self.expected)
        assert self.spool.path.stat().st_size <= LIMIT

    def teardown(self) -> None:
        assert numbers(self.spool) == self.expected
        self.spool.close()
        shutil.rmtree(self.folder)


SpoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSpoolMachine = SpoolMachine.TestCase
