"""Files beside the code: clusters, models, recipes, studies, measured rates, found in a checkout and in a wheel.

Each exists once, under `launch/` or `kernels/results` of the repository; setup.cfg maps them into the wheel.
"""

from pathlib import Path

from slope_megatron.config.fields import load_yaml
from slope_megatron.config.model import ModelConfig

PACKAGE = Path(__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """Where the clusters, models, recipes, studies or results are."""
    checkout = PACKAGE.parent / ("kernels" if name == "results" else "launch") / name
    return checkout if checkout.is_dir() else PACKAGE / "shipped" / name


def model(name: str) -> ModelConfig:
    """A published model's architecture."""
    return ModelConfig(**load_yaml(folder("models") / f"{name}.yaml", {"model": ModelConfig})["model"])


def config_file(path: Path) -> Path:
    """The file of a `--config` or a study: `launch/models/opt-13b.yaml`, or `models/opt-13b`, found from any folder."""
    if path.exists() or path.parent.name not in ("models", "recipes", "study"):
        return path
    shipped = folder(path.parent.name) / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if shipped.is_file() else path
