"""A small MQTT broker for trying things out without root: `python demo/broker.py PORT`.

MQTT 3.1.1, anonymous, loopback only, nothing kept over a restart: not for a plant. Prints `ready` once it listens and
ends on SIGTERM or SIGINT. Needs the extra `demo` (amqtt); connect with `protocol: 3`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from amqtt.broker import Broker
from amqtt.errors import BrokerError


def broker_config(port: int) -> dict[str, object]:
    """Return amqtt's settings for one listener on the loopback interface that lets everybody in."""
    return {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }


async def serve(port: int) -> None:
    """Run the broker until a signal asks it to end."""
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end.set)
    broker = Broker(broker_config(port))
    try:
        await broker.start()
    except BrokerError as error:
        sys.exit(f"cannot listen on 127.0.0.1:{port}: {error}: choose another port")
    print("ready", flush=True)
    await asked_to_end.wait()
    await broker.shutdown()


def main(arguments: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    if len(arguments) != 1 or not arguments[0].isdigit():
        print("usage: python demo/broker.py PORT", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)  # amqtt would log a page per mishap; what matters is said above
    asyncio.run(serve(int(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
