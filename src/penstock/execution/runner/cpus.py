"""Which cores the engine computes on, and how many threads that makes.

Two threads of one core share its arithmetic units: a thread beside another one multiplies nothing more, but has to be waited for. So the
default is one thread per physical core among the CPUs that this process may use, within its container's quota.

On machines with several NUMA nodes, an engine bound to the CPUs of one node (`--cpus`) has its weights there too: memory belongs to the
node whose thread writes it first.
"""

from __future__ import annotations

import os
from pathlib import Path

from penstock.core.errors import ConfigError

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """Physical cores that this process may use: its affinity mask and its container's quota."""
    cores = len({_siblings(cpu) for cpu in _allowed_cpus()})
    if _CGROUP_QUOTA.is_file():
        limit, period = _CGROUP_QUOTA.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def bind_to_cpus(cpus: str, part: int = 0, parts: int = 1) -> None:
    """Let this thread, and those that it starts from now on, run on `cpus` only ('0-7,16'); all allowed ones for ''. Of several processes
    that divide them evenly each gets its `part`, or, when there are more processes than CPUs, one that it shares.

    Raises ConfigError when the list is malformed, names a CPU that this process may not use, or this system cannot bind.
    """
    if not cpus:
        return
    wanted = parse_cpus(cpus)
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--cpus: this system cannot bind a process to CPUs; drop it.")
    allowed = _allowed_cpus()
    if foreign := sorted(wanted - allowed):
        usable = ", ".join(map(str, sorted(allowed)))
        raise ConfigError(f"--cpus {cpus}: this process may not use CPU {foreign[0]}; it may use {usable}.")
    os.sched_setaffinity(0, divide_cpus(wanted, part, parts))


def divide_cpus(cpus: set[int], part: int, parts: int) -> set[int]:
    """The CPUs of process `part` of `parts`: neighbours, because those are near each other."""
    ordered = sorted(cpus)
    if parts > len(ordered):
        return {ordered[part % len(ordered)]}
    return set(ordered[part * len(ordered) // parts : (part + 1) * len(ordered) // parts])


def parse_cpus(text: str) -> set[int]:
    """'0-3,8' → {0, 1, 2, 3, 8}. Raises ConfigError."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ConfigError(f"--cpus {text!r}: {part!r} is no CPU number or range; write for example 0-3,8.")
        if int(last or first) >= 65536:
            raise ConfigError(f"--cpus {text!r}: there is no CPU {last or first}.")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The CPUs that share a physical core with `cpu`, as the kernel writes them; `cpu` itself where it does not say."""
    file = Path(_TOPOLOGY.format(cpu))
    return file.read_text().strip() if file.is_file() else str(cpu)
