"""Names of the methods that scripts/bench_train.py measures; no matplotlib, so that it measures none."""

from __future__ import annotations

# The paper's unit of cost. In LAVIS's own model first: that is how its UniAdapter ran.
UNITS = ("lavis-uniadapter-512", "uniadapter-512")
NAMES = {"uniadapter": "UniAdapter", "aurora": "Aurora", "lora": "LoRA"}


def method_name(method: str) -> str:
    """A method of the benchmark program, as the paper writes it.

    >>> method_name("lavis-uniadapter-512")
    "UniAdapter (r=512), LAVIS's own"
    """
    if method == "frozen-flow":
        return "frozen, gradients flow"
    if method.startswith("lavis-"):
        return f"{method_name(method[len('lavis-') :])}, LAVIS's own"
    kind, _, rank = method.rpartition("-")
    return f"{NAMES[kind]} (r={rank})" if kind in NAMES else method
