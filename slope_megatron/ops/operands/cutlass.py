"""Our own Hopper kernels (CUTLASS's collectives): values and metadata are tensors apart.

T tokens, R rows and S columns of the sparse operand, N out, K in, C = K/2 kept per row.
    slope::cutlass_mm        Y [T, R] = X [T, S] W^T (+ bias)
    slope::cutlass_mm_add_   Y += X W^T (+ bias), in place
    slope::packed_wgrad      the kept half [N, C] of P(dY)^T X, from an operand in CUTLASS's order of metadata
The values are read where they lie: for the forward product in the parameter itself, so a weight has no forward operand
but metadata, 1 byte a dense weight less than with cuSPARSELt. The price is that the product reads what the parameter
holds when it runs. What is kept is the parameter, not its memory, which ZeRO-3 frees after each use. On a CPU the ops'
plain-torch references read the same metadata.
"""

import functools
import logging
from collections.abc import Hashable, Iterable

import torch

from slope_kernels import cutlass, load_cuda
from slope_kernels import packed_wgrad as packing
from slope_kernels.cutlass import Algorithm
from slope_megatron.ops import choices, update
from slope_megatron.ops.autotune import gate, timing
from slope_megatron.ops.autotune.measure_weight import WeightTrial
from slope_megatron.ops.autotune.trials import Candidate, Trial
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import layout, mvue, products
from slope_megatron.ops.operands import patterns as two_of_four
from slope_megatron.ops.operands.protocol import SparseOperand, WeightPatterns
from slope_megatron.sparsity.mvue_rng import MvueRng
from slope_megatron.sparsity.operand import scatter_slots
from slope_megatron.sparsity.operand_cutlass import from_sm90, indices_cutlass
from slope_megatron.sparsity.packing import pack, unpack_bits

logger = logging.getLogger(__name__)
NAME = Algorithm.library
DESCRIPTION = "2:4 tensor cores, the forward product on the parameter's own memory"
# (swizzle, raster) of the tile scheduler: the default first; wider swizzles never won.
SCHEDULES = ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2))
KERNELS_TO_SCHEDULE = 2
FINALISTS = 2

# -- registered ops ---------------------------------------------------------------------------------------------------


@functools.cache
def _say_copied(shape: torch.Size) -> None:
    logger.info(
        "a packed weight of %s values does not start on a line of %d bytes: each of its products reads a copy",
        "x".join(map(str, shape)),
        cutlass.ALIGNMENT,
    )


def _run(values_RC, metadata, x_TS, y_TR, **epilogue) -> None:
    """The kernel that was measured for this product, else the first one."""
    if values_RC.data_ptr() % cutlass.ALIGNMENT:
        _say_copied(values_RC.shape)
    values_RC, x_TS = products.aligned(values_RC, cutlass.ALIGNMENT), products.aligned(x_TS, cutlass.ALIGNMENT)
    problem = (False, values_RC.shape[0], x_TS.shape[1], x_TS.shape[0], x_TS.dtype)
    algorithm = choices.algorithm(NAME, problem) or cutlass.DEFAULT
    cutlass.run(algorithm, values_RC, metadata, x_TS, y_TR, **epilogue)


@torch.library.custom_op("slope::cutlass_mm", mutates_args=(), device_types="cuda")
def cutlass_mm(
    values_RC: torch.Tensor, metadata: torch.Tensor, x_TS: torch.Tensor, bias_R: torch.Tensor | None
) -> torch.Tensor:
    """Y `[T, R]`. Values that do not start on a line of 16 bytes are copied, which is said once."""
    y_TR = x_TS.new_empty((x_TS.shape[0], values_RC.shape[0]))
    _run(values_RC, metadata, x_TS, y_TR, bias_R=bias_R)
    return y_TR


