"""ExpertsModel: the architecture of a mixture of experts, which Megatron-LM trains and exports write.

`slope pretrain` has none: so these fields are no flags, and no model file has them.
"""

import dataclasses

from slope_megatron.config import ModelConfig
from slope_megatron.config.fields import COUNT, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsModel(ModelConfig):
    """In each block a router chooses `experts_per_token` of `num_experts` MLPs, weighed by a softmax over the chosen.

    `ffn_hidden_size` is the width inside one of them.
    """

    num_experts: int = option(8, "experts of a block", must=COUNT)
    experts_per_token: int = option(2, "of which each token sees so many", must=COUNT)
