"""The heats of a race on a Ray cluster. The only file that imports ray; needs the extra `race`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from calibration.errors import MissingPackage
from trainer.race_process import run_heat

CPUS = 2  # of every heat: what its latency is measured with


def on_ray(address: str, commands: Sequence[list[str]]) -> Iterable[int]:
    """Run the heats wherever the cluster has two free CPUs; yield the index of each as it ends.

    address: `local` for this machine, else what ray.init takes. Data, results and the virtual environment must have the
    same paths on every machine, as on a shared disk. Raises MissingPackage without ray.
    """
    try:
        import ray  # noqa: PLC0415 an extra
    except ImportError as error:
        raise MissingPackage("ray: not installed: pip install 'taktsight[race]', or leave --ray out") from error
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)

    @ray.remote(num_cpus=CPUS, max_retries=0)
    def heat(index: int, command: list[str]) -> int:
        run_heat(command)
        return index

    waiting = {heat.remote(index, command): index for index, command in enumerate(commands)}
    while waiting:
        (ended, *_), _ = ray.wait(list(waiting), num_returns=1)
        index = waiting.pop(ended)
        with suppress(ray.exceptions.RayError):  # its machine is gone: the heat has no answer, and the table says so
            ray.get(ended)
        yield index
