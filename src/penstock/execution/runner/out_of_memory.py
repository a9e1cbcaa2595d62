"""Running out of memory: how it shows, what keeps holding memory after it, and who is told what."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from penstock.core.errors import ConfigError
from penstock.execution.runner.accelerator import Accelerator

# In the runtime errors of torch and of the driver.
_WORDS = ("out of memory", "allocate memory", "not enough memory")

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. Beside torch's own class for it there are runtime errors of the driver and of the host's allocator,
    and what is raised while a recording is given up hides the error that ended it."""
    return any(_says_so(each) for each in _chain(error))


def let_go_of_tensors(error: BaseException) -> None:
    """Drop what the failed calls had in hand: a traceback keeps their variables alive, and with them the memory that ran out."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def recover_memory(error: BaseException, accelerator: Accelerator) -> None:
    """After a step ran out of memory: nothing of it stays behind, and the allocator gives back what it keeps, so that the step's requests,
    run again one by one, find all the room there is."""
    let_go_of_tensors(error)
    logger.warning("a step ran out of memory; %s are free without it", mib(accelerator.free_bytes()))


@contextmanager
def memory_must_suffice(explain: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory in the with-block into a ConfigError with what `explain` says afterwards."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        let_go_of_tensors(error)
        raise ConfigError(explain()) from error


def mib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:,.1f} MiB"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)
