"""One rank's shard of a model built on the `meta` device: parameter counts of any size of model, without its memory.

Run as a program of its own (`python -m slope_megatron.planner.meta_build`), because a process has one set of groups and
one device: it joins a group of ranks that do not exist, builds, prints JSON and ends.
"""

import dataclasses
import json
import os
import subprocess
import sys

from slope_megatron.config import Config
from slope_megatron.config.saved import SavedConfig, saved_form


def parameters(config: Config, vocabulary: int) -> list[tuple[str, int]]:
    """(name, elements on one rank) of the model at the configuration's tensor-parallel size, in a process of its own.

    Raises:
        ValueError: the build failed; its last line.
    """
    alone = dataclasses.replace(config.parallel, pipeline_parallel=1, virtual_pipeline=1, context_parallel=1)
    asked = saved_form(dataclasses.replace(config, parallel=alone).to_dict())
    text = json.dumps({**asked, "vocabulary": vocabulary})
    # The program finds what this process finds, from a bare checkout too.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "slope_megatron.planner.meta_build"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"the model cannot be built on the meta device: {last}; leave --check-build out")
    return [tuple(pair) for pair in json.loads(result.stdout.splitlines()[-1])]


def build(config: Config, vocabulary: int) -> list[tuple[str, int]]:
    """The same in this process."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from slope_megatron.models.provider import build_bare_model

    tensor = config.parallel.tensor_parallel
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, create_gloo_process_groups=False)
    # No CUDA here, and nothing is computed: a device in name only.
    stand_ins = (
        (torch.cuda, "current_device", lambda: torch.device("meta")),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *_, **__: None),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.Tensor, "cuda", lambda self, *_, **__: self),
    )
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    with torch.device("meta"):
        model = build_bare_model(config, vocabulary, torch.bfloat16)
    return [(name, parameter.numel()) for name, parameter in model.named_parameters()]


def main() -> None:
    asked = json.load(sys.stdin)
    print(json.dumps(build(SavedConfig.read(asked).config(), asked["vocabulary"])))


if __name__ == "__main__":
    main()
