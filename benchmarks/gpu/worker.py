"""The process that measures: its own for every group of cases, so that one that dies takes only itself along.

The driver sends the name of a case, the worker answers ("data", {...}) or ("error", text), until None comes. An error that leaves the GPU
unusable for this process is answered as ("broken", text), and the process ends.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.case import Case, Context, Plan

if TYPE_CHECKING:
    from penstock.execution.measurement.gpu_card import GPUCeilings

MOST_ERROR_TEXT = 2000


def work(connection: Connection, plan: Plan, ceilings: GPUCeilings | None) -> None:
    """Answer until told to stop."""
    if plan.tiny:
        # Read when kernels are defined, so before anything imports them.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from benchmarks.gpu.sections import all_cases

    context = Context(plan, ceilings)
    cases = {case.key: case for case in all_cases(plan)}
    try:
        while (key := connection.recv()) is not None:
            kind, content = answer(cases[key], context)
            connection.send((kind, content))
            if kind == "broken":
                break
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        release(context)
        connection.close()


def answer(case: Case, context: Context) -> tuple[str, Any]:
    """Measure one case."""
    from benchmarks.gpu.records import as_json

    try:
        return "data", as_json(case.measure(context))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        text = f"{type(error).__name__}: {error}"[:MOST_ERROR_TEXT]
        del error
        release(context)
        return ("error" if _usable(context) else "broken"), text


def release(context: Context) -> None:
    """Shut down what cases have kept, and give memory back."""
    for name in list(context.kept):
        close = getattr(context.kept.pop(name), "shutdown", None)
        if close is not None:
            try:
                close()
            except Exception:
                traceback.print_exc(file=sys.stderr)
    gc.collect()


def _usable(context: Context) -> bool:
    """Whether the GPU still does what it is told: after an illegal access nothing works in this process any more."""
    if not context.plan.device.startswith("cuda"):
        return True
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device=context.plan.device).item() == 1)
    except Exception:
        return False
