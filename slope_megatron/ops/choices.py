"""Which kernel runs each product: measured once, kept for the process, saved as run state.

A product is (forward, dgrad or wgrad, R x S matrix, T tokens, dtype). Its choice is sparse (with how many tiles and
which algorithm, of cuSPARSELt or of our own kernels) or dense; with adapters, also in which way the two products run
(`Order`). Numbers of algorithms mean something only on the machine they were measured on, so a saved table names that
machine and is ignored elsewhere.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from slope_kernels import cusparselt, cusparselt_library, cutlass
from slope_megatron.storage import whole

logger = logging.getLogger(__name__)
Algorithm = cusparselt.Algorithm | cutlass.Algorithm


@dataclasses.dataclass(frozen=True)
class Key:
    """One product. `rows` x `columns` is the sparse operand: W^R for forward, the transposed W^{R,C} for dgrad.

    For wgrad, whose operand is N x T and is written anew each time, it is the shape of the gradient, N x K.
    """

    kind: str
    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.rows}x{self.columns} T{self.tokens} {dtype}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        kind, shape, tokens, dtype = text.split()
        rows, columns = shape.split("x")
        return cls(kind, int(rows), int(columns), int(tokens[1:]), getattr(torch, dtype))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs a product, and the medians (ms) behind it; a time is None where that candidate was not measured."""

    sparse: bool
    tiles: int = 1
    algorithm: Algorithm | None = None
    sparse_ms: float | None = None
    dense_ms: float | None = None

    @property
    def by_cutlass(self) -> bool:
        """Whether our own kernels run it, on operands that are not cuSPARSELt's; wgrad with the packing epilogue."""
        return isinstance(self.algorithm, cutlass.Algorithm)

    def __str__(self) -> str:
        if not self.sparse:
            name = "dense"
        elif isinstance(self.algorithm, cutlass.Algorithm):
            name = f"2:4, {self.algorithm}"
        else:
            tiles = f", {self.tiles} tiles" if self.tiles > 1 else ""
            config = f", algorithm {self.algorithm.config}" if self.algorithm else ", default algorithm"
            name = f"2:4{tiles}{config}"
        times = [f"{label} {ms:.3f} ms" for label, ms in (("2:4", self.sparse_ms), ("dense", self.dense_ms)) if ms]
        return f"{name} ({', '.join(times)})" if times else name


@dataclasses.dataclass(frozen=True)
class Order:
    """How a product runs with adapters beside it (`operands.low_rank`), and the median (ms) of each candidate.

    Its key's kind is that of the product with the rank behind it: `forward+40`.
    """

    order: str
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.times.items())
        return f"with adapters {self.order}" + (f" ({times})" if times else "")


Decision = TypeVar("Decision", Choice, Order)

_table: dict[Key, Choice] = {}
_orders: dict[Key, Order] = {}
_algorithms: dict[tuple, cusparselt.Algorithm] = {}
_cutlass_algorithms: dict[tuple, cutlass.Algorithm] = {}
_broadcast: Callable[[dict | None], dict] | None = None
_decides = True


def find(key: Key) -> Choice | None:
    """The choice for a product; None: not made yet."""
    return _table.get(key)


def find_order(key: Key) -> Order | None:
    """The order of a product with adapters; None: not chosen yet."""
    return _orders.get(key)


def earlier(key: Key) -> Choice | None:
    """The sparse choice for another number of tokens of this shape: it says what form the operands already have."""
    shape = (key.kind, key.rows, key.columns, key.dtype)
    for other, choice in _table.items():
        if choice.sparse and (other.kind, other.rows, other.columns, other.dtype) == shape:
            return choice
    return None


def fixed_tiles(key: Key) -> int | None:
    """The tiles that this shape's operands already have."""
    choice = earlier(key)
    return choice.tiles if choice else None


def algorithm(product: cusparselt.Product) -> cusparselt.Algorithm | None:
    """The measured algorithm of a product (of one tile, where the operand is cut); None: the library's default."""
    return _algorithms.get((product.rows, product.columns, product.tokens, product.dtype, product.straight))


