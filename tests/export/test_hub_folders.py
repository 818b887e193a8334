"""Folders as the hub has them: the index decides, and what lies beside the weights is not taken for them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.families import hf_config
from slope_megatron.export import hf_checkpoint
from slope_megatron.inference.packed_file import SafetensorsFolder
from slope_megatron.inference.weight_files import INDEX, weight_files


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """Shards and their index, and beside them what Mistral adds: the same model under its own names, in one file."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "mistral"
    model = transformers.AutoModelForCausalLM.from_config(hf_config("mistral"))
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    own = {"tok_embeddings.weight": model.get_input_embeddings().weight, "norm.weight": model.model.norm.weight}
    save_file({name: tensor.detach().clone() for name, tensor in own.items()}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    return folder


@pytest.fixture
def copy(mistral, tmp_path):
    return shutil.copytree(mistral, tmp_path / "copy")


def tensors_of(folder):
    _, weights = hf_checkpoint.open_folder(folder)
    return dict(weights.items())


def whole(folder):
    """The same weights in one model.safetensors, without an index."""
    tensors = dict(SafetensorsFolder(folder))
    for path in [*folder.glob("model-*"), folder / INDEX]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def add_variants(folder):
    save_file({"base_model.x": torch.zeros(1)}, folder / "model.fp16.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "pytorch_model.bin.index.json").write_text("{")
    (folder / "original").mkdir()
    save_file({"own.x": torch.zeros(1)}, folder / "original" / "consolidated.00.safetensors")
    return folder


def test_the_index_decides(mistral, tmp_path, copy):
    expected = tensors_of(mistral)
    for folder in (whole(shutil.copytree(mistral, tmp_path / "whole")), add_variants(copy)):
        found = tensors_of(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = tensors_of(add_variants(tmp_path / "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_import_of_it_is_written(mistral, tmp_path):
    model = hf_checkpoint.import_hf(mistral, tmp_path / "ours")
    assert model.num_layers == hf_config("mistral").num_hidden_layers
    assert (tmp_path / "ours" / "model.yaml").is_file()


def test_shards_without_an_index_are_all_there_or_refused(copy):
    expected = {path: None for path in sorted(copy.glob("model-*.safetensors"))}
    (copy / INDEX).unlink()
    assert weight_files(copy) == expected
    last = max(expected)
    last.unlink()
    with pytest.raises(ValueError, match=rf"{last.name} is missing, one of {len(expected)} files of the weights"):
        weight_files(copy)


def edit_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


BROKEN = {
    "missing": (lambda folder: first_shard(folder).unlink(), r"model-00001-of-\d+.safetensors is missing"),
    "pointer": (
        lambda folder: first_shard(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a pointer of Git LFS and not the file: run `git lfs pull`",
    ),
    "index": (lambda folder: (folder / INDEX).write_text("{"), "is damaged: it is no JSON .*; fetch the folder again"),
    "empty": (lambda folder: (folder / INDEX).write_text("{}"), "is damaged: it has no weight_map"),
    "outside": (
        lambda folder: edit_index(folder, lambda names: names.update(x="../x.safetensors")),
        r"names '../x.safetensors', which is no .safetensors file of its folder",
    ),
    "tensor": (
        lambda folder: edit_index(folder, lambda names: names.update({"model.new.weight": first_shard(folder).name})),
        "lacks model.new.weight, which model.safetensors.index.json says it has: fetch the folder again",
    ),
    "cut": (
        lambda folder: first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-9]),
        "is no complete safetensors file",
    ),
    "adapter beside": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"holds an adapter beside the model \(adapter_config.json\): merge it",
    ),
    "adapter alone": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        r"holds no config.json but an adapter \(merge it into its model first",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_or_no_model_is_one_sentence(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        hf_checkpoint.open_folder(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_what_cannot_be_told_apart_is_refused(copy):
    for path in [*copy.glob("model-*"), copy / INDEX]:
        path.unlink()
    with pytest.raises(ValueError, match=r"no .safetensors file but consolidated.safetensors, which is in other names"):
        weight_files(copy)
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="has pickled weights only"):
        hf_checkpoint.open_folder(copy)
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, copy / f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=r"several .safetensors files .* \(one.safetensors, two.safetensors\): leave one"
    ):
        weight_files(copy)


def test_folders_near_the_right_one_are_told(mistral, tmp_path):
    (mistral / "original").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=rf"original holds no config.json \(the folder around it, {mistral}, does\)"):
        hf_checkpoint.open_folder(mistral / "original")
    shutil.copytree(mistral, tmp_path / "models--x" / "snapshots" / "0a1b")
    with pytest.raises(ValueError, match=r"holds no config.json \(.*snapshots/0a1b does\)"):
        hf_checkpoint.open_folder(tmp_path / "models--x")
