"""megatron-core that our models are not built with: one sentence, from whoever builds one, and from nobody else."""

from importlib import metadata

import pytest

from slope_megatron import versions
from slope_megatron.cli import main

SAID = (
    "megatron-core 0.21.0 is installed, and models are built with 0.16.1 or later and below 0.20: "
    "pip install 'megatron-core==0.16.1'"
)


@pytest.fixture
def later_core(monkeypatch):
    """What pip may take one day where nothing pins it."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.21.0" if name == "megatron-core" else real(name))


@pytest.mark.parametrize("version", ["0.16.1", "0.16.1+local", "0.16.2rc1", "0.17.1", "0.18.2", "0.19.2"])
def test_versions_that_build_models(version):
    assert versions.unsupported_core(version) is None


@pytest.mark.parametrize("version", ["0.20.0", "0.20.0rc0", "0.16.0", "0.15.3", "1.0"])
def test_versions_that_do_not(version):
    assert versions.unsupported_core(version).startswith(f"megatron-core {version} is installed")


def test_without_megatron_core_there_is_nothing_to_refuse(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions.unsupported_core() is None


@pytest.mark.parametrize("command", ["pretrain", "quickstart"])
def test_commands_that_build_models_refuse_first(later_core, tmp_path, capsys, command):
    """Before settings are read, data looked at, or anything written."""
    assert main([command, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"slope: error: {SAID}\n"
    assert not any(tmp_path.iterdir())


def test_whoever_builds_a_model_refuses(monkeypatch):
    """The plan's --check-build and the benchmarks come to this function, too."""
    import megatron.core
    import torch

    from helpers.models import small_config
    from slope_megatron.models.provider import build_bare_model

    monkeypatch.setattr(megatron.core, "__version__", "0.21.0")
    with pytest.raises(ValueError, match=r"^megatron-core 0\.21\.0 is installed"):
        build_bare_model(small_config(), 64, torch.float32)


def test_doctor_says_it_and_others_go_on(later_core, tmp_path, capsys):
    assert main(["doctor"]) == 0
    assert SAID in capsys.readouterr().out
    (tmp_path / "texts").mkdir()
    for name in "abcdefgh":
        (tmp_path / "texts" / name).write_text(f"the cat {name} sat on the mat and the dog ran over the hill. " * 40)
    sizes = ["--vocab-size", "280", "--tokenizer", "bpe", "--valid-percent", "20", "--workers", "1"]
    assert main(["data", "prepare", str(tmp_path / "texts"), "--out", str(tmp_path / "data"), *sizes]) == 0
    layers = ["--num-layers", "2", "--hidden-size", "512", "--num-attention-heads", "8", "--global-batch-size", "64"]
    assert main(["plan", *layers]) == 0
    assert "slope pretrain flags" in capsys.readouterr().out


def test_the_plugin_goes_on(later_core):
    import slope_megatron.integrations.megatron_lm.plugin  # noqa: F401


@pytest.mark.parametrize(
    ("core", "python", "said"),
    [
        ("0.16.1", (3, 11, 7), "pip takes no later one than 0.16.1 on Python"),
        ("0.16.1", (3, 12, 1), "can have a later one: pip install --upgrade 'megatron-core<0.20'"),
        ("0.19.2", (3, 12, 1), "megatron-core 0.19.2 is in use"),
        ("0.21.0", (3, 12, 1), "megatron-core 0.21.0 is installed, and models are built with"),
    ],
)
def test_doctor_says_which_core_is_in_use_and_why(monkeypatch, core, python, said):
    monkeypatch.setattr(versions, "versions", lambda: {"megatron-core": core})
    monkeypatch.setattr(versions.sys, "version_info", python)
    assert said in versions.core_in_use()
