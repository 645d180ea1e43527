"""What `make wheel` adds to a wheel: crops.c and sums.c compiled, so that those who install it need no compiler.

One wheel for each kind of machine and all versions of Python, since the library knows nothing of Python. Without
SCALECV_WHEEL=native a wheel is pure Python, and they are compiled where they are first used.
"""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LICENCES = (
    "/usr/share/doc/libjpeg62-turbo/copyright",
    "/usr/share/doc/libjpeg-turbo8/copyright",
    "/usr/share/licenses/libjpeg-turbo/LICENSE.md",
)
"""Where systems keep the licence of the libjpeg-turbo that goes into the wheel, and has to be with it."""


class NativeHook(BuildHookInterface[Any]):
    """Compiles our C into a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raises: FileNotFoundError, subprocess.SubprocessError: it was asked for and cannot be made."""
        if version == "editable" or os.environ.get("SCALECV_WHEEL") != "native":
            return
        sys.path.insert(0, self.root)
        from scalecv.jpeg.build import SHIPPED, compile_native

        licence = next((file for file in LICENCES if Path(file).exists()), None)
        if licence is None:
            raise FileNotFoundError(f"no licence of libjpeg-turbo in {', '.join(LICENCES)}: it has to be in the wheel")
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name, SHIPPED.name)
        compile_native(library)
        build_data["force_include"][str(library)] = str(SHIPPED.relative_to(self.root))
        build_data["extra_metadata"][licence] = "licenses/libjpeg-turbo"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
