"""README and docs are correct: all names exist, quoted messages are in the code, and the tutorial runs."""

import ast
import importlib.util
import json
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.options import options_of
from orchestrator.evaluation.metrics import metric_named
from tests.jobs.test_command_line import ALL_PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("models", "orchestrator", "cluster", "jobs", "tests")
TUTORIAL = ROOT / "docs" / "tutorial.md"


# ------------------------------------------------------------------------------------------------ names


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each block of code, in order."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Return the texts in backticks within the prose."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL))


def code(text: str) -> list[str]:
    """Return all code of a page: blocks, and spans within the prose."""
    return [content for _, content in blocks(text)] + spans(text)


def missing_names(text: str, folder: Path) -> list[str]:
    """Return the targets, modules, links, files and tests that a page in `folder` names although they do not exist."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    missing = []
    for piece in code(text):
        missing += [f"make {t}" for t in re.findall(r"\bmake ([a-z][a-z0-9-]*)", piece) if t not in targets]
        modules = re.findall(r"\bpython -m ([\w.]+)", piece)
        missing += [f"python -m {module}" for module in modules if importlib.util.find_spec(module) is None]
    for span in spans(text):
        if not names_something_that_exists(span):
            missing.append(span)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link and not link_target_exists(link, text, folder):
            missing.append(link)
    return missing


def names_something_that_exists(span: str) -> bool:
    """Return whether the named file, test or dotted name of this repository exists. Other texts return True."""
    if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", span) and not span.endswith(".py"):
        return pydoc.locate(span) is not None
    path, _, test = span.partition("::")
    if not re.fullmatch(rf"(?:{'|'.join(PACKAGES)}|docs)/[\w./*-]+|\w+\.(?:md|toml)", path):
        return True
    if not any(list(ROOT.glob(name.rstrip("/"))) for name in (path, f"{path}.py")):
        return False
    return not test or re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.MULTILINE) is not None


def link_target_exists(link: str, text: str, folder: Path) -> bool:
    """Return whether the file of a relative link exists and has the heading that the link names."""
    name, _, anchor = link.partition("#")
    target = folder / name if name else None
    if target and not target.exists():
        return False
    page = target.read_text() if target and target.suffix == ".md" else text
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_that_a_page_names_exists(page: Path) -> None:
    assert not missing_names(page.read_text(), page.parent)


def test_names_that_do_not_exist_are_found() -> None:
    wrong = (
        "`make nothing`, `python -m tests.nothing`, `models/nothing.py`, `orchestrator.order.nothing`,\n"
        "`tests/test_documents.py::test_nothing`, [here](nothing.md), [there](cluster.md#nothing)\n"
        "```bash\nmake neither\n```\n"
    )
    assert len(missing_names(wrong, ROOT / "docs")) == 8
    correct = (
        "`make test`, `python -m tests.reference`, `models/zoo.py`, `orchestrator.order.keyed_rng`, `a/b.py`,\n"
        "`jobs/*.py`, `tests/test_commands.py::test_commands_are_found`, [here](cluster.md#on-aws), [there](https://nowhere)\n"
    )
    assert not missing_names(correct, ROOT / "docs")


# ------------------------------------------------------------------------------------------------ options and metrics

# Options of other commands: ray, docker, mlflow, guided-diffusion, and the scripts in tests/.
OTHERS = {"--working-dir", "--runtime-env-json", "--metrics-export-port", "--ipc", "--resume_checkpoint",
          "--rescale_timesteps", "--rescale_learned_sigmas", "--synthetic"}  # fmt: skip


def known_options() -> set[str]:
    """Return every option of every job, and the groups of nested ones such as --model.*."""
    configs = {type(config) for presets in ALL_PRESETS.values() for _, config in presets().values()}
    flags = {option.flag for config in configs for option in options_of(config).values()}
    groups = {f"{flag.rpartition('.')[0]}.*" for flag in flags if "." in flag}
    return flags | groups | {"--help", "--preset", "--no-tracking"}


def unknown_options(text: str, known: set[str]) -> list[str]:
    """Return the options in a page's prose that no job has."""
    ours = [span for span in spans(text) if span.startswith("--") or "jobs/" in span]
    options = [option for span in ours for option in re.findall(r"(?<!\S)--[a-z][\w.*-]*", span)]
    return [option for option in options if option not in known | OTHERS]


