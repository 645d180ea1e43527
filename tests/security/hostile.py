"""Hostile weights, made by code; each would leave a file PWNED in the working directory if it ran."""

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile

import torch

RUNS = "touch PWNED"


def safetensors_file(header, body=bytes(64)):
    """Bytes of a safetensors file; a text is taken as the header as it is."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def tensor(start=0, end=64, shape=(16,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def safetensors_cases():
    one = b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
    whole = safetensors_file({"a": tensor()})
    return {
        "nothing": b"",
        "seven bytes": b"1234567",
        "a header of 2^62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
        "a header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
        "a header of 90 MB that is not there": struct.pack("<Q", 90_000_000) + b"{}",
        "a header behind the end": struct.pack("<Q", 1000) + b"{}",
        "a header of 20 MB": safetensors_file(b'{"__metadata__":{"a":"' + b"x" * 20_000_000 + b'"}}', b""),
        "overlapping": safetensors_file({"a": tensor(), "b": tensor()}),
        "partly overlapping": safetensors_file({"a": tensor(), "b": tensor(32, 96)}, bytes(96)),
        "a hole": safetensors_file({"a": tensor(), "b": tensor(128, 192)}, bytes(192)),
        "bytes at the end": whole + b"more",
        "cut": whole[:-1],
        "offsets turned round": safetensors_file({"a": tensor(64, 0)}),
        "negative offset": safetensors_file({"a": tensor(-64, 0)}),
        "offsets behind the end": safetensors_file({"a": tensor(0, 1 << 60, (1 << 58,))}),
        "shape NaN": safetensors_file(one.replace(b"[16]", b"[NaN]") + b"}"),
        "shape Infinity": safetensors_file(one.replace(b"[16]", b"[Infinity]") + b"}"),
        "shape negative": safetensors_file({"a": tensor(shape=(-16,))}),
        "shape a float": safetensors_file({"a": tensor(shape=(16.0,))}),
        "shape too large": safetensors_file({"a": tensor(shape=(1 << 62, 16))}),
        "shape that wraps to 0": safetensors_file({"a": tensor(0, 0, (1 << 33, 1 << 33, 0))}, b""),
        "shape and size differ": safetensors_file({"a": tensor(shape=(17,))}),
        "shape null": safetensors_file(one.replace(b"[16]", b"null") + b"}"),
        "unknown dtype": safetensors_file({"a": tensor(dtype="PICKLE")}),
        "dtype a number": safetensors_file(one.replace(b'"F32"', b"7") + b"}"),
        "dtype that torch lacks": safetensors_file({"a": tensor(shape=(64,), dtype="F8_E8M0")}),
        "a name twice": safetensors_file(one + b"," + one[1:] + b"}"),
        "a name twice, once escaped": safetensors_file(one + b"," + one[1:].replace(b'"a"', rb'"\u0061"') + b"}"),
        "no object": safetensors_file(b"[1,2,3]"),
        "not JSON": safetensors_file(b"{'a': 1}"),
        "not UTF-8": safetensors_file(b'{"\xff\xfe": 1}'),
        "deep": safetensors_file(b'{"__metadata__":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
        "metadata of numbers": safetensors_file({"__metadata__": {"a": 1}, "a": tensor()}),
        "a pickle": pickled(_Reduce(_system)),
        "a torch zip": torch_zip(pickled(_Reduce(_system))),
        "HTML": b"<html><script src=http://127.0.0.1/></script></html>" * 3,
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


class _Reduce:
    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return self.what()


def _system():
    import os

    return os.system, (RUNS,)


def pickled(value, protocol=2):
    return pickle.dumps(value, protocol)


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    out.seek(0)
    return out


def torch_zip(data, extra=(), compression=zipfile.ZIP_STORED):
    """An archive as torch.save writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as packed:
        members = [("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", bytes(64))]
        for name, content in [*members, *extra]:
            packed.writestr(f"archive/{name}", content)
    return out.getvalue()


def call(module, name, argument=RUNS):
    """A pickle, protocol 0, that calls module.name(argument)."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def pickle_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members of one name, and TorchScript, are meant
        return _pickle_cases()


def _pickle_cases():
    good = saved({"w": torch.zeros(4)}).read()
    calls = {
        "os.system": call("os", "system"),
        "posix.system": call("posix", "system"),
        "subprocess.Popen": call("subprocess", "Popen"),
        "builtins.eval": call("builtins", "eval", "__import__('os').system('touch PWNED')"),
        "builtins.exec": call("builtins", "exec", "open('PWNED', 'w')"),
        "__builtin__.exec": call("__builtin__", "exec", "open('PWNED', 'w')"),
        "builtins.open": b"cbuiltins\nopen\n(VPWNED\nVw\ntR.",
        "importlib.import_module": call("importlib", "import_module", "scalecv_canary"),
        "a global of a module": b"cscalecv_canary\nrun\n.",
        "runpy.run_path": call("runpy", "run_path", "PWNED.py"),
        "pydoc.locate": call("pydoc", "locate", "scalecv_canary.run"),
        "torch.load": call("torch", "load", "evil.pt"),
        "torch.hub.load": call("torch.hub", "load", "evil/repo"),
        "torch.jit.load": call("torch.jit", "load", "evil.pt"),
        "torch.ops.load_library": call("torch.ops", "load_library", "evil.so"),
        "torch.storage._load_from_bytes": call("torch.storage", "_load_from_bytes", "x"),
        "torch.serialization.load": call("torch.serialization", "load", "evil.pt"),
        "numpy.load": call("numpy", "load", "evil.npy"),
        "pickle.loads": call("pickle", "loads", "x"),
        "functools.partial": call("functools", "partial", "x"),
        "operator.attrgetter": call("operator", "attrgetter", "__class__.__mro__"),
        "a nested name": b"\x80\x04\x8c\x05torch\x8c\x0aos.systemXX\x93.",
        "INST": b"(Vtouch PWNED\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nVtouch PWNED\no.",
        "NEWOBJ": b"cos\nsystem\n(Vtouch PWNED\nt\x81.",
        "EXT1": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02X\x04\x00\x00\x00evilQ.",
        "BUILD of a global": b"cbuiltins\nprint\n(Vx\ntRVy\nb.",
        "no STOP": b"\x80\x02}",
        "nothing": b"",
        "opcode soup": bytes(range(256)),
        "a number": pickled(7),
        "a list of names": pickled(["w"]),
        "an empty dict": pickled({}),
    }
    cases = {name: torch_zip(data) for name, data in calls.items()}
    cases |= {f"{name}, not zipped": calls[name] for name in ("os.system", "builtins.eval", "a number", "nothing")}
    cases |= {
        "packed members": torch_zip(pickled({}), compression=zipfile.ZIP_DEFLATED),
        "a bomb": torch_zip(bytes(50_000_000), compression=zipfile.ZIP_DEFLATED),
        "two members of one name": torch_zip(pickled({}), extra=[("data.pkl", call("os", "system"))]),
        "a whole module": saved(torch.nn.Linear(2, 2)).read(),
        "TorchScript": scripted(),
        "a tar": tarred(call("os", "system")),
        "an old file": old_format(),
        "cut": good[: len(good) // 2],
        "a storage that is not there": good.replace(b"data/0", b"data/9"),
    }
    return cases


def scripted():
    out = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), out)
    return out.getvalue()


def tarred(data):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        for name in ("pickle", "storages", "tensors", "../PWNED"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return out.getvalue()


def old_format():
    out = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()
