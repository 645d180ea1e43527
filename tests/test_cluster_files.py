"""The files in cluster/ are valid where that can be known offline, and safe by default."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "cluster"


def load(name):
    return yaml.safe_load((FOLDER / name).read_text())


def test_the_autoscaler_file_passes_rays_own_checks():
    import ray
    from jsonschema import validate
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = load("aws-autoscaler.yaml")
    validate(tree, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))
    validate_config(prepare_config(tree))
    types = tree["available_node_types"]
    spot = {name: "InstanceMarketOptions" in t["node_config"] for name, t in types.items()}
    assert spot == {"head": False, "gpu_spot": True, "cpu_spot": True} and tree["head_node_type"] == "head"
    assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    assert tree["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in " ".join(tree["head_start_ray_commands"])


@pytest.mark.parametrize("name, kind", [("kuberay-raycluster.yaml", "RayCluster"), ("kuberay-rayjob.yaml", "RayJob")])
def test_kubernetes_files_fit_the_locked_ray_and_ask_for_a_token(name, kind):
    tree = load(name)
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", kind)
    spec = tree["spec"] if kind == "RayCluster" else tree["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == version("ray") and spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            assert container["securityContext"]["runAsNonRoot"] is True
            assert container["resources"]["limits"] == container["resources"]["requests"]
        known = {v["name"] for v in group["template"]["spec"].get("volumes", [])}
        mounted = {m["name"] for c in group["template"]["spec"]["containers"] for m in c.get("volumeMounts", [])}
        assert mounted == known


def test_the_image_can_compile_what_is_compiled_at_first_use():
    text = (FOLDER / "Dockerfile").read_text()
    assert all(f" {package} " in text for package in ("gcc", "libc6-dev", "libjpeg62-turbo-dev"))


def test_the_jobs_command_is_one_of_ours():
    words = load("kuberay-rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "scalecv", "train"]


def test_compose_publishes_on_loopback_only_and_holds_no_password():
    text = (FOLDER / "compose.yaml").read_text()
    tree = yaml.safe_load(text)
    ports = [p for s in tree["services"].values() for p in s.get("ports", [])]
    assert ports and all(p.startswith("127.0.0.1:") for p in ports)
    for name in ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"):
        assert re.search(rf"\$\{{{name}:\?", text)
    secrets = [
        v
        for s in tree["services"].values()
        for k, v in s.get("environment", {}).items()
        if "SECRET" in k or "PASSWORD" in k
    ]
    assert secrets and all(v.startswith("${") for v in secrets)
    for service in tree["services"].values():
        for needed in service.get("depends_on", {}):
            assert needed in tree["services"]
    identities = tree["configs"]["s3_identities"]["content"]
    assert json.loads(identities)["identities"][0]["actions"]


def test_the_image_is_built_from_the_lock_by_hash_as_an_ordinary_user():
    text = (FOLDER / "Dockerfile").read_text()
    assert "--require-hashes -r requirements.lock" in text and "USER ray" in text and "RAY_AUTH_MODE=token" in text
    assert "index-url" not in text and "http" not in text.replace("https://", "")
