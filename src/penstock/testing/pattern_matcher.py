"""A small grammar for tests: an automaton over token ids, with as many states back as it has taken tokens."""

from __future__ import annotations

from collections.abc import Mapping


class PatternMatcher:
    """A penstock.engine.grammar.Matcher. `transitions[state][token_id]` is the state after a token; state 0 is the first, and a state
    without transitions is the end. What the protocol forbids its callers raises AssertionError."""

    def __init__(self, transitions: Mapping[int, Mapping[int, int]], vocab_size: int) -> None:
        self._transitions = transitions
        self._states = [0]
        self._masks = {state: _mask(allowed, vocab_size) for state, allowed in transitions.items()}

    @property
    def num_accepted(self) -> int:
        return len(self._states) - 1

    @property
    def is_finished(self) -> bool:
        return not self._transitions.get(self._states[-1])

    def mask(self) -> bytes:
        if self.is_finished:
            raise AssertionError("a finished matcher was asked for a mask")
        return self._masks[self._states[-1]]

    def accept(self, token_id: int) -> bool:
        target = self._transitions.get(self._states[-1], {}).get(token_id)
        if target is None:
            return False
        self._states.append(target)
        return True

    def rollback(self, count: int) -> None:
        if not 0 <= count < len(self._states):
            raise AssertionError(f"{count} tokens rolled back of {self.num_accepted}")
        del self._states[len(self._states) - count :]


def allowed_tokens(mask: bytes) -> list[int]:
    """The token ids of a mask, ascending."""
    return [8 * index + bit for index, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def scattered_pattern(vocab_size: int, num_states: int = 5, eos_token_id: int = 0) -> dict[int, dict[int, int]]:
    """Transitions whose states depend on every token before them: each state allows about a third of the tokens, and the last one also
    the end."""
    end = num_states
    transitions: dict[int, dict[int, int]] = {end: {}}
    for state in range(num_states):
        tokens = (token for token in range(vocab_size) if token != eos_token_id and (token + state) % 3 == 0)
        transitions[state] = {token: (3 * state + token // 3 + 1) % num_states for token in tokens}
    transitions[num_states - 1][eos_token_id] = end
    return transitions


def _mask(allowed: Mapping[int, int], vocab_size: int) -> bytes:
    mask = bytearray(-(-vocab_size // 8))
    for token_id in allowed:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)
