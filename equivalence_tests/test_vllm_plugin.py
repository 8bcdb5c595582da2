# pyright: reportMissingImports=false
"""The plugin in a real vLLM: what is put in place, what is refused, how balance scheduling is chosen.

Needs vLLM 0.17.0 or 0.32.0 (`tox run -e vllm017`, `tox run -e vllm032`). Else test_vllm_settings.py runs.
"""

import importlib
import json
import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed

from ascend_twin.equivalence_tests.installed_vllm import child_environment, prepare_import, version
from ascend_twin.optimized.vllm import plugin
from ascend_twin.reference.errors import (
    AscendTwinError,
    InvalidArgumentError,
    LockstepError,
    UnavailableError,
)

pytestmark = pytest.mark.vllm

OURS = "ascend_twin.optimized.vllm.BalanceScheduler"
NO_GDN_LAYER = "0.17.0"  # has no layer that can be replaced, and no kernel for a CPU


@pytest.fixture(scope="module")
def modules() -> SimpleNamespace:
    """Modules of the plugin, which is in place, and of vLLM."""
    prepare_import()
    plugin.register()
    names = {
        "core": "vllm.v1.engine.core",
        "loggers": "vllm.v1.metrics.loggers",
        "stats": "vllm.v1.metrics.stats",
        **{
            name: f"ascend_twin.optimized.vllm.{name}"
            for name in (
                "admission_gate",
                "balance",
                "balance_metrics",
                "engine_hook",
                "refusals",
                "scheduler_choice",
            )
        },
    }
    return SimpleNamespace(**{name: importlib.import_module(path) for name, path in names.items()})


# What is put in place


def test_everything_is_in_place_that_this_vllm_allows(modules: SimpleNamespace) -> None:
    off = {concern for concern, why_off in plugin.status().items() if why_off}
    assert off == ({"GDN layer"} if version() == NO_GDN_LAYER else set())
    assert modules.engine_hook.is_installed()


