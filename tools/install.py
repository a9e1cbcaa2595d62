"""Create a virtual environment and install Penstock into it. Needs Python 3.11 and nothing else.

    python3 tools/install.py [--venv .venv] [--extras server,dev]

What pip would install is asked first (a dry run), so that the download is named before it starts and a machine without an NVIDIA GPU
gets torch's CPU build (about 200 MB) instead of the CUDA build (some GB). Versions come from constraints.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MINIMUM_PYTHON = (3, 11)
PIP_FLAGS = ["--disable-pip-version-check", "--no-input"]


class InstallError(Exception):
    """The installation cannot go on; the message is one line with the fix."""


@dataclass(frozen=True)
class Package:
    """A package that pip would install, and where it would come from."""

    name: str
    version: str
    url: str


@dataclass(frozen=True)
class Plan:
    """What one pip command would install: its arguments, and the packages that are not there yet."""

    arguments: list[str]
    packages: list[Package]

    @property
    def torch_version(self) -> str | None:
        return next((package.version for package in self.packages if package.name == "torch"), None)

    @property
    def pulls_cuda(self) -> bool:
        return any(package.name.startswith(("nvidia-", "cuda-")) for package in self.packages)

    @property
    def downloads(self) -> list[Package]:
        return [package for package in self.packages if not is_local_folder(package.url)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Create a virtual environment and install Penstock into it.")
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="folder of the virtual environment")
    parser.add_argument(
        "--extras", default="server", help="comma-separated extras of pyproject.toml, such as server,dev"
    )
    options = parser.parse_args()
    try:
        check_python()
        python = create_venv(os.path.abspath(options.venv))
        install(python, options.extras)
    except InstallError as error:
        print("install: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def check_python() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        raise InstallError(
            f"Python 3.11 or newer is needed, this is {found} ({sys.executable}); "
            "name a newer one: make install PYTHON=python3.12"
        )


def create_venv(folder: str) -> str:
    """The interpreter of the virtual environment in `folder`, created when it is not there or does not run."""
    python = os.path.join(folder, "bin", "python")
    if os.path.exists(python) and run([python, "-m", "pip", "--version"]).returncode == 0:
        return python
    check_venv_module()
    say(f"creating {os.path.relpath(folder)} (Python {'.'.join(map(str, sys.version_info[:3]))})")
    made = run([sys.executable, "-m", "venv", "--clear", folder])
    if made.returncode != 0:
        raise InstallError(f"cannot create {folder}: {last_line(made.stderr or made.stdout)}")
    return python


def check_venv_module() -> None:
    """Debian and Ubuntu ship Python without the modules that make virtual environments."""
    missing = [module for module in ("venv", "ensurepip") if importlib.util.find_spec(module) is None]
    if missing:
        version = ".".join(map(str, sys.version_info[:2]))
        raise InstallError(
            f"Python's {missing[0]} module is missing; on Debian and Ubuntu run `sudo apt install python{version}-venv` "
            "and try again"
        )


def install(python: str, extras: str) -> None:
    base = ["-e", f"{ROOT}[{extras}]" if extras else ROOT, "-c", CONSTRAINTS]
    gpu = find_gpu()
    say(f"asking pip what is needed ({gpu or 'no NVIDIA GPU found'})")
    plan = choose_plan(python, base, gpu)
    announce(plan, gpu)
    # On a terminal pip shows its progress bars; in a log only its errors.
    verbosity = [] if sys.stdout.isatty() else ["-qq"]
    result = subprocess.run([python, "-m", "pip", "install", *verbosity, *PIP_FLAGS, *plan.arguments], check=False)
    if result.returncode != 0:
        raise InstallError("pip failed (its message is above); check the network and run the same command again")
    say(f"done: {os.path.relpath(os.path.join(os.path.dirname(python), 'penstock'))}")


def choose_plan(python: str, base: list[str], gpu: str | None) -> Plan:
    """The default packages, unless they bring CUDA to a machine without a GPU and the CPU build can be had."""
    plan = dry_run(python, base)
    if gpu or not plan.pulls_cuda or plan.torch_version is None:
        return plan
    version = plan.torch_version.partition("+")[0]
    try:
        return dry_run(python, [*base, f"torch=={version}+cpu", "--extra-index-url", CPU_INDEX])
    except InstallError as error:
        say(f"torch's CPU build cannot be had from {CPU_INDEX}: {error}")
        say("taking the CUDA build, which runs on a CPU as well")
        return plan


def dry_run(python: str, arguments: list[str]) -> Plan:
    """Ask pip what `arguments` would install."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "report.json")
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", *PIP_FLAGS, "--report", path, *arguments]
        result = run(command)
        if result.returncode != 0:
            raise InstallError(f"pip cannot resolve the packages: {last_line(result.stderr)}")
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    packages = []
    for item in report["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        packages.append(Package(name, item["metadata"]["version"], item["download_info"]["url"]))
    return Plan(arguments, packages)


def announce(plan: Plan, gpu: str | None) -> None:
    """Say which torch comes and how much is downloaded, before it is."""
    if plan.torch_version is None:
        say("torch is installed already")
    else:
        say(f"torch {plan.torch_version}, {'CUDA' if plan.pulls_cuda else 'CPU'} build")
        if gpu and not plan.pulls_cuda:
            say("note: this torch cannot use the GPU; pip is configured to find a CPU build first")
    if plan.downloads:
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(size_of, [package.url for package in plan.downloads]))
        known = sum(size for size in sizes if size is not None)
        unknown = f", and {sizes.count(None)} of unknown size" if None in sizes else ""
        say(f"{len(sizes)} packages to get, {known / 1e6:.0f} MB{unknown}")


def find_gpu() -> str | None:
    """The name of the first NVIDIA GPU, None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    result = run([program, "--query-gpu=name", "--format=csv,noheader"])
    names = result.stdout.strip().splitlines()
    return names[0].strip() if result.returncode == 0 and names else None


def size_of(url: str) -> int | None:
    """Bytes behind a file or HTTP URL, None when it cannot be asked."""
    parts = urllib.parse.urlsplit(url)
    try:
        if parts.scheme == "file":
            return os.path.getsize(urllib.request.url2pathname(parts.path))
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - pip chose the URL and will open it anyway
        with urllib.request.urlopen(request, timeout=15) as response:  # noqa: S310
            length = response.headers.get("Content-Length")
            return int(length) if length else None
    except (OSError, ValueError):
        return None


def is_local_folder(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "file" and os.path.isdir(urllib.request.url2pathname(parts.path))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    """The line of pip's output that says what went wrong."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def say(message: str) -> None:
    print("install: " + message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
