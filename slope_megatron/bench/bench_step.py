"""An optimizer step of stacked blocks: micro-batches with fp32 accumulation, AdamW on fp32 masters, refresh.

What a step costs beyond its blocks, and the share that bringing the operands up to date takes (bar: under 1 % at 16
micro-batches). One process, no communication.
"""

from slope_megatron.bench.common import print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS
from slope_megatron.bench.progress import add_budget, begin


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=["opt-2.6b", "opt-13b"], choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch, in sequences of 2048")
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="samples of each")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV; default: the current one")


class Step:
    """One stack with its masters and AdamW."""

    def __init__(self, model, linear, arguments):
        import torch

        from slope_megatron.bench.block import Stack
        from slope_megatron.bench.linears import Sparse

        self.stack = Stack(model, linear, arguments.blocks, arguments.tokens, "fp32")
        self.sums = self.stack.sums
        self.masters = {p: torch.nn.Parameter(p.detach().float()) for p in self.sums}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=1e-4, fused=True)
        self.micro_batches = arguments.micro_batches
        self.sparse = [module for module in self.stack.blocks.modules() if isinstance(module, Sparse)]

    def refresh(self) -> None:
        for module in self.sparse:
            module.refresh()

    def optimize(self) -> None:
        """AdamW on the masters, then the bf16 copies."""
        import torch

        for parameter, master in self.masters.items():
            master.grad = self.sums[parameter]
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.masters], [master.data for master in self.masters.values()])
            torch._foreach_zero_(list(self.sums.values()))

    def __call__(self) -> None:
        for _ in range(self.micro_batches):
            self.stack.train()
        self.optimize()
        self.refresh()


def measured(name: str, arguments) -> dict:
    """One model's row."""
    from slope_megatron.bench.linears import Dense, Sparse
    from slope_megatron.ops.autotune import timing

    steps = {kind: Step(MODELS[name], linear, arguments) for kind, linear in (("dense", Dense), ("sparse", Sparse))}
    parts: dict = {**steps, "refresh": steps["sparse"].refresh}
    parts |= {f"{kind}_optimizer": step.optimize for kind, step in steps.items()}
    samples = timing.interleaved(parts, rounds=arguments.rounds, calls=1)
    times = {part: timing.median(values) for part, values in samples.items()}
    return rounded(
        {
            "model": name,
            "blocks": arguments.blocks,
            "micro_batches": arguments.micro_batches,
            "tokens": arguments.tokens,
            "dense_ms": times["dense"],
            "sparse_ms": times["sparse"],
            "ratio": times["dense"] / times["sparse"],
            "spread": timing.spread(samples["sparse"]),
            "refresh_ms": times["refresh"],
            "refresh_share": times["refresh"] / times["sparse"],
            "dense_optimizer_ms": times["dense_optimizer"],
            "sparse_optimizer_ms": times["sparse_optimizer"],
        }
    )


def main(arguments) -> int:
    clock = begin(arguments)
    import gc

    import torch

    rows = []
    for name in clock.within(arguments.models):
        rows.append(measured(name, arguments))
        path = write_csv("step", rows, arguments.out)
        gc.collect()
        torch.cuda.empty_cache()
    print_table(rows, [name for name in rows[0] if name not in ("tokens", "spread")])
    print(f"wrote {path}")
    return 0
