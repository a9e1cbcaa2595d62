"""Ranks on two machines, which here are two network namespaces with a cable between them. Needs the right to make those."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.execution.runner.rank_join import KEY_VARIABLE

PROMPTS = ["Once upon a time", "The little dog", "One day, a girl named"]
SETTINGS: dict[str, Any] = {"threads": 1, "kv_cache_gib": 0.05, "device": "cpu"}
SAMPLING = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
ENGINE = """
import json, logging, sys
from penstock import LLM, SamplingParams
logging.basicConfig(level="INFO")
prompts, settings = json.loads(sys.argv[1])
with LLM("stories", **settings) as llm:
    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    print(json.dumps([result.outputs[0].token_ids for result in results]))
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Machine:
    """A network namespace with an address of its own."""

    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *arguments]


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    tag = f"{os.getpid() % 100_000}"
    here, there = Machine(f"pst-a{tag}", "10.231.77.1"), Machine(f"pst-b{tag}", "10.231.77.2")
    try:
        try:
            ip("netns", "add", here.name)
            ip("netns", "add", there.name)
            ip(
                "link",
                "add",
                f"va{tag}",
                "netns",
                here.name,
                "type",
                "veth",
                "peer",
                "name",
                f"vb{tag}",
                "netns",
                there.name,
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for machine, link in ((here, f"va{tag}"), (there, f"vb{tag}")):
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", link)
            ip("-n", machine.name, "link", "set", link, "up")
            ip("-n", machine.name, "link", "set", "lo", "up")
        yield here, there
    finally:
        for machine in (here, there):
            subprocess.run(["ip", "netns", "del", machine.name], check=False, capture_output=True)


@contextlib.contextmanager
def worker(machine: Machine, join: str, log: Path, key: str) -> Iterator[subprocess.Popen[bytes]]:
    command = machine.command(sys.executable, "-m", "penstock.cli.main", "worker", "--join", join)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {KEY_VARIABLE: key})
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)


def run_engine(machine: Machine, key: str, **settings: Any) -> list[list[int]]:
    argument = json.dumps([PROMPTS, SETTINGS | settings])
    finished = subprocess.run(
        machine.command(sys.executable, "-c", ENGINE, argument),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {KEY_VARIABLE: key},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    tokens: list[list[int]] = json.loads(finished.stdout.splitlines()[-1])
    return tokens


@pytest.mark.slow
def test_one_worker_serves_one_engine_after_the_other(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    here, there = machines
    with LLM("stories", **SETTINGS) as llm:
        expected = [result.outputs[0].token_ids for result in llm.generate(PROMPTS, SAMPLING)]
    join, log, key = f"{here.address}:29571", tmp_path / "worker", "a key that both sides know"
    with worker(there, join, log, key) as process:
        for parallelism in ({"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}):
            tokens = run_engine(here, key, worker_address=join, local_ranks=1, **parallelism)
            assert tokens == expected
        assert process.poll() is None, "it waits for the next engine"
    assert process.returncode == 0
    assert log.read_text().count("has joined") == 2


@pytest.mark.slow
def test_a_worker_with_another_key_ends_with_one_line(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    here, there = machines
    join, log = f"{here.address}:29572", tmp_path / "worker"
    settings = json.dumps([PROMPTS, SETTINGS | {"tensor_parallel_size": 2, "local_ranks": 1, "worker_address": join}])
    engine = subprocess.Popen(
        here.command(sys.executable, "-c", ENGINE, settings),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {KEY_VARIABLE: "the engine's own key"},
    )
    try:
        with worker(there, join, log, "a worker's other key") as process:
            assert process.wait(60) == 2
        assert log.read_text().splitlines()[-1] == (
            f"penstock: error: the engine at {join} has another {KEY_VARIABLE}; give both sides the same."
        )
        assert engine.stderr is not None
        said = iter(engine.stderr.readline, "")
        assert any(f"a worker at {there.address} did not join: it has another {KEY_VARIABLE}" in line for line in said)
    finally:
        engine.kill()
        engine.communicate()
