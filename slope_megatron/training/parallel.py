"""Ranks and groups: torch.distributed, Megatron's parallel state, and that state as DeepSpeed wants to see it."""

import logging
import os
import types

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from slope_megatron.config import Config
from slope_megatron.sparsity import counter
from slope_megatron.training.watch import meeting

logger = logging.getLogger(__name__)
SHARE_GPUS = meeting.SHARE_GPUS


# The `mpu` argument of `deepspeed.initialize`: DeepSpeed's model-parallel group is Megatron's TP x PP.
MODEL_PARALLEL_UNIT = types.SimpleNamespace(
    get_model_parallel_group=parallel_state.get_model_parallel_group,
    get_model_parallel_rank=lambda: dist.get_rank(parallel_state.get_model_parallel_group()),
    get_model_parallel_world_size=lambda: dist.get_world_size(parallel_state.get_model_parallel_group()),
    **{
        name: getattr(parallel_state, name)
        for group in ("data_parallel", "tensor_model_parallel", "pipeline_model_parallel")
        for name in (f"get_{group}_group", f"get_{group}_rank", f"get_{group}_world_size")
    },
)


def is_counted_here(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank's part of a parameter counts in sums over tensor-parallel ranks: its shard, or what all of them
    hold, on the first."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return first or getattr(parameter, "tensor_model_parallel", False)


def ranks_here() -> int | None:
    """Ranks of this machine, as the launcher says; None where it does not."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def take_gpu() -> None:
    """Make the GPU of this rank's number on its machine (LOCAL_RANK) its own; the only one that it sees, if it is one.

    With SLOPE_SHARE_GPUS=1 ranks share GPUs where there are too few, to try a layout: NCCL, which refuses two ranks of
    one machine on one GPU, then takes each rank for a machine of its own and goes through sockets. Results are those of
    more GPUs, times are not.

    Raises:
        ValueError: ranks of this machine see several GPUs, but fewer than there are ranks, and are not told to share.
    """
    local_rank, here, gpus = int(os.environ["LOCAL_RANK"]), ranks_here(), torch.cuda.device_count()
    ranks = here or int(os.environ["WORLD_SIZE"])
    if os.environ.get(SHARE_GPUS) == "1" and ranks > gpus:
        logger.warning("%s: %d ranks share %d GPUs; steps are slow", SHARE_GPUS, ranks, gpus)
        use_gpu(local_rank % gpus)
        os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
        return
    if gpus == 1:
        # A task that is given one GPU (--gpus-per-task=1) calls it 0. Whether others have it, too, is seen at `meet`.
        use_gpu(0)
        return
    if local_rank >= gpus or (here or 0) > gpus:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}{f' of {here}' if here else ''} and this rank sees {gpus} GPUs: start at most "
            f"{gpus} ranks on a machine, let each see its own GPU or all of them (CUDA_VISIBLE_DEVICES, --gpu-bind), "
            f"or set {SHARE_GPUS}=1 to try a layout with ranks that share GPUs, slowly"
        )
    use_gpu(local_rank)


def use_gpu(index: int) -> None:
    """DeepSpeed reads the number in LOCAL_RANK, and under mpirun wants Open MPI's to say the same."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(index)
    torch.cuda.set_device(index)


def initialize(config: Config) -> None:
    """Join the other ranks, as the launcher's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say, and form the groups.

    Without a launcher this process is the only rank.
    """
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        take_gpu()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = meeting.meet(deepspeed.constants.default_pg_timeout)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        del store
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_parallel,
        pipeline_model_parallel_size=config.parallel.pipeline_parallel,
    )
    seed_step(config, 0)


def seed_step(config: Config, step: int) -> None:
    """Set all random states from (seed, step, stage, replica): nothing random has to be saved to resume exactly.

    Hashed, for Megatron adds the tensor-parallel rank: of neighbouring seeds, one rank's would be another's.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank()
    word, _ = counter.key_of(config.train.seed, f"dropout:{step}:{stage}:{replica}")
    before = get_cuda_rng_tracker().get_states()
    # Of states that CUDA graphs can take in, recomputation cannot go back to an earlier one.
    recomputed = config.parallel.recompute != "none" and config.model.dropout > 0
    capturable = torch.cuda.is_available() and not recomputed
    model_parallel_cuda_manual_seed(word, use_cudagraphable_rng=capturable, force_reset_rng=True)
    tracker = get_cuda_rng_tracker()
    for name, state in tracker.get_states().items():
        if isinstance(state, torch.Generator) and isinstance(before.get(name), torch.Generator):
            # A graph replays with the generators that it was captured with.
            tracker.states_[name] = before[name]
            before[name].set_state(state.get_state())


def finish() -> None:
    """Leave the groups in order, so that no rank reports a lost peer."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