def _weight(values_RC, metadata, columns: int) -> torch.Tensor:
    return scatter_slots(values_RC, indices_cutlass(metadata, values_RC.shape[0], columns // 4))


@cutlass_mm.register_kernel("cpu")
def _(values_RC, metadata, x_TS, bias_R):
    y_TR = x_TS @ _weight(values_RC, metadata, x_TS.shape[1]).t()
    return y_TR if bias_R is None else y_TR + bias_R


@cutlass_mm.register_fake
def _(values_RC, metadata, x_TS, bias_R):
    return x_TS.new_empty((x_TS.shape[0], values_RC.shape[0]))


@torch.library.custom_op("slope::cutlass_mm_add_", mutates_args=("y_TR",), device_types="cuda")
def cutlass_mm_add_(
    y_TR: torch.Tensor, values_RC: torch.Tensor, metadata: torch.Tensor, x_TS: torch.Tensor, bias_R: torch.Tensor | None
) -> None:
    """Y += X W^T (+ bias): the sum is rounded once."""
    in_place = products.aligned(y_TR, cutlass.ALIGNMENT)
    _run(values_RC, metadata, x_TS, in_place, source_TR=in_place, bias_R=bias_R)
    if in_place is not y_TR:
        y_TR.copy_(in_place)


@cutlass_mm_add_.register_kernel("cpu")
def _(y_TR, values_RC, metadata, x_TS, bias_R):
    y_TR.addmm_(x_TS, _weight(values_RC, metadata, x_TS.shape[1]).t())
    if bias_R is not None:
        y_TR.add_(bias_R)


@torch.library.custom_op("slope::packed_wgrad", mutates_args=(), device_types="cuda")
def packed_wgrad(estimate: torch.Tensor, x_TK: torch.Tensor, row_bits: torch.Tensor) -> torch.Tensor:
    """Packed dW `[N, C]`, rounded once; runs the kernel that was measured for this product, else the first one."""
    rows, (tokens, columns) = row_bits.shape[0], x_TK.shape
    packed_NC = x_TK.new_empty((rows, columns // 2))
    algorithm = choices.algorithm(NAME, (True, rows, columns, tokens, x_TK.dtype)) or packing.DEFAULT
    x_TK, row_bits = products.aligned(x_TK, cutlass.ALIGNMENT), products.aligned(row_bits, cutlass.ALIGNMENT)
    packing.run(algorithm, estimate, x_TK, row_bits, packed_NC)
    return packed_NC


@packed_wgrad.register_kernel("cpu")
def _(estimate, x_TK, row_bits):
    estimate_NT = mvue.estimate(estimate, x_TK, row_bits.shape[0], indices_cutlass)
    return pack(estimate_NT @ x_TK, unpack_bits(row_bits))


@packed_wgrad.register_fake
def _(estimate, x_TK, row_bits):
    return x_TK.new_empty((row_bits.shape[0], x_TK.shape[1] // 2))


# -- the operand ------------------------------------------------------------------------------------------------------


class CutlassOperand(SparseOperand):
    """Values, of the forward product the parameter's own, and metadata in CUTLASS's order; see `SparseOperand`."""

    library = NAME

    def __init__(self, patterns: WeightPatterns, product: Product):
        self.patterns, self.of = patterns, product
        rows, columns = patterns.shape(product)
        self.borrows_values = product is Product.FORWARD
        memory = 0 if self.borrows_values else rows
        self.values_RC = torch.empty(memory, columns // 2, dtype=patterns.dtype, device=patterns.device)
        self.metadata = self._metadata()

    def _metadata(self) -> torch.Tensor:
        rows, columns = self.patterns.shape(self.of)
        return from_sm90(self.patterns.metadata_sm90(self.of), rows, columns // 4)

    def product(self, x_TS: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        return cutlass_mm(self.packed_values(), self.metadata, x_TS, bias_R)

    def add(self, x_TS: torch.Tensor, y_TR: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        cutlass_mm_add_(y_TR, self.packed_values(), self.metadata, x_TS, bias_R)
        return y_TR

    def packed_values(self) -> torch.Tensor:
        return self.values_RC.detach()

    def set_values(self, values_NC: torch.Tensor) -> None:
        if self.borrows_values:
            self.values_RC = values_NC
        else:
            products.refresh_(values_NC, *self.patterns.both(), None, self._bytes(), 1, 1)

    def set_metadata(self) -> None:
        self.metadata.copy_(self._metadata())

    def refresh_buffer(self) -> tuple[torch.Tensor, int] | None:
        return None if self.borrows_values else (self._bytes(), 1)

    def _bytes(self) -> torch.Tensor:
        return self.values_RC.view(-1).view(torch.uint8)


Operand = CutlassOperand


def version() -> str:
    """Of the headers and of our sources; "none" where nothing can be compiled."""
    return cutlass.version()


def unsupported() -> str | None:
    """Why this machine cannot run it; None: it can."""
    return cutlass.unsupported() or two_of_four.without_triton()


def unsupported_weight(values_NC: torch.Tensor, row_bits: torch.Tensor) -> str | None:
    """The same of this weight."""
    return two_of_four.no_operand(values_NC, row_bits, cutlass.unsupported_shape)


def unsupported_wgrad(key: Key, device: torch.device) -> str | None:
    """Why it cannot compute a wgrad of `full` mode here; None: it can."""
    return cutlass.unsupported() or cutlass.unsupported_shape(key.rows, key.columns, key.dtype)


def wgrad(dy_TN: torch.Tensor, x_TK: torch.Tensor, row_bits: torch.Tensor, rng: MvueRng, total: torch.Tensor | None):
    """The kept half alone, straight from the sums."""
    operand = mvue.mvue_operand(dy_TN, rng.key, rng.streams, True)
    return update.handed_on(packed_wgrad(operand, x_TK, row_bits), total)


def problem(key: Key, tiles: int) -> Hashable:
    """Whether it is wgrad, the shape, tokens and dtype."""
    return (key.product is Product.WGRAD, key.rows, key.columns, key.tokens, key.dtype)


def row_metadata(row_bits: torch.Tensor) -> torch.Tensor:
    """Metadata of W^R in CUTLASS's order, from its bitmask uint8 `[N, K/8]`."""
    rows, eighths = row_bits.shape
    return from_sm90(products.row_metadata(row_bits), rows, eighths * 2)


# -- candidates -------------------------------------------------------------------------------------------------------


@functools.cache
def kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels of a weight's products that compile here; why others do not is said once.

    Each with both epilogues at once: the one that adds is wanted when adapters join, and a run would wait for it then.
    """
    named = cutlass.KERNELS.items()
    return _compiled({cutlass.source(kernel, dtype, adds): name for name, kernel in named for adds in (False, True)})


@functools.cache
def packing_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The same of wgrad's kernels with the packing epilogue."""
    return _compiled({packing.source(kernel, dtype): name for name, kernel in packing.KERNELS.items()})


def _compiled(sources: dict[load_cuda.Source, str]) -> tuple[str, ...]:
    """Names of those whose every source compiles; of all one reason why not, of one the compiler's last lines."""
    reason = cutlass.unsupported()
    if reason:
        logger.info("our own kernels are not among the candidates: %s", reason)
        return ()
    built = load_cuda.build_all(list(sources))
    refused = {sources[source]: error for source, error in built.items() if isinstance(error, RuntimeError)}
    for name, error in refused.items():
        logger.warning("CUTLASS's kernel %s is left out: %s", name, error)
    return tuple(name for name in dict.fromkeys(sources.values()) if name not in refused)


class WeightCandidate:
    """A product of a 16-bit weight by one kernel and one schedule."""

    tiles = 1

    def __init__(self, trial: WeightTrial, metadata: torch.Tensor, algorithm: Algorithm):
        key = trial.key
        self.trial, self.algorithm, self.metadata = trial, algorithm, metadata
        self.values_RC = layout.values_of(trial.operand(1), key.rows, key.columns, 1, key.dtype)[0]

    def __call__(self) -> None:
        cutlass.run(self.algorithm, self.values_RC, self.metadata, self.trial.x_TS, self.trial.y_TR)


class WgradCandidate:
    """wgrad by one kernel with the packing epilogue; it takes X as it lies, and there is no dense gradient."""

    tiles = 1

    def __init__(self, trial, algorithm: Algorithm):
        self.trial, self.algorithm = trial, algorithm

    def __call__(self) -> None:
        trial = self.trial
        trial.write_operand(for_cutlass=True)
        packing.run(self.algorithm, trial.operand, trial.x_SK[: trial.key.tokens], trial.row_bits, trial.y_TR)


def candidates(trial: Trial, names: Iterable[str], schedules: Iterable[tuple[int, int]]) -> list[Candidate]:
    """Of each kernel and schedule, the fastest first by a rough timing."""
    algorithms = [Algorithm(name, *schedule) for name in names for schedule in schedules]
    made: list[Candidate]
    if isinstance(trial, WeightTrial):
        metadata = row_metadata(trial.row_bits)
        made = [WeightCandidate(trial, metadata, algorithm) for algorithm in algorithms]
    else:
        made = [WgradCandidate(trial, algorithm) for algorithm in algorithms]
    times = {candidate: min(timing.interleaved({"": candidate}, rounds=2, calls=2)[""]) for candidate in made}
    return sorted(times, key=times.__getitem__)


def finalists(trial: Trial, known: Choice | None = None) -> list[Candidate]:
    """Every kernel, then the schedules of the fastest ones, or that of a known choice; those that pass the gate."""
    key = trial.key
    if cutlass.unsupported_shape(key.rows, key.columns, key.dtype):
        return []
    names = (packing_kernels if key.product is Product.WGRAD else kernels)(key.dtype)
    if known is not None:
        kernel, schedule = known.algorithm.kernel, (known.algorithm.swizzle, known.algorithm.raster)
        return gate.passing(candidates(trial, [kernel] if kernel in names else [], [schedule]))
    ranked = candidates(trial, names, SCHEDULES[:1])
    fastest = [candidate.algorithm.kernel for candidate in ranked[:KERNELS_TO_SCHEDULE]]
    return gate.passing(candidates(trial, fastest, SCHEDULES)[:FINALISTS])
