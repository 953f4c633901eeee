"""`taktsight-trainer compile`: the agent's own compilation, for who holds a recipe and no station.

The agent does the work, in a process of its own: nothing of torch is loaded, and what is compiled here is what a
station compiles. A plan serves the machine that it was made on alone: do this beside the line.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click


@click.command(
    "compile",
    short_help="Compile a recipe for this machine's GPU.",
    epilog="Example: taktsight-trainer compile flange.recipe --device-cache engines/",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--device-cache", type=click.Path(path_type=Path), default="engines", show_default=True, help="Folder of plans."
)
@click.option("--precision", type=click.Choice(["f16", "f32"]), help="f16 where the recipe has such a graph.")
@click.option("--runtime", type=click.Choice(["tensorrt", "tensorrt_rtx"]), default="tensorrt", show_default=True)
def compile_command(recipe: Path, device_cache: Path, precision: str | None, runtime: str) -> None:
    """Compile RECIPE for the GPU of this machine with TensorRT; once is enough, until one of them changes."""
    command = [sys.executable, "-m", "agent", "compile", str(recipe), "--cache", str(device_cache)]
    command += ["--runtime", runtime, *(["--precision", precision] if precision else [])]
    sys.exit(subprocess.run(command, check=False).returncode)
