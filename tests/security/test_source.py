"""What our own code may not do, looked for in the code itself."""

import ast
import subprocess
import sys
from pathlib import Path

import scalecv

ROOT = Path(scalecv.__file__).parent
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.dump",
    "pickle.dumps",
    "cloudpickle.loads",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "numpy.load",
    "np.load",
    "joblib.load",
    "os.system",
    "os.popen",
    "shutil.unpack_archive",
}
MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
METHODS = ("extractall", "extract")
ALLOWED = {
    ("config/text.py", "yaml.load"),  # with a loader that is SafeLoader and less
    ("models/weights.py", "torch.load"),  # weights_only, without another try
}


def files():
    return sorted(path for path in ROOT.rglob("*.py") if "testing" not in path.parts)


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_dangerous_calls_stand_in_one_named_place_each():
    found = set()
    for path in files():
        tree = ast.parse(path.read_text())
        for name, node in calls(tree):
            here = (str(path.relative_to(ROOT)), name)
            if name in FORBIDDEN or name.rpartition(".")[2] in METHODS:
                found.add(here)
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg == "shell" and is_true), here
                assert not (keyword.arg in ("allow_pickle", "trust_remote_code") and is_true), here
                assert not (keyword.arg == "weights_only" and not is_true), here
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in MODULES], path
    assert found == ALLOWED


def test_the_one_torch_load_is_restricted():
    tree = ast.parse((ROOT / "models" / "weights.py").read_text())
    (load,) = [node for name, node in calls(tree) if name == "torch.load"]
    assert {k.arg: ast.unparse(k.value) for k in load.keywords}["weights_only"] == "True"


def test_code_is_imported_by_name_in_three_places():
    found = {
        str(path.relative_to(ROOT))
        for path in files()
        for name, _ in calls(ast.parse(path.read_text()))
        if name.rpartition(".")[2] in ("import_module", "find_spec", "spec_from_file_location", "run_path")
    }
    assert found == {
        "__init__.py",  # our own modules, when first asked for
        "models/classifiers.py",  # the network of the user's own experiment
        "train/checks.py",  # where a library lies
    }


def test_importing_opens_no_socket_starts_no_process_and_writes_nothing():
    code = (
        "import sys, os; seen = []\n"
        "def hook(event, args):\n"
        "    writes = event == 'open' and isinstance(args[2], int) and args[2] & 3\n"
        "    writes = writes and '__pycache__' not in str(args[0])\n"
        "    if event in ('socket.connect', 'subprocess.Popen', 'os.posix_spawn', 'os.system', 'os.fork') or writes:\n"
        "        seen.append((event, args))\n"
        "sys.addaudithook(hook)\n"
        "import scalecv.cli.main, scalecv.artifacts.tracking, scalecv.train.runs, scalecv.submit, scalecv.redact\n"
        "print(seen, [m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[] []"