def unknown_metrics(text: str) -> list[str]:
    """Return the names in a page's prose that look like names of metrics, but are not."""
    families = r"(?:s?fid|s?fd|kid|cmmd|inception_score|precision|recall|density|coverage|clipped|vendi|authpct)"
    names = [span for span in spans(text) if re.fullmatch(rf"{families}(?:_[a-z0-9_]+)?", span)]
    return [name for name in names if not is_metric(name)]


def is_metric(name: str) -> bool:
    """Return whether reports have a metric of this name."""
    try:
        return bool(metric_named(name))
    except ValueError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_metrics_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    assert not unknown_options(text, known_options()) and not unknown_metrics(text)


def test_options_and_metrics_that_do_not_exist_are_found() -> None:
    text = "`--learning-rate`, `--model.*`, `--learning-rat 3`, `precision`, `fd_infinity_digits`, `recall_at_10`"
    assert unknown_options(text, known_options()) == ["--learning-rat"] and is_metric("fid")
    assert unknown_metrics("`fidelity`, `fid`, `clipped_nothing`") == ["clipped_nothing"]


# ------------------------------------------------------------------------------------------------ messages


def message_texts() -> str:
    """Return all strings of the code without the values inserted at run time, one line for each constant piece."""
    pieces = []
    for package in ("models", "orchestrator", "cluster", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    pieces += re.split(r"%[a-z]", node.value)
    return "\n".join(pieces)


def messages_not_in_code(page: str) -> list[str]:
    """Return the pieces of messages that a page quotes but the code does not contain.

    Quotations are in backticks in the first column of a table, with three dots instead of values.
    """
    texts, missing = message_texts(), []
    for cell in re.findall(r"^\| ([^|]*) \|", page, flags=re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", cell):
            if " " in message:
                pieces = [part.strip() for part in message.split("...")]
                missing += [piece for piece in pieces if piece and piece not in texts]
    return missing


def test_quoted_messages_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert not messages_not_in_code(page)
    assert len(re.findall(r"^\| `", page, flags=re.MULTILINE)) > 20
    row = "| `worker ... is stalled; its dog is in ...` | why | what |"
    assert messages_not_in_code(row) == ["is stalled; its dog is in"]


# ------------------------------------------------------------------------------------------------ the tutorial


def test_the_tutorials_pictures_are_sorted_by_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tutorial's script on a package of three icons, one of them in two skin tones."""
    monkeypatch.setenv("ADMIRAL_STORE", str(tmp_path))
    folder = tmp_path / "package" / "img" / "twitter" / "64"
    folder.mkdir(parents=True)
    for name in ("flag.png", "hand.png", "hand-dark.png", "tone.png"):
        (folder / name).write_bytes(b"")
    emoji = [{"subcategory": "country-flag", "image": "flag.png"}, {"subcategory": "skin-tone", "image": "tone.png"},
             {"subcategory": "hands", "image": "hand.png", "skin_variations": {"1": {"image": "hand-dark.png"}}},
             {"subcategory": "face-smiling", "image": "of another vendor.png"}]  # fmt: skip
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(emoji))
    script = next(content for language, content in blocks(TUTORIAL.read_text()) if language == "python")
    exec(compile(script, "tutorial", "exec"), {})
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pictures").rglob("*.png"))
    assert written == ["pictures/flags/flag.png", "pictures/hands/hand-dark.png", "pictures/hands/hand.png"]
    labels = ["flags/flag.png,thing", "hands/hand.png,person", "hands/hand-dark.png,person"]
    assert (tmp_path / "people.csv").read_text().splitlines() == ["key,label", *labels]


@pytest.mark.ray
@pytest.mark.slow
def test_the_tutorial_ends_with_a_grid_and_a_page(tmp_path: Path) -> None:
    script = ["set -e"]
    for language, content in blocks(TUTORIAL.read_text()):
        if language == "bash":
            script.append(content)
        if language == "python":
            script.append(f"python - <<'PYTHON'\n{content}PYTHON")
    without = ("RAY_", "MLFLOW_TRACKING_URI", "ADMIRAL_", "AWS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    environment |= {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash"], input="\n".join(script), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    store = tmp_path / "admiral-tutorial"
    assert "<img" in (store / "images_cpu/evaluation/report.html").read_text()
    assert len(list((store / "images_cpu/samples/png").iterdir())) == 900
    assert (store / "images_cpu/samples/samples.png").exists(), "the grid"
    assert list((store / "people/diffusion/weights").glob("*.safetensors"))