def test_registering_twice_wraps_nothing_twice(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_status", {})
    before = (
        modules.core.DPEngineCoreProc._has_global_unfinished_reqs,
        modules.loggers.PrometheusStatLogger.record,
    )
    plugin.register()
    after = (
        modules.core.DPEngineCoreProc._has_global_unfinished_reqs,
        modules.loggers.PrometheusStatLogger.record,
    )
    assert after == before
    for function in after:
        assert not hasattr(function.__wrapped__, "__wrapped__")


def test_an_unknown_vllm_gets_one_warning_that_names_what_is_off(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_status", {})
    monkeypatch.delattr(modules.core.DPEngineCoreProc, "_has_global_unfinished_reqs")
    said: list[str] = []
    logger = logging.getLogger(f"vllm.{plugin.__name__}")
    monkeypatch.setattr(logger, "warning", lambda message, *values: said.append(message % values))
    plugin.register()
    plugin.register()
    assert len(said) == 1
    assert "gather in the engine (vLLM has no DPEngineCoreProc._has_global_unfinished_reqs)" in said[0]
    assert "closing admission" not in said[0]
    assert str(version()) in said[0]


@pytest.mark.parametrize("variable", ["ASCEND_TWIN_CHEK", "ASCEND_TWIN_RECORD_WHEN"])
def test_registering_names_variables_that_change_nothing(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setattr(plugin, "_status", {})
    monkeypatch.setenv(variable, "mismatch")
    said: list[str] = []
    logger = logging.getLogger(f"vllm.{plugin.__name__}")
    monkeypatch.setattr(logger, "warning", lambda message, *values: said.append(message % values))
    plugin.register()
    plugin.register()
    (line,) = said
    assert line.startswith(f"Environment variables change nothing: {variable}: ")


def test_registering_refuses_variables_that_are_wrong_where_recordings_are_asked_for(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_status", {})
    monkeypatch.setenv("ASCEND_TWIN_CHECK", "1/7")
    monkeypatch.setenv("ASCEND_TWIN_RECORDS", "somewhere")
    with pytest.raises(InvalidArgumentError, match="ASCEND_TWIN_RECORDS"):
        plugin.register()
    assert plugin.status() == {}


def test_ranks_without_a_store_in_common_are_left_alone(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = modules.core.DPEngineCoreProc
    plain = kind._has_global_unfinished_reqs.__wrapped__
    monkeypatch.setattr(kind, "_has_global_unfinished_reqs", plain)
    monkeypatch.setattr(kind, "_init_data_parallel", lambda engine, vllm_config: None)
    with pytest.raises(UnavailableError, match="no dp_store"):
        modules.engine_hook.install()
    assert kind._has_global_unfinished_reqs is plain


def with_plugins(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which vLLM has loaded its plugins."""
    return subprocess.run(
        [sys.executable, "-c", f"import vllm.plugins; vllm.plugins.load_general_plugins(); {code}"],
        env=child_environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_tested_vllm_gets_no_warning(tmp_path: Path) -> None:
    run = with_plugins(tmp_path, "print('loaded')")
    assert "loaded" in run.stdout, run.stderr
    assert "ascend-twin is tested" not in run.stdout + run.stderr


def test_registering_asks_no_device(tmp_path: Path) -> None:
    """These modules of vLLM do, when they are imported; a process that did cannot be forked."""
    code = (
        "import sys; from ascend_twin.optimized.vllm import plugin; assert plugin.status(); "
        "print([name for name in sys.modules if 'flash_linear_attention' in name or 'gdn_linear' in name])"
    )
    run = with_plugins(tmp_path, code)
    assert run.stdout.splitlines()[-1:] == ["[]"], run.stdout + run.stderr


def test_doctor_tells_what_is_active(tmp_path: Path) -> None:
    environment = child_environment(tmp_path)
    command = [sys.executable, "-c", "from ascend_twin.cli.main import app; app()", "doctor", "--json"]
    runs = [
        subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, timeout=300, check=True
        )
        for more in ({"VLLM_ASCEND_BALANCE_SCHEDULING": "1"}, {"VLLM_PLUGINS": "other"})
    ]
    loaded, left_out = (json.loads(run.stdout)["vllm_plugin"] for run in runs)
    assert loaded["vllm"] == version()
    assert loaded["not_loaded"] is None
    assert loaded["concerns"] == plugin.status()
    assert loaded["balance"] == "on, by VLLM_ASCEND_BALANCE_SCHEDULING, policy any_rank_at_cap"
    assert "VLLM_PLUGINS is 'other'" in left_out["not_loaded"]


def test_gate_is_found_by_what_schedule_reads(modules: SimpleNamespace) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    name, _ = modules.admission_gate.find_gate(Scheduler.schedule)
    assert name == ("max_num_running_reqs" if version() == "0.17.0" else "max_num_active_reqs")
    with pytest.raises(UnavailableError, match="reads none of max_num_active_reqs, max_num_running_reqs"):
        modules.admission_gate.find_gate(lambda scheduler: scheduler.waiting)


# How it is chosen


CHOICES = [
    # variable, additional config, --scheduler-cls: the class that vLLM is given
    (None, {}, None, None),
    ("0", {}, None, None),
    ("", {}, None, None),
    ("false", {}, None, None),
    ("1", {}, None, OURS),
    ("1", {"balance": False}, None, None),
    ("0", {"balance": True}, None, OURS),
    (None, {"balance": {"policy": "patient"}}, None, OURS),
    ("1", {}, "my.Scheduler", "my.Scheduler"),
    ("0", {}, OURS, OURS),
    (None, {"balance": True}, OURS, OURS),
]


@pytest.mark.parametrize(("variable", "given", "scheduler_cls", "expected"), CHOICES)
def test_choice_of_the_scheduler(
    modules: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    given: dict[str, Any],
    scheduler_cls: str | None,
    expected: str | None,
) -> None:
    monkeypatch.delenv("VLLM_ASCEND_BALANCE_SCHEDULING", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_ASCEND_BALANCE_SCHEDULING", variable)
    arguments = SimpleNamespace(additional_config={"ascend_twin": given}, scheduler_cls=scheduler_cls)
    modules.scheduler_choice.choose(arguments)
    assert arguments.scheduler_cls == expected


def test_two_choices_that_contradict_each_other_are_refused(modules: SimpleNamespace) -> None:
    arguments = SimpleNamespace(
        additional_config={"ascend_twin": {"balance": True}}, scheduler_cls="my.Scheduler"
    )
    with pytest.raises(InvalidArgumentError, match=r"scheduler_cls is 'my.Scheduler', and additional_config"):
        modules.scheduler_choice.choose(arguments)


def test_the_variable_is_left_to_vllm_ascend_where_it_has_taken_over(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "balance_gather", print, raising=False)
    monkeypatch.setenv("VLLM_ASCEND_BALANCE_SCHEDULING", "1")
    arguments = SimpleNamespace(additional_config={}, scheduler_cls=None)
    assert not modules.scheduler_choice.choose(arguments)
    with pytest.raises(UnavailableError, match="vllm-ascend's own balance scheduling is active: unset"):
        modules.refusals.refuse_what_cannot_be_served(configuration())


def test_engine_arguments_make_the_choice(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from ascend_twin.equivalence_tests import vllm_stub

    vllm_stub.register_model()
    model = str(vllm_stub.write_model(tmp_path / "model"))
    monkeypatch.setenv("VLLM_ASCEND_BALANCE_SCHEDULING", "1")

    def config(**given: Any) -> Any:
        arguments = {"model": model, "skip_tokenizer_init": True, "enforce_eager": True, **given}
        return EngineArgs(**arguments).create_engine_config()

    assert config().scheduler_config.get_scheduler_cls() is modules.balance.BalanceScheduler
    off = config(additional_config={"ascend_twin": {"balance": False}})
    assert off.scheduler_config.scheduler_cls is None
    with pytest.raises(InvalidArgumentError, match="policy is 'best'; allowed: one of open_gate"):
        config(additional_config={"ascend_twin": {"balance": {"policy": "best"}}})
    near_cap = {"ascend_twin": {"balance": {"policy": "any_rank_near_cap"}}}
    with pytest.raises(InvalidArgumentError, match=r"^--max-num-seqs 1, balance policy any_rank_near_cap"):
        config(additional_config=near_cap, max_num_seqs=1)
    with pytest.raises(InvalidArgumentError, match=r'\["balance"\] is false; allowed: true with this'):
        config(additional_config={"ascend_twin": {"balance": False}}, scheduler_cls=OURS)
    if version() != NO_GDN_LAYER:
        with pytest.raises(
            InvalidArgumentError, match=r"is 'eager'; allowed: none with .*model, which has no"
        ):
            config(additional_config={"ascend_twin": {"gdn": {"core": "eager"}}})


def test_what_is_asked_for_and_cannot_be_had_is_refused(modules: SimpleNamespace) -> None:
    refuse = modules.scheduler_choice.refuse_what_is_off
    status = {"balance scheduling: metrics": "no logger", "GDN layer": "no layer", "GDN metadata": "none"}
    refuse(SimpleNamespace(balance=None, gdn_core=None), status)
    with pytest.raises(UnavailableError, match=r"^balance scheduling: metrics is asked for.*: no logger"):
        refuse(SimpleNamespace(balance=True, gdn_core=None), status)
    with pytest.raises(UnavailableError, match=r"^GDN layer is asked for.*: no layer"):
        refuse(SimpleNamespace(balance=None, gdn_core="eager"), status)


# What is refused


def configuration(**changed: Any) -> SimpleNamespace:
    """What is looked at of a VllmConfig, with `part__name=value` changed."""
    parts: dict[str, Any] = {
        "parallel_config": SimpleNamespace(data_parallel_size=2, data_parallel_rank=0),
        "scheduler_config": SimpleNamespace(async_scheduling=False, max_num_seqs=8),
        "model_config": SimpleNamespace(),
        "kv_transfer_config": None,
        "additional_config": {},
    }
    for place, value in changed.items():
        part, _, name = place.partition("__")
        parts[part] = SimpleNamespace(**{**vars(parts[part] or SimpleNamespace()), name: value})
    return SimpleNamespace(**parts)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parallel_config__enable_elastic_ep": True}, "^enable_elastic_ep is True"),
        ({"parallel_config__enable_fault_tolerance": True}, "^enable_fault_tolerance is True"),
        (
            {"scheduler_config__prefill_schedule_interval": 4},
            "^prefill_schedule_interval is 4.*cadence:interval=4",
        ),
        ({"model_config__is_diffusion": True}, "is_diffusion is True"),
        ({"kv_transfer_config__kv_role": "kv_producer"}, "^kv_role is kv_producer; allowed: kv_both"),
        ({"kv_transfer_config__kv_role": "kv_consumer"}, "^kv_role is kv_consumer; allowed: kv_both"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    modules: SimpleNamespace, changed: dict[str, Any], said: str
) -> None:
    modules.refusals.refuse_what_cannot_be_served(configuration())
    with pytest.raises(InvalidArgumentError, match=said):
        modules.balance.BalanceScheduler(configuration(**changed))


def test_several_ranks_without_the_hook_are_refused(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = modules.core.DPEngineCoreProc
    monkeypatch.setattr(kind, "_has_global_unfinished_reqs", kind._has_global_unfinished_reqs.__wrapped__)
    with pytest.raises(
        UnavailableError, match=r"data_parallel_size = 2 needs the plugin ascend_twin.*VLLM_PLUGINS"
    ):
        modules.balance.BalanceScheduler(configuration())
    modules.refusals.refuse_what_cannot_be_served(configuration(parallel_config__data_parallel_size=1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"balance": False}, r'\["balance"\] is false; allowed: true with this --scheduler-cls'),
        ({"balance": {"policy": "any"}}, r'\["policy"\]: policy is .any.'),
    ],
)
def test_settings_are_read_before_anything_is_made(
    modules: SimpleNamespace, given: dict[str, Any], said: str
) -> None:
    config = configuration()
    config.additional_config = {"ascend_twin": given}
    with pytest.raises(InvalidArgumentError, match=said):
        modules.balance.BalanceScheduler(config)


# The ranks agree before they gather


class Engine:
    """What the hook looks at of an engine."""

    def __init__(self, store: Any, rank: int, scheduler: Any) -> None:
        self.dp_store, self.dp_rank, self.scheduler = store, rank, scheduler


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, modules: SimpleNamespace) -> Any:
    monkeypatch.setattr(modules.engine_hook, "_QUIET_WAIT", timedelta(seconds=0.1))
    monkeypatch.setattr(modules.engine_hook, "_LONGEST_WAIT", timedelta(seconds=0.2))
    return torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def test_ranks_that_are_balanced_alike_agree(modules: SimpleNamespace, store: Any) -> None:
    store.set("ascend_twin/balance/1", json.dumps("AnyRankAtCap(4)"))
    modules.engine_hook._agree(Engine(store, 0, SimpleNamespace(dp_size=2)), "AnyRankAtCap(4)")


@pytest.mark.parametrize("other", ["off", "AnyRankAtCap(8)"])
def test_ranks_that_are_not_balanced_alike_are_refused(
    modules: SimpleNamespace, store: Any, other: str
) -> None:
    modules.engine_hook._agree(Engine(store, 1, SimpleNamespace(dp_size=2)), "off")
    store.set("ascend_twin/balance/1", json.dumps(other))
    with pytest.raises(LockstepError) as error:
        modules.engine_hook._agree(Engine(store, 0, SimpleNamespace(dp_size=2)), "AnyRankAtCap(4)")
    assert str(error.value).startswith(
        f"balance scheduling is AnyRankAtCap(4) on rank 0, and {other} on rank 1"
    )


def test_a_rank_without_the_plugin_is_named(
    modules: SimpleNamespace, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        modules.engine_hook._logger, "warning", lambda text, *values: said.append(text % values)
    )
    with pytest.raises(LockstepError, match=r"within 0:00:00\.2\d* how rank 1 is balanced: is the plugin"):
        modules.engine_hook._agree(Engine(store, 0, SimpleNamespace(dp_size=2)), "AnyRankAtCap(4)")
    assert len(said) == 1
    assert "how rank 1 is balanced" in said[0]


def test_an_engine_without_balance_scheduling_gathers_nothing(modules: SimpleNamespace, store: Any) -> None:
    engine = Engine(store, 0, object())
    for _ in range(2):
        modules.engine_hook.gather(engine)
    assert json.loads(store.get("ascend_twin/balance/0")) == "off"


# Metrics


def test_figures_are_carried_over_and_each_is_counted_once(modules: SimpleNamespace) -> None:
    import prometheus_client
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    metrics = modules.balance_metrics
    logger = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(served_model_name="model-of-a-test"))
    )
    record = metrics._exporting(lambda logger, scheduler_stats, iteration_stats, engine_idx=0: None)
    labels = {"model_name": "model-of-a-test", "engine": "1"}
    scheduler = SimpleNamespace(num_frozen_steps=2, gather_seconds=0.5, frozen_request_seconds=1.5)
    for gathers in (3, 7):
        scheduler.num_gathers = gathers
        stats = modules.stats.SchedulerStats()
        metrics.attach(stats, scheduler)
        sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
        received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
        record(logger, received, None, engine_idx=1)
        value = prometheus_client.REGISTRY.get_sample_value("ascend_twin:balance_gathers_total", labels)
        assert value == gathers
    for name, expected in (
        ("frozen_steps", 2),
        ("gather_seconds", 0.5),
        ("frozen_request_seconds", 1.5),
    ):
        assert (
            prometheus_client.REGISTRY.get_sample_value(f"ascend_twin:balance_{name}_total", labels)
            == expected
        )
    record(logger, None, None)
    record(logger, modules.stats.SchedulerStats(), None)


def test_errors_of_the_plugin_have_the_base_class_of_all() -> None:
    assert issubclass(LockstepError, AscendTwinError)
