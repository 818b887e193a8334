"""Which kernel runs each product: measured once, kept for the process, saved as run state.

A product is (forward, dgrad or wgrad, R x S matrix, T tokens, dtype). Its choice is sparse (with how many tiles and
which library's algorithm) or dense; with adapters beside it, also by which strategy the two products run. Numbers of
algorithms mean something only on the machine they were measured on, so a saved table names that machine and is ignored
elsewhere.
"""

import dataclasses
import enum
import json
import logging
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch

from slope_megatron.ops import libraries
from slope_megatron.storage import sums, whole

logger = logging.getLogger(__name__)
# Tables of before 0.2 call an operand with adapters in it so.
WIDE = "wide"
# Strategies of earlier tables that are no more, since they won nowhere: products that had them are measured anew.
REMOVED = {"kernels", "row-augmented", "tall"}


class Named(str, enum.Enum):
    """Members are their own text."""

    def __str__(self) -> str:
        return self.value

    # Equal to its text, so of one hash with it.
    __hash__ = str.__hash__


class Product(Named):
    """A product of training."""

    FORWARD = "forward"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


PRODUCTS = tuple(Product)


class Strategy(Named):
    """How a product runs with low-rank adapters beside it; see `operands.low_rank`."""

    LAST = "last"
    FIRST = "first"
    AUGMENTED = "column-augmented"

    @classmethod
    def _missing_(cls, value):
        return cls.AUGMENTED if value == WIDE else None


