"""What upstream checkouts say of Megatron-LM's arguments and of the configurations that its own tests train.

    python tests/helpers/upstream_facts.py CHECKOUTS      each CHECKOUTS/<any name>/ a checkout; writes both files below

    tests/integrations/megatron_lm_arguments.json         every argument's name in `args`, by the versions that have it
    tests/integrations/megatron_lm_configurations.json    gpt, moe and mixtral configurations with a training run: those
                                                          arguments that `--slope` may refuse, or that say what runs

No line of the upstream's is in them: names of arguments and of tests, and values.
"""

import argparse
import json
import runpy
import subprocess
import sys
import typing
from pathlib import Path

HERE = Path(__file__).resolve()
FOLDER = HERE.parents[1] / "integrations"
ARGUMENTS, CONFIGURATIONS = FOLDER / "megatron_lm_arguments.json", FOLDER / "megatron_lm_configurations.json"
# Arguments that are served and say what kind of model and run it is; sizes, rates and paths do not.
FEATURES = """
    transformer_impl num_experts context_parallel_size overlap_param_gather num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage apply_query_key_layer_scaling
    gradient_accumulation_fusion add_bias_linear add_qkv_bias attention_backend attention_output_gate deterministic_mode
    qk_layernorm normalization swiglu squared_relu position_embedding_type rotary_interleaved group_query_attention
    untie_embeddings_and_output_weights bf16 fp16 tensor_model_parallel_size sequence_parallel
    pipeline_model_parallel_size pipeline_model_parallel_layout decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    use_distributed_optimizer num_distributed_optimizer_instances overlap_grad_reduce use_tp_pp_dp_mapping
    ddp_average_in_collective calculate_per_token_loss decoupled_lr apply_wd_to_qk_layernorm recompute_granularity
    recompute_method recompute_modules recompute_num_layers async_save ckpt_format dist_ckpt_optim_fully_reshardable
    cross_entropy_loss_fusion defer_embedding_wgrad_compute
""".split()


def version_of(checkout: Path) -> str:
    """Of megatron-core, as `package_info` has it."""
    info = runpy.run_path(str(checkout / "megatron" / "core" / "package_info.py"))
    return f"{info['MAJOR']}.{info['MINOR']}.{info['PATCH']}"


def facts_of(checkout: Path, what: str = "arguments") -> dict:
    """Read by the checkout's own parser, in a process of its own, whose megatron is the checkout's.

    Args:
        what: "arguments": their names; "configurations": by name, {argument: value}.
    """
    command = [sys.executable, "-W", "ignore", str(HERE), f"--{what}", str(checkout)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"the parser of {checkout} cannot be read:\n{said.stderr[-3000:]}")
    return json.loads(said.stdout.splitlines()[-1])


def parser_of(checkout: Path) -> argparse.ArgumentParser:
    """The upstream's own, with what ModelOpt adds."""
    if not hasattr(typing, "override"):  # Python 3.11, for versions that want 3.12
        typing.override = lambda function: function
    sys.path.insert(0, str(checkout))
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return runpy.run_path(str(checkout / "megatron" / "post_training" / "arguments.py"))["add_modelopt_args"](parser)


def command_line(parser: argparse.ArgumentParser, model_args: dict) -> list[str]:
    """The flags that the upstream's runner makes of a configuration's MODEL_ARGS."""
    flags = []
    several = {flag for action in parser._actions if action.nargs for flag in action.option_strings}
    for flag, value in model_args.items():
        if value is False:
            continue
        flags.append(flag)
        if value is True:
            continue
        text = str(value).replace("${REPEAT}", "1")
        flags += text.strip("[]").replace(",", " ").split() if flag in several else [text]
    return flags


def trained(checkout: Path) -> dict[str, dict]:
    """MODEL_ARGS of the gpt, moe and mixtral configurations that train: no inference, no reinforcement learning."""
    import yaml

    found = {}
    for family in ("gpt", "moe", "mixtral"):
        for path in sorted((checkout / "tests/functional_tests/test_cases" / family).glob("*/model_config.yaml")):
            content = yaml.safe_load(path.read_text())
            model_args = content.get("MODEL_ARGS") or {}
            trains = not {"--train-iters", "--train-samples"}.isdisjoint(model_args)
            if trains and content.get("MODE") not in ("inference", "rl"):
                found[f"{family}/{path.parent.name}"] = model_args
    return found


def own_arguments(checkout: Path) -> list[str]:
    """`facts_of`, in the process that it starts."""
    return sorted({action.dest for action in parser_of(checkout)._actions if action.dest != "help"})


def own_configurations(checkout: Path) -> dict:
    """The same of configurations: what differs from the defaults, of those arguments that count here."""
    from slope_megatron.integrations.megatron_lm.arguments import BESIDE, names
    from slope_megatron.integrations.megatron_lm.refused import RULES

    parser = parser_of(checkout)
    wanted = {*FEATURES, *names(BESIDE), *(rule.name for rule in RULES)}
    configurations = {}
    for name, model_args in trained(checkout).items():
        values = vars(parser.parse_args(command_line(parser, model_args)))
        different = {key: value for key, value in values.items() if value != parser.get_default(key)}
        configurations[name] = {key: value for key, value in sorted(different.items()) if key in wanted}
    return configurations


def dump(path: Path, entries: list[str]) -> None:
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n")
    print(f"{path.name}: {len(entries)} lines")


def main(checkouts: Path) -> None:
    found = {version_of(path.parent): path.parent for path in checkouts.glob("*/pretrain_gpt.py")}
    ordered = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    versions: dict[str, list[str]] = {}
    for version in ordered:
        for name in facts_of(found[version]):
            versions.setdefault(name, []).append(version)
    by_versions: dict[tuple, list[str]] = {}
    for name, those in sorted(versions.items()):
        by_versions.setdefault(tuple(those), []).append(name)
    dump(ARGUMENTS, [json.dumps([list(those), " ".join(names)]) for those, names in sorted(by_versions.items())])
    alike: dict[str, list[str]] = {}
    for name, values in facts_of(found[ordered[-1]], "configurations").items():
        alike.setdefault(json.dumps(values), []).append(name)
    dump(CONFIGURATIONS, [json.dumps([names, json.loads(values)]) for values, names in alike.items()])


if __name__ == "__main__":
    own = {"--arguments": own_arguments, "--configurations": own_configurations}
    if sys.argv[1] in own:
        print(json.dumps(own[sys.argv[1]](Path(sys.argv[2])), default=lambda member: member.name))
    else:
        main(Path(sys.argv[1]))
