"""Zero-shot scores through lm-evaluation-harness: of runs, of packed exports, and of Hugging Face folders."""

import functools
import logging
from pathlib import Path

import torch

from slope_megatron.evaluation.hub import unreachable
from slope_megatron.evaluation.models import DTYPES, choose_device, open_decoder
from slope_megatron.export.trained_run import is_run
from slope_megatron.inference.packed_file import is_packed_folder

# SLoPe's table of GPT-2 (section 4 of the paper), by the harness's names.
TASKS = ("mmlu", "arc_challenge", "openbookqa", "winogrande", "hellaswag", "mathqa", "piqa", "race")


def open_model(folder: Path, batch_size: int, device: str | None, dtype: str):
    """A model of the harness: ours for runs and packed exports, its own for Hugging Face folders.

    Raises:
        ValueError: the harness is not installed, or the folder holds none of these.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'slope-megatron[eval]'") from None
    if is_packed_folder(folder) or is_run(folder):
        from slope_megatron.evaluation.harness_model import SlopeLM

        return SlopeLM(*open_decoder(folder, device=device, dtype=dtype), batch_size=batch_size)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run, packed model or Hugging Face model: give the folder of one")
    from lm_eval.models.huggingface import HFLM

    kind = DTYPES[dtype]
    name = "auto" if kind is None else str(kind).removeprefix("torch.")
    return HFLM(pretrained=str(folder), dtype=name, batch_size=batch_size, device=choose_device(device))


def evaluate(
    folder: Path,
    tasks: list[str],
    *,
    include_path: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "keep",
) -> dict[str, dict[str, float]]:
    """`{task: {metric: value}}` as the harness reports them (accuracies in [0, 1], with their standard errors).

    Args:
        include_path: folder of task files besides the harness's own.
        limit: examples of each task.
    Raises:
        ValueError: an unknown task, or data that cannot be had.
    """
    model = open_model(folder, batch_size, device, dtype)
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"--tasks names {unknown[0]}, which lm-evaluation-harness has not: `lm_eval ls tasks` lists its own; "
            "--include-path FOLDER adds others"
        )
    try:
        with torch.no_grad():
            found = simple_evaluate(
                model,
                tasks=list(tasks),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ConnectionError) as error:
        way_out = "--include-path FOLDER with task files of local data"
        raise unreachable(f"the data of {', '.join(tasks)}", way_out, error) from error
    return {task: numbers(metrics) for task, metrics in found["results"].items()}


@functools.cache
def task_manager(include_path: Path | None):
    """The harness's tasks and those of a folder; it reads thousands of files, so once is enough."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path) if include_path else None)


def numbers(metrics: dict) -> dict[str, float]:
    """The harness's metrics without their filters' names and without words."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "sample_len"
    }
