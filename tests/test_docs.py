"""What the documents say is there: links, files, verbs, options, keys and folders."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "cluster/README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:scalecv|tests|experiments|docs|cluster)/[\w./-]*)`")
MODULE = re.compile(r"(?<![\w./-])((?:sources|shards|batches|models|metrics|tasks|train|artifacts|serve)/\w+\.py)")
CODE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?<![\w/-])scalecv ((?:data )?[a-z]+[^\n#|<]*)")
MAKE = re.compile(r"`make ([a-z]+)|^make ([a-z]+)", re.MULTILINE)
KEY = re.compile(r"(?:`|^scalecv .* )((?:data|upscale|model|loss|train|scale|track)\.[a-z_.]+)(?=[`=:])", re.MULTILINE)


def doc_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> str:
    """What stands in fences and between backticks."""
    return "\n".join([body for _, body in FENCE.findall(text)] + CODE.findall(FENCE.sub("", text)))


def commands(text: str) -> list[list[str]]:
    """The words after each `scalecv` of a text, up to a comment, pipe or end of line."""
    found = []
    for said in COMMAND.findall(text.replace("\\\n", " ")):
        try:
            found.append(shlex.split(said))
        except ValueError:  # an apostrophe of the sentence around it
            found.append(said.split())
    return found


def verbs() -> dict[str, set[str]]:
    """Each verb of the command line ("data show" has two words) with its options."""
    from scalecv.cli.main import app

    def walk(command: object, name: str) -> None:
        below = getattr(command, "commands", None)
        for word, inner in (below or {}).items():
            walk(inner, f"{name} {word}".strip())
        if not below:
            options = [[*p.opts, *p.secondary_opts] for p in command.params]  # type: ignore[attr-defined]
            found[name] = {word for words in options for word in words} | {"--help", "-h"}

    found: dict[str, set[str]] = {}
    walk(typer.main.get_command(app), "")
    return found | {"bench": found["bench parts"]}


def ingest_of(path: Path) -> list[str]:
    """The command that makes an experiment's data, as its head says it; empty where another file does."""
    heads = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    return next((words for words in commands(heads) if words[0] == "ingest"), [])


EXPERIMENTS = [path for path in sorted((ROOT / "experiments").glob("*.yaml")) if ingest_of(path)]


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return verbs()


@pytest.mark.parametrize("path", DOCS, ids=doc_id)
def test_every_link_leads_somewhere(path):
    for link in (a or b for a, b in LINK.findall(FENCE.sub("", path.read_text()))):
        if not re.match(r"[a-z]+:", link):
            target = link.partition("#")[0]
            assert (path.parent / target).exists(), f"{doc_id(path)} links to {link}"


@pytest.mark.parametrize("path", DOCS, ids=doc_id)
def test_every_named_file_exists(path):
    for name in NAMED.findall(path.read_text()):
        if not any(word in name for word in ("NAME", "NNNN")):
            assert (ROOT / name).exists(), f"{doc_id(path)} names {name}"
    for name in MODULE.findall(path.read_text()):
        assert name.endswith("/NAME.py") or (ROOT / "scalecv" / name).exists(), f"{doc_id(path)} names {name}"


@pytest.mark.parametrize("path", DOCS, ids=doc_id)
def test_every_command_exists_with_its_options(path, known):
    for words in commands(code(path.read_text())):
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, f"{doc_id(path)} shows scalecv {name}"
        for word in words[1:]:
            option = word.partition("=")[0].rstrip(".,;:)")
            if name == "submit" and not word.startswith("-") and word in known:
                name = word  # what follows belongs to the verb that is submitted
            elif option.startswith("-") and option.strip("-"):
                assert option in known[name], f"{doc_id(path)} shows scalecv {name} {option}"


@pytest.mark.parametrize("path", DOCS, ids=doc_id)
def test_every_verb_of_make_exists(path):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for verb in (a or b for a, b in MAKE.findall(path.read_text())):
        assert verb in targets, f"{doc_id(path)} shows make {verb}"


@pytest.mark.parametrize("path", DOCS, ids=doc_id)
def test_every_key_is_one_of_the_experiment(path):
    from scalecv.config import Experiment

    for key in KEY.findall(path.read_text()):
        node = Experiment
        for part in key.rstrip(".").split("."):
            fields = getattr(node, "model_fields", None)
            if fields is None:
                break  # below a free mapping, such as model.args
            assert part in fields, f"{doc_id(path)} names the key {key}"
            node = fields[part].annotation


def test_the_readme_s_experiment_and_network_work():
    from scalecv import config

    blocks = FENCE.findall((ROOT / "README.md").read_text())
    (yaml,) = [body for kind, body in blocks if kind == "yaml"]
    experiment = config.build(config.parse_yaml(yaml, "README.md"), "README.md")
    assert experiment.name == "mine" and experiment.data.uri == "data/mine"

    import torch

    (python,) = [body for kind, body in blocks if kind == "python"]
    space: dict[str, object] = {}
    exec(compile(python, "README.md", "exec"), space)
    assert space["build"](4, 3, width=8)(torch.zeros(2, 4, 16, 16)).shape == (2, 3)


def test_commands_of_the_experiments_exist(known):
    for file in sorted((ROOT / "experiments").glob("*.yaml")):
        for words in commands(file.read_text().replace("\n", " # ")):
            assert words[0] in known, f"{file.name} shows scalecv {words[0]}"
            options = {w.partition("=")[0].rstrip('",.') for w in words if w.startswith("--")}
            assert options <= known[words[0]], f"{file.name} shows {sorted(options - known[words[0]])}"


def test_the_map_names_every_folder_and_module():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## Map") : readme.index("## What is not there yet")]
    for path in sorted((ROOT / "scalecv").iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            assert f"`scalecv/{path.name}/`" in table
        elif path.suffix == ".py" and not path.name.startswith("__"):
            assert re.search(rf"[`/]{re.escape(path.name)}`", table), f"the map lacks {path.name}"


def test_every_exit_code_is_told():
    from scalecv import errors

    codes = {0} | {e.exit_code for e in vars(errors).values() if isinstance(e, type) and hasattr(e, "exit_code")}
    told = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {int(code) for code in told} == codes


def test_decisions_are_numbered_without_gaps():
    names = [p.name for p in sorted((ROOT / "docs/decisions").glob("*.md"))]
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    for name in names:
        text = (ROOT / "docs/decisions" / name).read_text()
        assert text.startswith(f"# {name[:4]} ")
        for part in ("**Context.**", "**Decision.**", "**Cost.**", "**Alternatives.**"):
            assert part in text, f"{name} lacks {part}"


def test_pictures_are_small_and_shown():
    text = "".join(path.read_text() for path in DOCS)
    for picture in (ROOT / "docs/pictures").glob("*"):
        assert picture.stat().st_size < 200_000, picture.name
        assert picture.name in text, f"no document shows {picture.name}"


def test_the_newest_version_is_in_the_changelog():
    from scalecv import __version__

    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == __version__


def test_python_versions_are_those_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=doc_id)
def test_the_command_that_makes_the_data_of_an_experiment_lacks_but_the_images(path, tmp_path, monkeypatch):
    from scalecv import config
    from scalecv.cli.main import app

    monkeypatch.chdir(tmp_path)
    words = ingest_of(path)
    source, said = tmp_path / words[1], str(CliRunner().invoke(app, words).exception)
    assert said.startswith((f"{source} holds nothing", f"no folder at {source}")), words
    assert words[words.index("--to") + 1] == config.load(str(path)).data.uri
