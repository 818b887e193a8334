"""Datasets by their names on the hub, and one clear sentence where it cannot be reached."""

import os


def unreachable(name: str, way_out: str, error: Exception) -> ValueError:
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return ValueError(
        f"{name} is neither in the local cache nor can the hub be reached{offline} ({type(error).__name__}): "
        f"run once where there is a network, or give {way_out}"
    )


def hub_rows(name: str, config: str | None, split: str, way_out: str) -> list[dict]:
    """All rows of a split.

    Raises:
        ValueError: it cannot be had.
    """
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # offline, not found, proxies, certificates: each has its own type
        raise unreachable(name if config is None else f"{name}:{config}", way_out, error) from error
