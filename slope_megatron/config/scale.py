"""`--scale S`: a recipe made small enough for a small machine, by rules that say what they did.

With S in (0, 1] and r = sqrt(S):

    steps, validation samples          x S
    global batch                       x S, down to a power of two, 8 or more (or what it was)
    blocks, heads, sequence, adapters  x r; the width of a head stays, so the hidden size follows the heads, and the
                                       MLP keeps its ratio; at least 2 blocks, 2 heads, 32 tokens, rank 4
    warm-up and intervals              x (new steps / old steps)
    learning rates                     x sqrt(new batch / old batch); AdamW's also x (old width / new width)
    vocabulary                         that of the data

Flags come after it, so each of these can still be given.
"""

import dataclasses
import math
from collections.abc import Callable


class Scaler:
    """Values of a recipe `{section: {key: value}}` (defaults where they are not given), changed in place."""

    def __init__(self, values: dict[str, dict], classes: dict[str, type], factor: float):
        """Raises ValueError if the factor is not in (0, 1]."""
        if not 0.0 < factor <= 1.0:
            raise ValueError(f"--scale is {factor}: it must be in (0, 1]; take 0.01, say")
        self.values, self.factor, self.root = values, factor, math.sqrt(factor)
        self.defaults = {name: {f.name: f.default for f in dataclasses.fields(kind)} for name, kind in classes.items()}
        self.lines: list[str] = []

    def get(self, section: str, key: str):
        return self.values[section].get(key, self.defaults[section].get(key))

    def set(self, section: str, key: str, value) -> None:
        before = self.get(section, key)
        if value != before:
            self.values[section][key] = value
            self.lines.append(f"{section}.{key} {before} -> {value}")

    def change(self, section: str, key: str, rule: Callable) -> None:
        """Set a value to `rule(old)`; what is unset or 0 stays."""
        before = self.get(section, key)
        if before:
            self.set(section, key, rule(before))


def scale_values(values: dict[str, dict], classes: dict[str, type], factor: float) -> list[str]:
    """Scale a recipe in place; returns what changed, a line each."""
    scaler = Scaler(values, classes, factor)
    steps, batch, hidden = (
        scaler.get(*key) for key in (("train", "steps"), ("data", "global_batch_size"), ("model", "hidden_size"))
    )
    scaler.change("train", "steps", lambda old: max(min(old, 20), round(old * factor)))
    scaler.change("train", "eval_samples", lambda old: max(min(old, 16), round(old * factor)))
    scaler.change("data", "global_batch_size", lambda old: max(min(old, 8), 2 ** int(math.log2(max(1, old * factor)))))
    scaler.change("data", "micro_batch_size", lambda old: math.gcd(old, scaler.get("data", "global_batch_size")))
    _scale_model(scaler)
    share = scaler.get("train", "steps") / steps
    times = [("optimizer", "warmup_steps"), ("slope", "backward_mask_interval")]
    times += [("train", f"{name}_interval") for name in ("eval", "save", "log")]
    for section, name in times:
        scaler.change(section, name, lambda old: max(1, round(old * share)))
    rate = math.sqrt(scaler.get("data", "global_batch_size") / batch)
    if scaler.get("optimizer", "optimizer") != "lamb":
        rate *= hidden / scaler.get("model", "hidden_size")
    for name in ("lr", "min_lr"):
        scaler.change("optimizer", name, lambda old: float(f"{old * rate:.3g}"))
    return scaler.lines


def _scale_model(scaler: Scaler) -> None:
    root = scaler.root
    heads, hidden = scaler.get("model", "num_attention_heads"), scaler.get("model", "hidden_size")
    groups = scaler.get("model", "num_query_groups")
    # Even, so that two tensor-parallel ranks can share them.
    new_heads = min(heads, max(2, 2 * round(heads * root / 2)))
    new_hidden = new_heads * (hidden // heads)
    length = scaler.get("data", "seq_length")
    scaler.change("model", "ffn_hidden_size", lambda old: max(64, 64 * round(old / hidden * new_hidden / 64)))
    if groups:
        wanted = max(1, new_heads * groups // heads)
        fitting = max(count for count in range(1, wanted + 1) if new_heads % count == 0)
        scaler.set("model", "num_query_groups", fitting)
    scaler.set("model", "num_attention_heads", new_heads)
    scaler.set("model", "hidden_size", new_hidden)
    scaler.change("model", "num_layers", lambda old: max(min(old, 2), round(old * root)))
    for section, key in (("data", "seq_length"), ("model", "max_positions")):
        scaler.change(section, key, lambda old: max(min(old, length, 32), 8 * round(old * root / 8)))
    if not isinstance(scaler.get("slope", "adapter_rank"), str):  # a percentage follows the hidden size by itself
        scaler.change("slope", "adapter_rank", lambda old: max(min(old, 4), round(old * root)))
    scaler.set("model", "vocab_size", None)