def cutlass_algorithm(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> cutlass.Algorithm | None:
    """The measured kernel of a product; None: our own kernels were not measured for it, or lost."""
    return _cutlass_algorithms.get((rows, columns, tokens, dtype))


def packed_algorithm(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> cutlass.Algorithm | None:
    """The measured kernel of a wgrad with the packing epilogue; None: not measured, or it lost."""
    choice = find(Key("wgrad", rows, columns, tokens, dtype))
    return choice.algorithm if choice and isinstance(choice.algorithm, cutlass.Algorithm) else None


def record(key: Key, choice: Choice) -> None:
    """Adopt a choice and log it."""
    _table[key] = choice
    algorithm = choice.algorithm
    if isinstance(algorithm, cutlass.Algorithm):
        if key.kind != "wgrad":  # `packed_algorithm` finds those
            _cutlass_algorithms[(key.rows, key.columns, key.tokens, key.dtype)] = algorithm
    elif choice.sparse and algorithm is not None:
        if key.kind == "wgrad":
            shape = (key.rows, cusparselt.padded_columns(key.tokens), key.columns, key.dtype, True)
        else:
            tokens = cusparselt.padded_tokens(key.tokens)
            shape = (key.rows // choice.tiles, key.columns, tokens, key.dtype, False)
        _algorithms[shape] = algorithm
    exact = "; the exact gradient, unpruned" if key.kind == "wgrad" and not choice.sparse else ""
    logger.info("%s: %s%s", key, choice, exact)


def record_order(key: Key, order: Order) -> None:
    """Adopt an order and log it."""
    _orders[key] = order
    logger.info("%s: %s", key, order)


def is_empty() -> bool:
    """Whether no choice has been made: on a machine with one backend there is none."""
    return not _table and not _orders


def clear() -> None:
    """Forget all choices."""
    _table.clear()
    _orders.clear()
    _algorithms.clear()
    _cutlass_algorithms.clear()


def refuse_while_capturing(key, device: torch.device) -> None:
    """Measuring, and bringing buffers into another form, are not for a CUDA graph to replay.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{key} has not run yet on this weight and a CUDA graph is being captured: run it once before capturing"
        )


def decide(key: Key, measure: Callable[[], Choice], fits: Callable[[Choice], bool] = lambda _: True) -> Choice:
    """The choice for `key`, made now if need be: by `measure`, on the deciding rank where there are several.

    Args:
        fits: whether an earlier choice will do; one that does not is made anew.
    """
    choice = find(key)
    if choice is None or not fits(choice):
        choice = _agreed(measure, _choice_of)
        record(key, choice)
    return choice


def decide_order(key: Key, measure: Callable[[], Order]) -> Order:
    """The order for `key`, found in the same way."""
    order = find_order(key)
    if order is None:
        order = _agreed(measure, _order_of)
        record_order(key, order)
    return order


def _agreed(measure: Callable[[], Decision], read: Callable[[dict], Decision]) -> Decision:
    """What this process measures, or the deciding rank where there are several; `read` makes it of its fields."""
    if _broadcast is None:
        return measure()
    return read(_broadcast(dataclasses.asdict(measure()) if _decides else None))


def agree_over(broadcast: Callable[[dict | None], dict] | None, decides: bool) -> None:
    """Make choices common to a group of ranks that meet the same products in the same order.

    Args:
        broadcast: gets the deciding rank's choice as a dict (None on the others) and returns it on every rank;
            None: every process decides for itself.
        decides: whether this rank is the one that measures.
    """
    global _broadcast, _decides
    _broadcast, _decides = broadcast, decides


def machine() -> dict[str, str]:
    """What the numbers of a table depend on."""
    if not torch.cuda.is_available():
        return {"torch": torch.__version__}
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "architecture": f"sm_{major}{minor}",
        "cusparselt": "none" if cusparselt_library.unsupported() else ".".join(map(str, cusparselt_library.version())),
        "cutlass": cutlass.version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def _choice_of(fields: dict) -> Choice:
    algorithm = fields.get("algorithm")
    if algorithm:
        algorithm = (cutlass if "kernel" in algorithm else cusparselt).Algorithm(**algorithm)
    return Choice(**{**fields, "algorithm": algorithm})


def _order_of(fields: dict) -> Order:
    return Order(**fields)


def _decision_of(fields: dict) -> Choice | Order:
    return _order_of(fields) if "order" in fields else _choice_of(fields)


def save(path: Path) -> None:
    """Write the table."""
    table = {str(key): dataclasses.asdict(choice) for key, choice in (_table | _orders).items()}
    content = {"machine": machine(), "choices": dict(sorted(table.items()))}
    whole.write_json(Path(path), content)


def load(path: Path) -> bool:
    """Adopt a saved table; False, with a log line, when it was made on another machine or cannot be read."""
    here = machine()
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        table = {Key.parse(text): _decision_of(fields) for text, fields in saved["choices"].items()}
        dict(saved["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): products are measured anew", path, " ".join(str(error).split()))
        return False
    if saved["machine"] != here:
        different = sorted(name for name in here if saved["machine"].get(name) != here[name])
        logger.info("%s was measured with another %s: products are measured anew", path, ", ".join(different))
        return False
    for key, decision in table.items():
        if isinstance(decision, Order):
            record_order(key, decision)
        else:
            record(key, decision)
    return True
