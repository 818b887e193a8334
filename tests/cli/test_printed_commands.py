"""Every command that a manual page, a document or a recipe shows is one that our own parser takes."""

import re
import shlex
from pathlib import Path

import pytest
from cli.test_parser import PAGES

from slope_megatron import cli
from slope_megatron.cli import bench
from slope_megatron.cli.import_model import start_command
from slope_megatron.cli.parser import Parser
from slope_megatron.cli.quickstart import run_command
from slope_megatron.config import read_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("launch/*/*.yaml")]
# What stands before `slope` where ranks are started, or another program's output is read.
BEFORE = re.compile(r"^(?:.*\| |srun \S+ |deepspeed [^|]*--module (?=slope_megatron))?slope(?:_megatron)? ")


def code_of(path: Path) -> str:
    """A document's code: fenced and indented lines; of a recipe, its comments."""
    text = path.read_text()
    if path.suffix == ".yaml":
        return "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    fenced = re.findall(r"^```(?:bash)?\n(.*?)^```", text, flags=re.M | re.S)
    return "\n".join([*fenced, *(line for line in text.splitlines() if line.startswith("    "))])


def commands_in(text: str) -> list[str]:
    """The commands of ours, one a string: without explanations, redirections, a script's own flags and mere hints."""
    found = []
    for line in re.sub(r"\\\n[ #]*", "", text).splitlines():
        # What stands apart explains.
        shown = re.split(r"\s{3,}|\s+#", line.strip())[0].replace(' "$@"', "")
        for part in shown.split(" && "):
            if BEFORE.match(part) and not re.search(r"\.\.\.|COMMAND|--help", part):
                found.append(BEFORE.sub("", part).split(" > ")[0])
    return found


COMMANDS = sorted(
    {command for prog, page in PAGES.items() for command in commands_in(page.format_help().partition("example")[2])}
    | {command for path in DOCUMENTS for command in commands_in(code_of(path))}
)


def parsed(command: str):
    """The arguments of one command; a benchmark's own parser reads its own."""
    arguments = cli.parse(shlex.split(command))
    if arguments.command == "bench":
        parser = Parser()
        bench.load(arguments.benchmark).add_arguments(parser)
        parser.parse_args(arguments.rest)
    return arguments


def hints():
    """(where, command) of what messages and documents call by name, in backticks: often a part of a command."""
    for path in [*DOCUMENTS, *ROOT.glob("slope_megatron/**/*.py")]:
        for command in re.findall(r"`slope ([^`]+)`", path.read_text()):
            yield pytest.param(command, id=f"{path.relative_to(ROOT)}: {command}")


@pytest.mark.parametrize("command", hints())
def test_a_hint_names_a_command_and_flags_of_its_own(command):
    words = [word.rstrip(",.") for word in command.replace("COMMAND", "pretrain").split()]
    prog = next(
        known for length in (2, 1) if (known := " ".join(["slope", *words[:length]])) in PAGES or words[0] == "bench"
    )
    page = PAGES.get(prog)
    known = {flag for action in page._actions for flag in action.option_strings} if page else set()
    unknown = [word for word in words if word.startswith("--") and page and word not in known]
    assert not unknown, f"{prog} has no {', '.join(unknown)}"


def test_there_are_many():
    assert len(COMMANDS) > 50
    assert {command.split()[0] for command in COMMANDS} >= set("data pretrain export import generate eval plan".split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parsed(command)
    configs = getattr(arguments, "config", None) or []
    if arguments.command == "pretrain" and all(Path(path).is_file() for path in configs):
        config, origins = read_config(arguments)
        # Trained dense weights are not pruned at random by accident.
        assert not config.train.init_from or "slope.pattern" in origins


@pytest.mark.parametrize(("positions", "length"), [(None, 1024), (2048, 1024), (512, 512)])
def test_an_import_says_how_to_start_from_it(positions, length):
    """The largest of the trained weights stay, and samples are no longer than the model has positions."""
    command = start_command(Path("my models/bert"), positions)
    arguments = parsed(command.removeprefix("slope "))
    assert arguments.config == ["my models/bert/model.yaml"]
    arguments.config = []
    config, origins = read_config(arguments)
    assert config.train.init_from == "my models/bert" and config.data.seq_length == length
    assert config.slope.pattern == "magnitude" and origins["slope.pattern"] == "flag"


def test_quickstart_prints_what_it_starts():
    command = run_command(["--data", "my data", "--tensor-parallel", "2", "--no-slope"], 4)
    assert command.startswith("deepspeed --num_gpus 4 --no_local_rank --module slope_megatron pretrain ")
    config, _ = read_config(parsed(command.partition("slope_megatron ")[2]))
    assert config.data.data == "my data" and config.parallel.data_parallel(4) == 2 and not config.slope.enabled
