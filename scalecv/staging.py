"""What a job takes along: few files, arguments whose paths hold there, an environment without secrets."""

import os
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from scalecv import config, redact, storage
from scalecv.artifacts import tracking
from scalecv.errors import ConfigError, UserError
from scalecv.loopback import is_loopback

MOST_BYTES = 10 << 20
TAKES_EXPERIMENT = ("train", "tune", "plan", "config", "chaos")
PATH_OPTIONS = ("--to", "--folder", "--picture")
PATH_KEYS = {"data.uri": None, "track.storage": config.Track().storage, "model.weights": None}
HANDED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@dataclass(frozen=True)
class Staged:
    """A job that is ready to be sent."""

    argv: tuple[str, ...]
    env: dict[str, str]
    files: tuple[str, ...]
    size_bytes: int


def stage(argv: Iterable[str], env_names: Iterable[str], folder: Path, *, same_machine: bool) -> Staged:
    """Fill `folder` with what the job needs to read, and make its arguments mean the same there.

    Args:
        argv: verb and arguments, as after `scalecv`.
        env_names: further variables to hand on.
        folder: empty folder, the job's working directory.
        same_machine: whether the cluster's nodes are this machine, so that its paths hold there.
    Raises: UserError: a path or server of this machine that a remote cluster cannot reach, too large a folder,
        a variable that is not set.
    """
    words = list(argv)
    configured = None
    if words and words[0] in TAKES_EXPERIMENT:
        at = next((i for i, w in enumerate(words[1:], 1) if not w.startswith("-") and "=" not in w), None)
        if at is not None:
            path = _experiment_file(words[at], folder)
            words[at] = path.name
            config.build(_tree(path, words), words[at])  # what is wrong is told before anything is sent
            words += _path_overrides(path, words, same_machine)
            configured = config.flatten(_tree(path, words)).get("track.uri")
    else:
        words = [_path_word(words, i, same_machine) for i in range(len(words))]
    env = _environment(env_names, configured, same_machine)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    _check_no_secret(words, folder, files)
    size = sum((folder / f).stat().st_size for f in files)
    if size > MOST_BYTES:
        raise UserError(
            f"the folder of the experiment has {size / 1e6:.1f} MB of *.py and *.yaml, a job takes along at most "
            f"{MOST_BYTES / 1e6:.0f} MB: put the experiment into a folder of its own"
        )
    return Staged(tuple(words), env, tuple(files), size)


def _check_no_secret(words: Iterable[str], folder: Path, files: Iterable[str]) -> None:
    """Raises: ConfigError: an argument or a file holds the value of a secret variable; the cluster keeps both."""
    texts = [(f"the argument {word.partition('=')[0]}=…", word) for word in words]
    texts += [(name, (folder / name).read_text(encoding="utf-8", errors="replace")) for name in files]
    for what, text in texts:
        variable = redact.variable_in(text)
        if variable:
            raise ConfigError(
                f"{what} holds the value of {variable}, and whoever reads the cluster's jobs or files reads it, too: "
                f"take it out, and give the nodes the variable, or say --env {variable}"
            )


def is_own_ip(ip: str) -> bool:
    """Whether an address belongs to this machine."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family) as s:
            s.bind((ip, 0))
    except OSError:
        return False
    return True


def _experiment_file(word: str, folder: Path) -> Path:
    """The experiment in `folder`, with the modules and experiments beside it."""
    target = folder / "experiment.yaml"
    if word.startswith("runs:/"):
        target.write_text(tracking.resolved_experiment(word), encoding="utf-8")
        return target
    source = Path(word)
    config.read(source)  # says what is near where the file is missing
    beside = [p for p in source.resolve().parent.iterdir() if p.suffix in (".py", ".yaml", ".yml") and p.is_file()]
    for file in [source.resolve(), *beside]:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} has {file.stat().st_size / 1e6:.1f} MB, a job takes along at most 10 MB")
        shutil.copy(file, folder / file.name)
    for package in source.resolve().parent.glob("*/__init__.py"):
        only_code = lambda at, names: [n for n in names if not (n.endswith(".py") or os.path.isdir(f"{at}/{n}"))]  # noqa: E731
        if not package.parent.is_symlink():
            shutil.copytree(package.parent, folder / package.parent.name, ignore=only_code, dirs_exist_ok=True)
    return folder / source.resolve().name


def _tree(path: Path, words: list[str]) -> dict[str, object]:
    given = config.parse_overrides([w for w in words[1:] if "=" in w and not w.startswith("-")])
    return config.with_overrides(config.read(path), given)


def _path_overrides(path: Path, words: list[str], same_machine: bool) -> list[str]:
    """`key=/absolute/path` for the keys that hold a path of this machine."""
    tree, out = config.flatten(_tree(path, words)), []
    for key, default in PATH_KEYS.items():
        value = tree.get(key, default)
        if not isinstance(value, str) or not value or ("://" in value and not value.startswith("file:")):
            continue
        if key == "model.weights" and not os.path.exists(value):
            continue  # a name such as imagenet
        if not same_machine:
            raise ConfigError(
                f"{key}={value} is a path of this machine, the cluster cannot read it: "
                f"set {key}=s3://BUCKET/… (gs://, az://)"
            )
        out.append(f"{key}={storage.absolute(value)}")
    return out


def _path_word(words: list[str], at: int, same_machine: bool) -> str:
    """A word of a verb without experiment; paths of this machine become absolute.

    Raises: ConfigError: such a path, for a cluster elsewhere.
    """
    word, before = words[at], words[at - 1] if at else ""
    option, eq, value = word.partition("=")
    if eq and option in PATH_OPTIONS:
        return f"{option}={_path(value, same_machine)}"
    if before in PATH_OPTIONS or (at > 0 and not word.startswith("-") and os.path.exists(word)):
        return _path(word, same_machine)
    return word


def _path(word: str, same_machine: bool) -> str:
    if "://" in word or tracking.is_reference(word):
        return word
    if not same_machine:
        raise ConfigError(f"{word} is a path of this machine, the cluster cannot use it: write s3://BUCKET/…")
    return os.path.abspath(word)


def _environment(names: Iterable[str], configured: object, same_machine: bool) -> dict[str, str]:
    named = list(names)
    missing = [n for n in named if n not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: the variable is not set here")
    env = {n: os.environ[n] for n in (*HANDED_ON, *named) if os.environ.get(n)}
    env["MLFLOW_TRACKING_URI"] = _tracking(configured, named, same_machine)
    for name in HANDED_ON[:2]:
        if name in env and not same_machine and is_loopback(urlsplit(env[name]).hostname):
            raise ConfigError(f"{name}={env[name]} is this machine; the cluster needs an address that it can reach")
    return env


def _tracking(configured: object, named: list[str], same_machine: bool) -> str:
    uri = tracking.tracking_uri(configured if isinstance(configured, str) else None)
    if not same_machine and (uri.startswith("sqlite") or is_loopback(urlsplit(uri).hostname)):
        raise ConfigError(
            f"MLflow would be {storage.without_secrets(uri)} on a node of the cluster, where you cannot see it: set "
            "MLFLOW_TRACKING_URI=http://HOST:PORT to a server that the cluster reaches (cluster/compose.yaml has one)"
        )
    if storage.without_secrets(uri) != uri and "MLFLOW_TRACKING_URI" not in named:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a login, and what a job is given can be read through the job API: give the "
            "nodes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or say --env MLFLOW_TRACKING_URI"
        )
    return uri
