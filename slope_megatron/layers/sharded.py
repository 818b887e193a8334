"""A pruned linear's tensors for Megatron's distributed checkpoints: each with the axis along which it is cut."""

# By the axis along which tensor parallelism cuts weight and patterns: what is cut with them. The rest is replicated.
CUT_WITH_WEIGHT = {0: ("bias", "adapter_r"), 1: ("adapter_l",)}


def sharded_tensors(linear, prefix: str, sharded_offsets: tuple, metadata: dict) -> dict:
    """What `linear`'s `sharded_state_dict` gives."""
    # Megatron-DeepSpeed's core of 2023, under which this module is imported too, has neither.
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    cut = ("weight", *linear.PATTERNS, *CUT_WITH_WEIGHT[linear.partition_dim])
    sharded = make_sharded_tensors_for_checkpoint(
        linear.state_dict(prefix="", keep_vars=True),
        prefix,
        dict.fromkeys(cut, linear.partition_dim),
        sharded_offsets,
        tp_group=linear.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    if linear.gated:
        # Megatron's MLP splits weight and bias; these are ours.
        for name in (*linear.PATTERNS, "adapter_r"):
            if tensor := sharded.get(f"{prefix}{name}"):
                sharded[f"{prefix}{name}"] = apply_swiglu_sharded_factory(tensor, sharded_offsets)
    return sharded
