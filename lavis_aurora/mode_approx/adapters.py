"""Several adapters on one backbone: switch, disable, delete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lavis_aurora.errors import AuroraError
from lavis_aurora.mode_approx.adapted import factors_of
from lavis_aurora.mode_approx.companions import switch_companions


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model holds."""
    return factors_of(model).names


def set_adapter(model: nn.Module, name: str) -> None:
    """Let forwards use the adapter ``name``: its factors, its gates and, if it brought any, its heads.

    No number is copied. What is trained stays the same: an adapter that was loaded beside ``default`` is frozen.

    Raises:
        AuroraError: no such adapter, or another one is merged.
    """
    factors = factors_of(model)
    factors.check_name(name)
    factors.check_switch(name)
    factors.active = name
    switch_companions(factors, name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context in which the model is its backbone alone: no update, no gate, the backbone's heads.

    Raises:
        AuroraError: an adapter is merged.
    """
    factors = factors_of(model)
    before = factors.active
    with factors.disabled():
        switch_companions(factors, None)
        try:
            yield
        finally:
            switch_companions(factors, before)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter that is not active.

    Raises:
        AuroraError: no such adapter; it is active, or ``default``, which the model was built with.
    """
    factors = factors_of(model)
    factors.check_name(name)
    if name == "default":
        raise AuroraError("the adapter 'default' belongs to the model and stays; load_adapter replaces its values")
    if name == factors.active or name == factors.merged:
        raise AuroraError(f"the adapter {name!r} is active; set_adapter another one first")
    del factors.sets[name]
    for part in factors.companions.values():
        part.remove(name)
