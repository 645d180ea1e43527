"""`scalecv chaos` with real processes: what it proves for users, it proves for us."""

import json
import subprocess
import sys

import pytest

from scalecv import config
from scalecv.chaos.run import chaos
from scalecv.errors import ConfigError

pytestmark = pytest.mark.e2e
RECIPE = """
name: shapes
task: classify
data: {{uri: {data}, augment: {{hflip: 0.5, rotate_deg: 10}}, decode_threads: 1}}
model: {{arch: resnet10, stem: small}}
train: {{epochs: 3, batch: 8, lr: 0.003, threads: 1, precision: bf16}}
scale: {{workers: 2}}
"""


@pytest.fixture
def recipe(shapes_dataset, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "shapes.yaml"
    path.write_text(RECIPE.format(data=shapes_dataset))
    return path


def tried(recipe, folder, faults, rounds):
    report = chaos([str(recipe)], config.load(str(recipe), {}), [], faults=faults, rounds=rounds, folder=folder)
    assert [one.detail for one in report.outcomes if one.verdict != "PASS"] == []
    assert len(report.outcomes) == rounds * len(faults)
    return report


@pytest.mark.chaos
def test_the_command_killed_while_two_workers_train(recipe, tmp_path):
    command = [sys.executable, "-m", "scalecv", "chaos", str(recipe), "--faults", "driver", "--json"]
    done = subprocess.run([*command, "--to", str(tmp_path / "lab")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] and told["outcomes"][0]["verdict"] == "PASS"
    assert told["outcomes"][0]["weights_hash"] == told["quiet"]["weights_hash"]


def test_an_unknown_fault_and_a_folder_in_use_are_refused(recipe, tmp_path):
    experiment = config.load(str(recipe), {})
    with pytest.raises(ConfigError, match="did you mean 'driver'"):
        chaos([str(recipe)], experiment, [], faults=["drivr"], folder=tmp_path / "lab")
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mine").touch()
    with pytest.raises(ConfigError, match="not empty"):
        chaos([str(recipe)], experiment, [], faults=["driver"], folder=tmp_path / "lab")


@pytest.mark.chaos
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("fault", ["driver", "worker", "node"])
def test_ten_kills_at_random_steps(recipe, tmp_path, fault):
    tried(recipe, tmp_path / "lab", [fault], rounds=10)


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_every_fault(recipe, tmp_path):
    report = tried(recipe, tmp_path / "lab", ["worker", "node", "driver", "store", "disk", "tracker"], rounds=1)
    assert report.share_done_once >= 0.97
