"""What would go wrong in silence with shards is refused in both processes, with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fsdp_refusals import CASES
from processes import needs_gloo, run_cases

pytestmark = needs_gloo

REFUSED = {
    "no wsn": r"TypeError: wsn must be a wsn_fast\.WSN, got Sequential",
    "no mesh": r"TypeError: mesh must be a DeviceMesh, got str",
    "a part of a mesh": r"ValueError: mesh must hold all 2 processes of the mesh that it is a part of, got 1",
    "two dimensions": r"ValueError: mesh must have one dimension, got 2: .*HSDP",
    "reshard to 2": r"TypeError: reshard_after_forward must be a bool, got 2: .*smaller group",
    "offload": r"ValueError: offload_policy must be None",
    "no policy": r"TypeError: mp_policy must be a MixedPrecisionPolicy",
    "float16": r"ValueError: param_dtype must be None or torch.bfloat16, got torch.float16",
    "sums in float16": r"ValueError: reduce_dtype must be .*, got torch.float16",
    "the whole model": r"ValueError: groups\[0\] is the whole model: .*at once",
    "a list": r"ValueError: groups\[0\] is a ModuleList, which has no forward pass",
    "no module": r"ValueError: groups\[0\] is no module of the model: 'block'",
    "no layer": r"ValueError: groups\[0\] has no subnet layer",
    "a layer twice": r"ValueError: groups\[0\] and groups\[1\] have a layer in common",
    "a name": r"TypeError: groups must be a sequence",
    "recurrent": r"ValueError: rnn is a recurrent layer",
    "tied": r"ValueError: 0.weight cannot be sharded: it is tied",
    "constant threshold": r"ValueError: 0 has the rule 'value >= 0\.5', and shards need one that ranks the scores",
    "gates ahead": r"ValueError: gates_ahead must be False",
    "twice": r"RuntimeError: this WSN is sharded already",
    "fully_shard": r"RuntimeError: 1.weight is a DTensor: after fully_shard alone",
    "tensor parallelism": r"RuntimeError: 1.weight is a DTensor: .*tensor parallelism",
    "DDP before": r"RuntimeError: this WSN has run in DistributedDataParallel",
    "guarded": r"RuntimeError: an optimizer is guarded.*build it after shard",
    "in use": r"RuntimeError: task 0 is finished and in use: leave use_task",
    "other tasks": r"RuntimeError: the processes have WSNs with different tasks",
    "DDP": r"RuntimeError: DistributedDataParallel needs whole tensors",
    "state_dict": r"RuntimeError: state_dict\(\) needs whole tensors.*full_state_dict",
    "state_dict of the model": r"RuntimeError: state_dict\(\) of 1 has parts of tensors only.*full_state_dict",
    "load_state_dict": r"RuntimeError: load_state_dict\(\) needs whole tensors.*load_full_state_dict",
    "deepcopy": r"AssertionError: FSDP does not support deepcopy",
    "pickle": r"RuntimeError: a copy or a pickle needs whole tensors",
    "compile": r"RuntimeError: compile\(\) needs whole tensors",
    "rows in one pass": r"ValueError: one_pass is not possible: a sharded WSN gathers",
    "rows of an unknown task": r"ValueError: task 7 is unknown",
    "too few tasks": r"(ValueError|OtherFailedError: another process.*): task_ids must name a task for each of the 12",
    "masked_reads": r"RuntimeError: masked_reads\(\) needs whole tensors",
    "to_dense": r"RuntimeError: a sharded model has parts of its weights only",
    "moved": r"RuntimeError: a WSN that is sharded cannot be moved or cast",
    "an averaged model": r"AssertionError: FSDP does not support deepcopy",
    "capture": r"ValueError: wsn must be whole",
    "divide factor": r"RuntimeError: set_gradient_divide_factor would change the gradients of gated tensors",
    "full state of a whole one": r"ValueError: wsn must be sharded",
    "loading into a whole one": r"ValueError: wsn must be sharded",
    "gathered": r"ValueError: optimizer holds a tensor that is no parameter of this WSN",
    "penalty": r"RuntimeError: 1.weight has a gradient that did not come through its layer",
    "reader": r"RuntimeError: words.weight is read while it is cut into shards.*groups=",
    "a layer by itself": r"RuntimeError: the scores of 1.weight have changed since the threshold was found",
    "unshard": r"RuntimeError: the scores of 1.weight have changed since the threshold was found",
    "scores changed": r"RuntimeError: the scores of 1.weight have changed since the threshold was found",
    "other tasks in use": r"RuntimeError: the processes use different tasks",
    "another task": r"RuntimeError: the processes use different tasks",
    "other densities": r"RuntimeError: the processes have different values of the density or rule of 1",
    "untrained weights": r"RuntimeError: the scores of 1.weight are trained, and it is not",
    "half of the gradients": r"RuntimeError: the gradients of .* were not set to None, or to 0, together",
    "NaN": r"(FloatingPointError|OtherFailedError: another process .*): 1.weight_score has values that are not finite",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("fsdp_refusals", 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_both_processes(case: str, seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert re.match(REFUSED[case], str(one[case]), re.DOTALL), one[case]


def test_every_case_has_an_expectation() -> None:
    assert CASES.keys() == REFUSED.keys()