@dataclasses.dataclass(frozen=True)
class Key:
    """One product. `rows` x `columns` is the sparse operand: W^R for forward, the transposed W^{R,C} for dgrad.

    For wgrad, whose operand is N x T and is written anew each time, it is the shape of the gradient, N x K.

    Args:
        rank: of the adapters that the product has beside it; 0: none.
        augmented: of an operand with adapters in it, whose columns count; FORWARD stands for dgrad too.
    """

    product: Product
    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype
    rank: int = 0
    augmented: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        product = Strategy.AUGMENTED.value if self.augmented else self.product.value
        product = f"{product}+{self.rank}" if self.rank else product
        return f"{product} {self.rows}x{self.columns} T{self.tokens} {dtype}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        name, shape, tokens, dtype = text.split()
        product, _, rank = name.partition("+")
        rows, columns = shape.split("x")
        numbers = (int(rows), int(columns), int(tokens[1:]), getattr(torch, dtype), int(rank or 0))
        if product in (Strategy.AUGMENTED.value, WIDE):
            return cls(Product.FORWARD, *numbers, augmented=True)
        return cls(Product(product), *numbers)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs a product, and the medians (ms) behind it; a time is None where that candidate was not measured.

    Args:
        algorithm: of one of `ops.libraries`; None: the default of whichever library the operand belongs to.
    """

    sparse: bool
    tiles: int = 1
    algorithm: Any = None
    sparse_ms: float | None = None
    dense_ms: float | None = None

    @property
    def library(self) -> str | None:
        """Whose kernel runs it; None: dense, or not said."""
        return self.algorithm.library if self.sparse and self.algorithm else None

    def __str__(self) -> str:
        if not self.sparse:
            name = "dense"
        else:
            tiles = f", {self.tiles} tiles" if self.tiles > 1 else ""
            name = f"2:4{tiles}, {self.algorithm or 'default algorithm'}"
        times = [f"{label} {ms:.3f} ms" for label, ms in (("2:4", self.sparse_ms), ("dense", self.dense_ms)) if ms]
        return f"{name} ({', '.join(times)})" if times else name


@dataclasses.dataclass(frozen=True)
class AdapterChoice:
    """The strategy of a product with adapters beside it, and the median (ms) of each candidate."""

    strategy: Strategy
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.times.items())
        return f"with adapters {self.strategy}" + (f" ({times})" if times else "")


Decision = Choice | AdapterChoice
OneDecision = TypeVar("OneDecision", Choice, AdapterChoice)

# Keys with a rank have an AdapterChoice, the others a Choice.
_table: dict[Key, Any] = {}
# (library, its problem) -> the measured algorithm, for registered ops, which know shapes alone.
_algorithms: dict[tuple[str, Hashable], Any] = {}
_broadcast: Callable[[dict | None], dict] | None = None
_decides = True
_is_common: Callable[[Key], bool] | None = None


def table() -> dict[Key, Any]:
    """All choices that were made: none, on a machine with one backend."""
    return _table


def find(key: Key) -> Any:
    """The choice for a product, an AdapterChoice if the key has a rank; None: not made yet."""
    return _table.get(key)


def earlier(key: Key) -> Choice | None:
    """The sparse choice for another number of tokens of this shape: it says which layout the operands already have."""
    shape = dataclasses.replace(key, tokens=0)
    for other, choice in _table.items():
        if not other.rank and choice.sparse and dataclasses.replace(other, tokens=0) == shape:
            return choice
    return None


def algorithm(library: str, problem: Hashable) -> Any:
    """The measured algorithm of a problem of a library; None: not measured, or it lost."""
    return _algorithms.get((library, problem))


def record(key: Key, decision: Decision) -> None:
    """Adopt a choice and log it."""
    _table[key] = decision
    exact = ""
    if isinstance(decision, Choice):
        library = decision.library
        if library:
            problem = libraries.load()[library].problem(key, decision.tiles)
            _algorithms[(library, problem)] = decision.algorithm
        exact = "; the exact gradient, unpruned" if key.product is Product.WGRAD and not decision.sparse else ""
    logger.info("%s: %s%s", key, decision, exact)


def clear() -> None:
    """Forget all choices."""
    _table.clear()
    _algorithms.clear()


def decide(key: Key, measure: Callable[[], OneDecision]) -> OneDecision:
    """Make the choice for `key` and record it: what this process measures, or the deciding rank of several."""
    decision: Any
    if _broadcast is None or (_is_common and not _is_common(key)):
        decision = measure()
    else:
        decision = _read(_broadcast(dataclasses.asdict(measure()) if _decides else None))
    record(key, decision)
    return decision


def agree_over(
    broadcast: Callable[[dict | None], dict] | None,
    decides: bool,
    is_common: Callable[[Key], bool] | None = None,
) -> None:
    """Make choices common to a group of ranks that meet the same products in the same order.

    Args:
        broadcast: gets the deciding rank's choice as a dict (None on the others) and returns it on every rank;
            None: every process decides for itself.
        decides: whether this rank is the one that measures.
        is_common: whether every rank meets this product, in the same order; each decides for itself on others. None:
            they meet all.
    """
    global _broadcast, _decides, _is_common
    _broadcast, _decides, _is_common = broadcast, decides, is_common


def machine() -> dict[str, str]:
    """What the numbers of a table depend on."""
    if not torch.cuda.is_available():
        return {"torch": torch.__version__}
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "architecture": f"sm_{major}{minor}",
        **{name: library.version() for name, library in libraries.load().items()},
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def _read(fields: dict) -> Decision:
    """The choice that `dataclasses.asdict` made `fields` of."""
    strategy = _strategy_of(fields)
    if strategy:
        return AdapterChoice(Strategy(strategy), fields.get("times", {}))
    algorithm = fields.get("algorithm")
    return Choice(**{**fields, "algorithm": libraries.algorithm(algorithm) if algorithm else None})


def save(path: Path, decisions: dict[Key, Any] | None = None) -> None:
    """Write the table, or other decisions as if they were it."""
    decisions = _table if decisions is None else decisions
    table = {str(key): dataclasses.asdict(decision) for key, decision in decisions.items()}
    content = {"machine": machine(), "choices": dict(sorted(table.items()))}
    whole.write_json(Path(path), sums.signed(content))


def load(path: Path) -> bool:
    """Adopt a saved table; False, with a log line, when it was made on another machine or is not what was written."""
    saved = read(path)
    if saved is None or not is_from_here(saved, path):
        return False
    adopt(saved)
    return True


def read(path: Path) -> dict | None:
    """A saved table, of whatever machine, for `is_from_here` and `adopt`; None, with a log line, when it is damaged."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        parsed(saved)
        if dict(saved["machine"]) == machine() and sums.is_signed_right(saved) is False:
            raise ValueError("it has another checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): products are measured anew", path, " ".join(str(error).split()))
        return None
    return saved


def is_from_here(saved: dict, path: Path) -> bool:
    """Whether what `read` gave was made on a machine like this one; a log line where it was not."""
    here = machine()
    if saved["machine"] == here:
        return True
    different = sorted(name for name in here if saved["machine"].get(name) != here[name])
    logger.info("%s was measured with another %s: products are measured anew", path, ", ".join(different))
    return False


def adopt(saved: dict) -> None:
    """Record every choice of a table that `read` gave."""
    for key, decision in parsed(saved).items():
        record(key, decision)


def parsed(saved: dict) -> dict[Key, Decision]:
    """The decisions of a table that `read` gave."""
    entries = saved["choices"].items()
    return {Key.parse(text): _read(fields) for text, fields in entries if not _is_removed(text, fields)}


def _is_removed(text: str, fields: dict) -> bool:
    """Whether an entry is about a strategy that is no more."""
    return not REMOVED.isdisjoint((text.split()[0], _strategy_of(fields)))


def _strategy_of(fields: dict) -> str | None:
    """What runs a product with adapters; None: it has none. Tables of before 0.2 call it the order."""
    return fields.get("strategy", fields.get("order"))
