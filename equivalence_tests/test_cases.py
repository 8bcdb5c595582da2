"""Cases: which sequences start from a state, and how a failing case is made smaller."""

import pytest
import torch

from ascend_twin.equivalence_tests.cases import PrefillCase, minimize
from ascend_twin.reference.errors import InvalidArgumentError


def test_inputs_start_from_zeros_where_a_sequence_has_no_initial_state() -> None:
    mixed = PrefillCase((3, 0, 2), initial_state=(True, False, True)).inputs().initial_state
    every = PrefillCase((3, 0, 2), initial_state=True).inputs().initial_state
    assert mixed is not None
    assert every is not None
    assert not mixed[1].any()
    assert mixed[[0, 2]].equal(every[[0, 2]])
    assert PrefillCase((), initial_state=()).inputs().initial_state is None


def test_case_refuses_initial_states_of_another_number_of_sequences() -> None:
    with pytest.raises(InvalidArgumentError, match="allowed: 2 bools, or one for all"):
        PrefillCase((3, 0), initial_state=(True,))


def test_inputs_on_a_device_are_copies_on_the_cpu_too() -> None:
    """What an implementation does to them must not change what it is compared with."""
    inputs = PrefillCase((3,), padding=1).inputs()
    for mine, its in zip(inputs, inputs.to(torch.device("cpu")), strict=True):
        assert isinstance(mine, torch.Tensor)
        assert isinstance(its, torch.Tensor)
        assert torch.equal(mine.nan_to_num(), its.nan_to_num())
        assert mine.data_ptr() != its.data_ptr()


def test_minimize_keeps_each_sequence_with_its_initial_state() -> None:
    def fails(case: PrefillCase) -> bool:
        assert isinstance(case.initial_state, (bool, tuple))
        states = case.initial_state if isinstance(case.initial_state, tuple) else ()
        return any(n >= 7 and state for n, state in zip(case.seq_lens, states, strict=False))

    case = PrefillCase((5, 100, 0, 80), H=2, HV=4, initial_state=(True, False, False, True))
    assert minimize(case, fails) == PrefillCase((7,), initial_state=(True,), gates="none", betas="one")
