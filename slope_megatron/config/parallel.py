"""ParallelConfig: how the model and the data are cut over ranks."""

import dataclasses

from slope_megatron.config.fields import COUNT, Rule, check_fields, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut; data parallelism takes the ranks that tensor and pipeline parallelism leave."""

    tensor_parallel: int = option(1, "ranks that share one layer (TP)", must=COUNT)
    sequence_parallel: bool = option(
        False, "cut the norms' and dropouts' activations along the sequence over the TP ranks"
    )
    pipeline_parallel: int = option(1, "stages that the blocks are cut into (PP)", must=COUNT)
    virtual_pipeline: int = option(1, "parts of the model on each stage (interleaved pipeline)", must=COUNT)
    context_parallel: int = option(1, "ranks that share one sequence in attention", must=COUNT)
    recompute: str = option(
        "none",
        "activations computed again in backward: of attention (selective) or of whole blocks (full)",
        choices=("none", "selective", "full"),
    )
    loss_chunk_tokens: int | None = option(
        None,
        "tokens whose logits are made at once, for the losses and their gradients; 0: all of a micro-batch; unset: all "
        "up to 512 MiB of them on a rank, else chunks of that size, so that logits never exist whole. In fp16 all",
        must=Rule("it must be a number of tokens, or 0 for all at once", lambda value: value >= 0),
    )
    zero_stage: int = option(
        1,
        "what DeepSpeed ZeRO cuts over the replicas: 1 the optimizer's state, 2 the gradients too, 3 the weights too",
        choices=(1, 2, 3),
    )
    grad_reduce_dtype: str = option(
        "auto",
        "type in which gradients are summed over the replicas; auto: in bf16 training at ZeRO stage 1 fp32 (Megatron's "
        "--accumulate-allreduce-grads-in-fp32; bf16 halves what is sent), else the parameters' own (--dtype). "
        "Micro-batches are summed in fp32 in any case",
        choices=("auto", "fp32", "bf16"),
    )
    offload_optimizer: str = option(
        "none",
        "where masters, moments and the update live: none (the GPU), cpu (host memory), nvme (files under "
        "--offload-path; ZeRO-3 alone, where DeepSpeed's async_io builds: it needs libaio)",
        choices=("none", "cpu", "nvme"),
    )
    offload_path: str | None = option(
        None, "folder on a local disk for --offload-optimizer nvme; what is in it is worth nothing after the run"
    )
    zero3_resident_operands: bool = option(
        False,
        "ZeRO-3: keep every packed layer's operands between its uses instead of building them from the gathered "
        "values in each forward and backward: faster, for two dense-sized copies of memory",
    )

    def __post_init__(self):
        check_fields(self)
        if self.virtual_pipeline > 1:
            raise ValueError(
                f"--virtual-pipeline is {self.virtual_pipeline}: DeepSpeed's engine holds one module a rank, so stages "
                "cannot be interleaved; use 1 and more micro-batches to shrink the pipeline's bubble"
            )
        if self.context_parallel > 1:
            raise ValueError(
                f"--context-parallel is {self.context_parallel}: attention here sees whole sequences only; use 1 and, "
                "for long sequences, --sequence-parallel and --recompute"
            )
        if self.pipeline_parallel > 1 and self.zero_stage > 1:
            raise ValueError(
                f"--zero-stage is {self.zero_stage} with --pipeline-parallel {self.pipeline_parallel}: stages 2 and 3 "
                "reduce gradients inside each backward, and the pipeline's schedule has several in flight; use "
                "--zero-stage 1, or --pipeline-parallel 1"
            )
        if self.zero3_resident_operands and self.zero_stage != 3:
            raise ValueError(
                f"--zero3-resident-operands is given with --zero-stage {self.zero_stage}: operands stay resident there "
                "anyway; leave it out"
            )

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    def data_parallel(self, world_size: int) -> int:
        """Replicas of the model on `world_size` ranks.

        Raises:
            ValueError: TP x PP does not divide the number of ranks.
        """
        if world_size % self.model_parallel:
            started = "1 rank was" if world_size == 1 else f"{world_size} ranks were"
            raise ValueError(
                f"{started} started with --tensor-parallel {self.tensor_parallel} and "
                f"--pipeline-parallel {self.pipeline_parallel}: TP x PP x DP must be the number of ranks; "
                f"start a multiple of {self.model_parallel} ranks, with torchrun, deepspeed or srun"
            )
        return world_size // self.model_parallel


def reduced_dtype(grad_reduce_dtype: str, dtype: str, zero_stage: int) -> str:
    """The type in which gradients of `dtype` are summed over the replicas: "fp32", "bf16" or "fp16"."""
    if grad_reduce_dtype != "auto":
        return grad_reduce_dtype
    # There the sums over the micro-batches are sent, once a step, which are fp32; at stages 2 and 3 each micro-batch's.
    return "fp32" if dtype == "bf16" and zero_stage == 1 else dtype
