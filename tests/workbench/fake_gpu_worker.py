"""A worker of benchmarks/gpu that measures nothing: it runs in a process of its own, so it imports little."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from benchmarks.gpu.case import Machine, Plan

from penstock.execution.measurement.gpu_card import GPUCeilings

CEILINGS = {
    "copy_bytes": 4.2e12,
    "read_bytes": 4.3e12,
    "bfloat16": 790e12,
    "float16": 780e12,
    "float8": 1500e12,
    "to_device_bytes": 50e9,
    "to_host_bytes": 50e9,
    "launch_s": 3e-6,
    "graph_launch_s": 1.3e-6,
}
MACHINE = Machine(
    gpu="NVIDIA Test",
    driver="1",
    cuda="13.0",
    memory_gib=139.0,
    multiprocessors=132,
    cpu="x",
    cores=16,
    python="3.12",
    versions={"torch": "2.11"},
)


def fake_work(connection: Connection, plan: Plan, ceilings: GPUCeilings | None) -> None:
    """Answers by the name of the case: this runs in a process of its own."""
    while (key := connection.recv()) is not None:
        name = key.partition("/")[2]
        if key == "ceilings/card":
            machine = {field: getattr(MACHINE, field) for field in MACHINE.__struct_fields__}
            connection.send(("data", {"machine": machine, "ceilings": CEILINGS, "seconds": 0.1}))
        elif name == "dies":
            os._exit(7)
        elif name == "hangs":
            time.sleep(60)
        elif name == "broken":
            connection.send(("broken", "the card is gone"))
            return
        elif name == "fails":
            connection.send(("error", "ValueError: no"))
        else:
            connection.send(("data", {"pid": os.getpid(), "bandwidth": ceilings.bandwidth if ceilings else 0}))


def broken_work(connection: Connection, plan: Plan, ceilings: GPUCeilings | None) -> None:
    connection.recv()
    connection.send(("error", "RuntimeError: no CUDA GPUs are available"))
