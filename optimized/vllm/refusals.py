# pyright: reportMissingImports=false
"""What cannot be combined with what is asked for: looked for before an engine starts, and when it does."""

from typing import Any

from ...reference.errors import InvalidArgumentError, UnavailableError, invalid_argument
from ...scheduler.admission import make_policy
from . import engine_hook
from .settings import BALANCE_VARIABLE, read_settings


def refuse_what_cannot_be_served(vllm_config: Any) -> None:
    """Raise unless balance scheduling can run with this configuration of vLLM.

    Raises:
        InvalidArgumentError: for settings that are wrong or that contradict the choice of our scheduler, or a
            feature of vLLM that balance scheduling cannot serve.
        UnavailableError: when there are several ranks and the engine hook is not in place, or vllm-ascend's
            own balance scheduling is.
    """
    if ascend_balances():
        raise UnavailableError(
            "vllm-ascend's own balance scheduling is active: unset VLLM_ASCEND_BALANCE_SCHEDULING, and "
            'switch this one on by --additional-config \'{"ascend_twin": {"balance": true}}\''
        )
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.data_parallel_size > 1 and not engine_hook.is_installed():
        raise UnavailableError(
            f"balance scheduling with data_parallel_size = {parallel.data_parallel_size} needs the plugin "
            "ascend_twin, and this process has not loaded it: name it in VLLM_PLUGINS, or unset that"
        )
    settings = read_settings(vllm_config.additional_config)
    if settings.balance is False and settings.balance_from != BALANCE_VARIABLE:
        allowed = "true with this --scheduler-cls, or one of the two"
        invalid_argument(settings.balance_from, "false", allowed)
    cap = getattr(scheduler, "max_num_active_seqs", None) or scheduler.max_num_seqs
    try:
        make_policy(settings.policy, cap)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"--max-num-seqs {cap}, balance policy {settings.policy}: {error}"
        ) from error
    for feature, why in (
        ("enable_elastic_ep", "the ranks must stay"),
        ("enable_fault_tolerance", "a step that is given up leaves the ranks at different gathers"),
    ):
        if getattr(parallel, feature, False):
            invalid_argument(feature, True, f"false with balance scheduling: {why}")
    interval = getattr(scheduler, "prefill_schedule_interval", 1)
    if interval > 1:
        allowed = f"1, or the balance policy cadence:interval={interval}"
        invalid_argument("prefill_schedule_interval", interval, allowed)
    if getattr(vllm_config.model_config, "is_diffusion", False):
        invalid_argument("model_config.is_diffusion", True, "false: diffusion needs a scheduler of its own")
    role = getattr(vllm_config.kv_transfer_config, "kv_role", None)
    if role in ("kv_producer", "kv_consumer"):
        invalid_argument(
            "kv_role", role, "kv_both, or none: whoever only prefills or only decodes has nobody to wait for"
        )


def ascend_balances() -> bool:
    """Whether vllm-ascend's patch has put its own balance scheduler in the place of vLLM's.

    Source: vllm_ascend/patch/platform/patch_balance_schedule.py, 0.18.0.
    """
    from vllm.v1.core.sched import scheduler

    return hasattr(scheduler.Scheduler, "balance_gather")


def refuse_a_core_without_layers(vllm_config: Any) -> None:
    """Raise InvalidArgumentError when a GDN core is asked for and the model has no such layers."""
    core = read_settings(vllm_config.additional_config).gdn_core
    text_config = getattr(vllm_config.model_config, "hf_text_config", None)
    if core is not None and not hasattr(text_config, "linear_num_value_heads"):
        model = getattr(vllm_config.model_config, "model", None)
        invalid_argument(
            'additional_config["ascend_twin"]["gdn"]["core"]',
            repr(core),
            f"none with {model}, which has no gated delta rule layers (linear_num_value_heads)",
        )
