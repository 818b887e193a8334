"""wgrad of `full` mode: dW = P(dY)^T X, or the exact dY^T X where that is faster.

T tokens, N out, K in; P the unbiased 2:4 estimate along the tokens. The sparse way costs a pass over dY that writes the
operand, and a product at twice the rate; what is measured is both together. Where the dense product wins, pruning
would add variance and time: dY itself is multiplied.
"""

import functools
import logging

import torch

from slope_megatron.ops import choices, layout, measure, mvue
from slope_megatron.ops.choices import Choice, Key
from slope_megatron.sparsity.token_draws import TokenDraws

logger = logging.getLogger(__name__)


def product(dy_TN: torch.Tensor, x_TK: torch.Tensor, draws: TokenDraws, *, dense_allowed: bool) -> torch.Tensor:
    """P(dY)^T X, or dY^T X where its choice says so: dense `[N, K]`.

    Raises:
        ValueError: the sparse product was asked for by name, and nothing here can write its operand or compute it.
    """
    if (draws.n, draws.m) != (2, 4):
        _say_once(f"full mode: {draws.n}:{draws.m} gradients are estimated in plain torch; the kernel is for 2:4")
        return draws.estimate(dy_TN).t() @ x_TK
    key = Key("wgrad", dy_TN.shape[1], x_TK.shape[1], dy_TN.shape[0], dy_TN.dtype)
    choice = choices.find(key)
    if choice is None:
        # As for the other products: measuring is not for torch.compile to trace.
        choose = torch.compiler.disable(_choose) if torch.compiler.is_compiling() else _choose
        choice = choose(key, dy_TN.device, dense_allowed)
    if not choice.sparse:
        return dy_TN.t() @ x_TK
    operand = mvue.mvue_operand(dy_TN, draws.key, draws.streams)
    return mvue.sparse_wgrad(operand, x_TK, dy_TN.shape[1])


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


@torch.no_grad()
def _choose(key: Key, device: torch.device, dense_allowed: bool) -> Choice:
    if device.type == "cpu":
        return choices.decide(key, lambda: Choice(True))
    choices.refuse_while_capturing(key, device)
    if layout.probe(device, key.dtype).known_metadata:
        return choices.decide(key, lambda: measure.measure(key, device, dense_allowed=dense_allowed))
    if not dense_allowed:
        raise ValueError(
            f"--slope-mode full with --slope-backend cusparselt: the operand of {key} is written in sm_90's layout and "
            f"{device} has another; use --slope-backend auto, whose wgrad is then dense and exact"
        )
    return choices.decide(key, lambda: Choice(False))
