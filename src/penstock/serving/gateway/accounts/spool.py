"""A file that keeps usage until the database has it: appended in order, acknowledged from the front, bounded, one per process.

    offset 0          16            start                     end
           ├──────────┼──────────────┼─────────────────────────┼─────
           │ header   │ acknowledged │ frame  frame  frame …   │ torn tail of a killed process, cut off when opened
           └──────────┴──────────────┴─────────────────────────┴─────
    header: 8 bytes magic, 8 bytes `start` (big endian).   frame: length and CRC-32 of the payload (4 bytes each), payload.

The payload is one PricedUsage as msgpack. When everything is acknowledged the file is cut to its header; when more than half of a large
file is acknowledged the rest moves to the front, in an order that leaves a readable file whenever the process dies.

The owner holds a lock (flock) that the kernel gives back when it dies; whoever takes it then owns the records. Files are readable
by their user only. What was appended survives the death of the process at once, and a loss of power after `sync`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock.serving.gateway.accounts.prices import PricedUsage

logger = logging.getLogger(__name__)

SUFFIX = ".spool"
_MAGIC = b"PNSPOOL1"
_HEADER = struct.Struct(">8sQ")
_FRAME = struct.Struct(">II")
# Far above any record: a larger length is damage.
_LONGEST_PAYLOAD = 64 * 1024
_READ_BYTES = 256 * 1024
_COMPACT_FROM_BYTES = 1024 * 1024


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PricedUsage).decode


@dataclass(frozen=True, slots=True)
class _Frame:
    end: int
    item: PricedUsage


class Spool:
    """One open and locked file. Not for two threads at once. Operations raise OSError when the disk fails; after a failed append the
    file is as before. `dropped_bytes`: what was unreadable when the file was opened."""

    def __init__(self, path: Path, descriptor: int, limit_bytes: int) -> None:
        self.path = path
        self.dropped_bytes = 0
        self._file = descriptor
        self._limit = limit_bytes
        self._start = self._end = _HEADER.size
        self._count = 0
        self._peeked_ends: list[int] = []
        self._unsynced = False
        self._recover()

    def __len__(self) -> int:
        """Records that are not acknowledged."""
        return self._count

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def append(self, items: Sequence[PricedUsage]) -> int:
        """Add as many of `items` as fit below the limit, in order; how many those are."""
        frames = [_frame(item) for item in items]
        if self._end + sum(map(len, frames)) > self._limit:
            self._compact()
        fitting, size = 0, 0
        while fitting < len(frames) and self._end + size + len(frames[fitting]) <= self._limit:
            size += len(frames[fitting])
            fitting += 1
        if fitting:
            self._write(b"".join(frames[:fitting]))
            self._end += size
            self._count += fitting
        return fitting

    def peek(self, most: int) -> list[PricedUsage]:
        """The first records that are not acknowledged, at most `most`."""
        found: list[PricedUsage] = []
        self._peeked_ends = []
        for frame in self._frames(self._start, self._end):
            if len(found) == most:
                break
            found.append(frame.item)
            self._peeked_ends.append(frame.end)
        return found

    def acknowledge(self, count: int) -> None:
        """Forget the first `count` of the records that the last `peek` returned."""
        if count == 0:
            return
        self._start = self._peeked_ends[count - 1]
        self._peeked_ends = self._peeked_ends[count:]
        self._count -= count
        if self._start >= self._end:
            self._reset()
            return
        self._write_start(self._start)
        if self._start > max(_COMPACT_FROM_BYTES, self._end // 2):
            self._compact()

    def discard(self) -> int:
        """Forget everything, readable or not; how many records that were."""
        count = self._count
        self._reset()
        return count

    def sync(self) -> None:
        """Make what was appended survive a loss of power."""
        if self._unsynced:
            os.fsync(self._file)
            self._unsynced = False

    def close(self) -> None:
        """Give the lock back. A file without records is removed. Idempotent."""
        if self._file < 0:
            return
        try:
            if self._count:
                self.sync()
            else:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._file)
            self._file = -1

    def _recover(self) -> None:
        """Find what a former owner left; cut off what it did not finish."""
        size = os.fstat(self._file).st_size
        header = os.pread(self._file, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            self._reset()
            return
        self._start = min(max(_HEADER.unpack(header)[1], _HEADER.size), size)
        self._end = self._start
        for frame in self._frames(self._start, size):
            self._count += 1
            self._end = frame.end
        self.dropped_bytes = size - self._end
        os.ftruncate(self._file, self._end)

    def _frames(self, start: int, end: int) -> Iterator[_Frame]:
        """The frames between two offsets; ends at the first that is not whole."""
        buffer, origin, position = b"", start, start
        while position < end:
            item, length = _parse(buffer, position - origin)
            if item is None:
                if origin == position and buffer:
                    return
                origin, buffer = position, os.pread(self._file, min(_READ_BYTES, end - position), position)
                if not buffer:
                    return
                continue
            position += length
            yield _Frame(position, item)

    def _compact(self) -> None:
        """Move the records to the front if there is room for them before `start`.

        The copy goes where nothing counts any more, a length of zero ends it; then the header points there; then the old end is cut off.
        A process that dies before the header is written leaves the old records, one that dies after it the copy and a tail that is none.
        """
        length, room = self._end - self._start, self._start - _HEADER.size
        if length + _FRAME.size > room:
            return
        for offset in range(0, length, _READ_BYTES):
            piece = os.pread(self._file, min(_READ_BYTES, length - offset), self._start + offset)
            os.pwrite(self._file, piece, _HEADER.size + offset)
        os.pwrite(self._file, bytes(_FRAME.size), _HEADER.size + length)
        self._write_start(_HEADER.size)
        self._start, self._end = _HEADER.size, _HEADER.size + length
        self._peeked_ends = [end - room for end in self._peeked_ends]
        os.ftruncate(self._file, self._end)

    def _reset(self) -> None:
        self._start = self._end = _HEADER.size
        self._count = 0
        os.ftruncate(self._file, 0)
        self._write_start(self._start)

    def _write_start(self, start: int) -> None:
        os.pwrite(self._file, _HEADER.pack(_MAGIC, start), 0)

    def _write(self, content: bytes) -> None:
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(self._file, content[written:], self._end + written)
        except OSError:
            # A disk that is full may refuse even this; the next append overwrites what is left over.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._unsynced = True


class SpoolFolder:
    """Where the spools of all gateway processes of this machine are. Files that cannot be used are named once in the log."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._unusable: set[Path] = set()

    def open(self) -> Spool:
        """A spool for this process: one that a dead process left, else a new one. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        left = self.adopt()
        if left is not None:
            return left
        while True:
            path = self.folder / f"usage-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
            # Another process may take a new file for one that a dead process left before we lock it, and remove it.
            with contextlib.suppress(FileNotFoundError):
                spool = _lock(path, self.limit_bytes, os.O_CREAT | os.O_EXCL)
                if spool is not None:
                    return spool

    def adopt(self) -> Spool | None:
        """A spool whose process is dead; None when there is none."""
        for path in sorted(set(self.folder.glob(f"usage-*{SUFFIX}")) - self._unusable):
            try:
                spool = _lock(path, self.limit_bytes, 0)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._unusable.add(path)
                logger.warning("%s is not used: %s", path, error.strerror or error)
                continue
            if spool is not None:
                return spool
        return None


def _lock(path: Path, limit_bytes: int, flags: int) -> Spool | None:
    """Open and lock; None when another process has it. Raises OSError, FileNotFoundError when it is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its former owner may have removed it between the two calls above; the lock of a removed file is worth nothing.
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(path)
        header = os.pread(descriptor, _HEADER.size, 0)
        if len(header) == _HEADER.size and not header.startswith(_MAGIC):
            raise OSError("it is not a spool of this version")
        spool = Spool(path, descriptor, limit_bytes)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    if spool.dropped_bytes:
        logger.warning("%s: %d bytes at its end were not whole records and are dropped", path, spool.dropped_bytes)
    return spool


def _frame(item: PricedUsage) -> bytes:
    payload = _encode(item)
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _parse(buffer: bytes, offset: int) -> tuple[PricedUsage | None, int]:
    """The record at `offset` and the length of its frame; None when `buffer` has no whole record there."""
    if len(buffer) - offset < _FRAME.size:
        return None, 0
    length, checksum = _FRAME.unpack_from(buffer, offset)
    payload = buffer[offset + _FRAME.size : offset + _FRAME.size + length]
    if not 0 < length <= _LONGEST_PAYLOAD or len(payload) < length or zlib.crc32(payload) != checksum:
        return None, 0
    try:
        return _decode(payload), _FRAME.size + length
    except msgspec.DecodeError:
        return None, 0
