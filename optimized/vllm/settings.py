"""What users ask of the plugin: vLLM's `--additional-config`, and an environment variable. No vLLM needed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...reference.errors import InvalidArgumentError, invalid_argument
from ...scheduler.admission import make_policy
from ..gdn.chunked import IMPLEMENTATIONS

BALANCE_VARIABLE = "VLLM_ASCEND_BALANCE_SCHEDULING"
ADDITIONAL_CONFIG = 'additional_config["ascend_twin"]'
DEFAULT_POLICY = "any_rank_at_cap"
GDN_CORES = ("reference", *IMPLEMENTATIONS)

_OFF = ("", "0", "false", "off", "no")
_ON = ("1", "true", "on", "yes")


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        balance: whether balance scheduling is on; None when nobody said anything.
        balance_from: who said so, "" when nobody did: `BALANCE_VARIABLE`, or a part of `ADDITIONAL_CONFIG`.
        policy: an admission policy in the text form of `make_policy`.
        gdn_core: what computes the prefill of gated delta rule layers: "reference", or a name of
            `IMPLEMENTATIONS`; None is vLLM's own.
        gdn_metadata: whether chunk metadata are prebuilt by ours.
    """

    balance: bool | None = None
    balance_from: str = ""
    policy: str = DEFAULT_POLICY
    gdn_core: str | None = None
    gdn_metadata: bool = True


def read_settings(additional_config: object, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings; what `additional_config` says goes before the environment.

    Args:
        additional_config: that of vLLM's configuration. Of a mapping, `["ascend_twin"]` is read: `{"balance":
            true, false or {"policy": "NAME:PARAMETER=INT"}, "gdn": {"core": NAME, "metadata": true or
            false}}`, each optional; an object is on. Anything else is somebody else's.
        environ: where `VLLM_ASCEND_BALANCE_SCHEDULING` is looked up: "1", "true", "on" and "yes" are on; "0",
            "false", "off", "no", an empty value and no value are off.

    Raises:
        InvalidArgumentError: for an unknown key or value, with what is allowed.
    """
    place = ADDITIONAL_CONFIG
    if isinstance(additional_config, Mapping) and "ascend-twin" in additional_config:
        invalid_argument("a key of additional_config", "'ascend-twin'", "'ascend_twin'")
    given = additional_config.get("ascend_twin", {}) if isinstance(additional_config, Mapping) else {}
    _check_keys(place, given, ("balance", "gdn"))
    balance_from = f'{place}["balance"]'
    balance, policy = _balance(balance_from, given.get("balance"))
    if balance is None:
        balance = _switch(environ.get(BALANCE_VARIABLE))
        balance_from = "" if balance is None else BALANCE_VARIABLE
    gdn = given.get("gdn", {})
    _check_keys(f'{place}["gdn"]', gdn, ("core", "metadata"))
    core, metadata = gdn.get("core"), gdn.get("metadata", True)
    if core is not None and core not in GDN_CORES:
        invalid_argument(f'{place}["gdn"]["core"]', repr(core), f"one of {', '.join(GDN_CORES)}")
    if not isinstance(metadata, bool):
        invalid_argument(f'{place}["gdn"]["metadata"]', repr(metadata), "true or false")
    return Settings(balance, balance_from, policy, core, metadata)


def _check_keys(place: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        invalid_argument(place, repr(given), f"an object with {', '.join(known)}")
    for key in given:
        if key not in known:
            invalid_argument(f"a key of {place}", repr(key), f"one of {', '.join(known)}")


def _balance(place: str, given: Any) -> tuple[bool | None, str]:
    """Whether it is on, and the policy."""
    if given is None or isinstance(given, bool):
        return given, DEFAULT_POLICY
    if not isinstance(given, Mapping):
        invalid_argument(place, repr(given), "true, false, or an object with policy")
    _check_keys(place, given, ("policy",))
    policy = given.get("policy", DEFAULT_POLICY)
    try:
        make_policy(policy, max_num_running_reqs=2)  # a cap that all take: the words are checked here
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f'{place}["policy"]: {error}') from error
    return True, policy


def _switch(value: str | None) -> bool | None:
    """An environment variable as a switch; None when it is not set."""
    if value is None:
        return None
    word = value.strip().lower()
    if word not in _OFF + _ON:
        invalid_argument(BALANCE_VARIABLE, repr(value), f"one of {', '.join(_ON)} or {', '.join(_OFF[1:])}")
    return word in _ON
