"""What users ask of the vLLM plugin. Runs without vLLM."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ascend_twin.equivalence_tests.source_mutants import mutated
from ascend_twin.optimized.vllm.settings import BALANCE_VARIABLE, DEFAULT_POLICY, Settings, read_settings
from ascend_twin.reference.errors import InvalidArgumentError

OFF = ("", "0", "false", "False", " 0 ", "off", "no")
ON = ("1", "true", "True", " yes ", "on")


def ours(**given: Any) -> dict[str, Any]:
    return {"ascend_twin": given}


def test_nobody_asked_for_anything() -> None:
    for additional_config in (None, {}, {"refresh": True}, ours(), ours(gdn={}), "an object of somebody's"):
        assert read_settings(additional_config, {}) == Settings()


@pytest.mark.parametrize("value", OFF)
def test_variable_is_off(value: str) -> None:
    settings = read_settings({}, {BALANCE_VARIABLE: value})
    assert (settings.balance, settings.balance_from) == (False, BALANCE_VARIABLE)


@pytest.mark.parametrize("value", ON)
def test_variable_is_on(value: str) -> None:
    settings = read_settings(None, {BALANCE_VARIABLE: value})
    assert (settings.balance, settings.policy) == (True, DEFAULT_POLICY)


def test_variable_is_refused_unless_it_is_clear() -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{BALANCE_VARIABLE} is '2'; allowed: one of 1, true"):
        read_settings(None, {BALANCE_VARIABLE: "2"})


@pytest.mark.parametrize("said", [True, False])
def test_additional_config_goes_before_the_variable(said: bool) -> None:
    settings = read_settings(ours(balance=said), {BALANCE_VARIABLE: "0" if said else "1"})
    assert settings.balance is said
    assert settings.balance_from != BALANCE_VARIABLE


def test_a_policy_switches_on() -> None:
    settings = read_settings(ours(balance={"policy": "cadence:interval=4"}), {BALANCE_VARIABLE: "0"})
    assert (settings.balance, settings.policy) == (True, "cadence:interval=4")
    assert read_settings(ours(balance={}), {}).balance is True


def test_gdn_options() -> None:
    settings = read_settings(ours(gdn={"core": "eager", "metadata": False}), {})
    assert (settings.gdn_core, settings.gdn_metadata, settings.balance) == ("eager", False, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ours(balanced=True), r"^a key of .*ascend_twin.* is 'balanced'; allowed: one of balance, gdn$"),
        (ours(balance="1"), r"\[\"balance\"\] is '1'; allowed: true, false, or an object with policy"),
        ({"ascend-twin": {}}, "^a key of additional_config is 'ascend-twin'; allowed: 'ascend_twin'"),
        (ours(balance={"name": "patient"}), "is 'name'; allowed: one of policy"),
        (
            ours(balance={"policy": "rank_at_cap"}),
            r"^additional_config.*\[\"policy\"\]: policy is 'rank_at_cap'; allowed: one of open_gate",
        ),
        (ours(balance={"policy": 3}), "policy is 3"),
        (ours(gdn={"core": "c++"}), "is 'c\\+\\+'; allowed: one of reference, eager"),
        (ours(gdn={"metadata": 1}), "is 1; allowed: true or false"),
        (ours(gdn=[]), r"is \[\]; allowed: an object with core, metadata"),
        ({"ascend_twin": True}, "is True; allowed: an object with balance, gdn"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(given: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        read_settings(given, {})


class Mutant(NamedTuple):
    name: str
    module: str
    old: str
    new: str


MUTANTS = (
    Mutant("any_value_is_on", "settings", "return word in _ON", "return bool(value)"),
    Mutant("zero_is_on", "settings", '_OFF = ("", "0", ', '_OFF = ("", '),
    Mutant("empty_is_not_set", "settings", "    if value is None:\n", "    if not value:\n"),
    Mutant("variable_goes_first", "settings", "    if balance is None:\n", "    if environ:\n"),
)


def tables(settings: SimpleNamespace) -> None:
    """What the tests above say of the variable."""
    for values, is_on in ((OFF, False), (ON, True)):
        for value in values:
            assert settings.read_settings({}, {BALANCE_VARIABLE: value}).balance is is_on
    assert settings.read_settings(ours(balance=True), {BALANCE_VARIABLE: "0"}).balance is True


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_found(mutant: Mutant) -> None:
    modules = {"settings": "ascend_twin.optimized.vllm.settings"}
    tables(mutated(Mutant("none", "", "", ""), modules)["settings"])
    with pytest.raises((AssertionError, InvalidArgumentError)):
        tables(mutated(mutant, modules)["settings"])


def test_nothing_of_vllm_is_imported_by_the_package_or_its_settings() -> None:
    code = (
        "import sys, ascend_twin.optimized.vllm, ascend_twin.optimized.vllm.settings, "
        "ascend_twin.optimized.vllm.plugin; sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_the_package_has_the_schedulers_and_nothing_else() -> None:
    from ascend_twin.optimized import vllm

    with pytest.raises(AttributeError, match="no attribute 'Scheduler'"):
        vllm.Scheduler  # noqa: B018
