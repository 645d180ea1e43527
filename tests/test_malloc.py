"""What glibc's allocator does with freed memory, each time in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc",
    reason="these are options of glibc's allocator",
)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Nothing is set by whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)


def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    """A block above glibc's 32 MB is taken again without new pages."""
    program = (
        "import ctypes, resource\n"
        "from scalecv.malloc import keep_freed\n"
        "c, said = ctypes.CDLL(None), keep_freed()\n"
        "c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = c.malloc(1 << 26)\n"
        "    c.memset(block, 1, 1 << 26)\n"
        "    c.free(block)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(said, faults() > 1000, faults() < 1000)\n"
    )
    for variables, kept in (({}, "True True True"), ({"MALLOC_TOP_PAD_": "0"}, "False True False")):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True
        )
        assert done.stdout.strip() == kept, done.stderr


def test_threads_share_heaps():
    """Of 24 threads that take memory at the same time each would have a heap of its own, of 64 MB of addresses."""
    program = (
        "import ctypes, os, sys, threading\n"
        "from scalecv.malloc import few_heaps\n"
        "os.cpu_count = lambda: 2\n"
        "said = few_heaps() if sys.argv[1:] else None\n"
        "c, meet = ctypes.CDLL(None), threading.Barrier(24)\n"
        "c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "def take():\n"
        "    meet.wait()\n"
        "    c.malloc(1000)\n"
        "    meet.wait()\n"
        "threads = [threading.Thread(target=take) for _ in range(24)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "c.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]\n"
        "c.fopen.restype, c.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "file = c.fopen(b'/dev/stdout', b'w')\n"
        "print(said, flush=True)\n"
        "c.malloc_info(0, file)\n"
        "c.fclose(file)\n"
    )
    heaps = []
    for arguments in ((), ("few",)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        said = done.stdout.split()[0]
        heaps.append(done.stdout.count("<heap nr="))
        assert said == ("True" if arguments else "None"), done.stderr
    assert heaps[1] <= 2 < 8 <= heaps[0]
