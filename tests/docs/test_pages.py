"""README and docs/: links resolve, quotations are literal, figures have one source, README stays short."""

import importlib.util
import re
from pathlib import Path

import pytest
from cli.test_parser import PAGES as PAGES_OF_COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
QUOTED = re.compile(r"<!-- from (\S+) -->\n```\w+\n(.*?)```", re.S)


def load_tables():
    """docs/ is no package."""
    spec = importlib.util.spec_from_file_location("performance_tables", ROOT / "docs" / "performance_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives a page's headings: small letters, words joined by hyphens."""
    heads = re.findall(r"^#+ (.*)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{name(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)}: {link} names no heading"


def test_every_page_is_in_the_index():
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


def test_readme_quotes_the_examples_literally():
    quoted = QUOTED.findall(README.read_text())
    assert [path for path, _ in quoted] == [
        f"examples/{file}" for file in ("pretrain.sh", "layer_spec.py", "megatron_lm.sh")
    ]
    for path, lines in quoted:
        assert lines in (ROOT / path).read_text(), path


def test_readme_is_read_in_two_minutes():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in line.strip("|").split("|")]
    assert max(len(cell.split()) for cell in cells) <= 8


def test_readme_s_gain_is_the_benchmark_s():
    (said,) = re.findall(r"LLaMA-3-8B with 16 of its 32 blocks: (.*?) times dense bf16", README.read_text())
    found = tables.rows("models/llama-3-8b-16-layers")
    ratios = {mode: next(row["ratio"] for row in found if row["mode"] == mode) for mode in ("paper", "full", "fp8")}
    expected = {mode: tables.rounded(ratio, 2) for mode, ratio in ratios.items()}
    assert said == f"`paper` {expected['paper']}, `full` {expected['full']}, e4m3 {expected['fp8']}"


def test_readme_gives_each_figure_once():
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", re.sub(r"\]\([^)]*\)|\[arXiv[^]]*\]", "", prose(README)))
    assert len(figures) >= 3 and len(figures) == len(set(figures)), sorted(figures)


@pytest.mark.parametrize("page", tables.PAGES, ids=name)
def test_tables_are_those_of_the_csv_files(page):
    text = page.read_text()
    assert "<!-- table " in text
    assert tables.rendered(text) == text, "run python docs/performance_tables.py"


def test_figures_of_the_csv_files_stand_in_their_tables_alone():
    """Three decimals are a CSV file's: outside the tables none is typed, so none goes stale."""
    words = "\n".join(line for line in prose(ROOT / "docs" / "performance.md").splitlines() if not line.startswith("|"))
    assert re.findall(r"(?<![\w.])\d\.\d{3}(?!\w|\.\d)", words) == []


def test_exit_codes_are_those_of_the_manual():
    manual = PAGES_OF_COMMANDS["slope pretrain"].format_help().partition("EXIT CODES")[2].partition("EXAMPLES")[0]
    codes = re.findall(r"^ +(\d+)  ", manual, flags=re.M)
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert len(codes) > 5 and re.findall(r"^\| (\d+) \|", page, flags=re.M) == codes


def test_a_table_whose_row_is_missing_is_refused():
    with pytest.raises(ValueError, match=r"0 rows have .*'model': 'opt-1t'.*: a figure of a page must come from one"):
        tables.find(tables.rows("block"), model="opt-1t")
