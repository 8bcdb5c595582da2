# pyright: reportMissingImports=false
"""How balance scheduling is chosen without `--scheduler-cls`: by `--additional-config`, or by a variable."""

import functools
from collections.abc import Mapping
from typing import Any

from ...reference.errors import InvalidArgumentError, UnavailableError, invalid_argument
from . import plugin
from .refusals import ascend_balances, refuse_a_core_without_layers, refuse_what_cannot_be_served
from .settings import BALANCE_VARIABLE, Settings, read_settings

SCHEDULER = "ascend_twin.optimized.vllm.BalanceScheduler"
_MARK = "chooses_for_ascend_twin"


def install() -> None:
    """Wrap `EngineArgs.create_engine_config`, so that vLLM sees the choice as if made on the command line.

    Raises:
        UnavailableError: when the installed vLLM's arguments have no scheduler class or additional config.

    Source: vllm/engine/arg_utils.py, 0.17.0 and 0.32.0.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "create_engine_config", None)
    fields = getattr(EngineArgs, "__dataclass_fields__", {})
    for name in ("scheduler_cls", "additional_config"):
        if original is None or name not in fields:
            raise UnavailableError(f"vLLM's EngineArgs has no create_engine_config() or no {name}")
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(arguments: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_what_is_off(read_settings(arguments.additional_config), plugin.status())
        is_chosen = choose(arguments)
        config = original(arguments, *args, **kwargs)
        chosen = config.scheduler_config.scheduler_cls
        if is_chosen and chosen != SCHEDULER:
            invalid_argument(
                "scheduler_cls", chosen, f"{SCHEDULER} with balance scheduling; something set it"
            )
        if chosen is not None and _is_ours(chosen):
            refuse_what_cannot_be_served(config)
        refuse_a_core_without_layers(config)
        return config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config


def refuse_what_is_off(asked: Settings, status: Mapping[str, str | None]) -> None:
    """Raise UnavailableError for what is asked for by option and is off in this vLLM, by `plugin.status`."""
    for concern, why_off in status.items():
        is_asked = asked.balance if concern.startswith("balance") else asked.gdn_core
        if why_off and is_asked and concern != "GDN metadata":
            raise UnavailableError(f"{concern} is asked for, and this vLLM does not allow it: {why_off}")


def choose(arguments: Any) -> bool:
    """Set the scheduler class of `EngineArgs` when balance scheduling is asked for; whether it was set.

    `--scheduler-cls` goes before additional-config, and that before the environment. vllm-ascend reads the
    same variable: where its own balance scheduling has taken over, the variable is left to it.

    Raises:
        InvalidArgumentError: for wrong settings, or when additional-config asks for balance scheduling and
            `--scheduler-cls` is another class.
    """
    asked = read_settings(arguments.additional_config)
    if not asked.balance:
        return False
    is_variable = asked.balance_from == BALANCE_VARIABLE
    if arguments.scheduler_cls is not None:
        if not is_variable and not _is_ours(arguments.scheduler_cls):
            raise InvalidArgumentError(
                f"scheduler_cls is {arguments.scheduler_cls!r}, and {asked.balance_from} asks for balance "
                f"scheduling; allowed: {SCHEDULER}, or one of the two"
            )
        return False
    if is_variable and ascend_balances():
        return False
    arguments.scheduler_cls = SCHEDULER
    return True


def _is_ours(scheduler_cls: Any) -> bool:
    name = scheduler_cls if isinstance(scheduler_cls, str) else scheduler_cls.__module__
    return name.startswith(__package__ or "")
