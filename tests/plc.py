"""PLCs on loopback, as far as Modbus/TCP goes.

`Plc` is a real server that notes which coils are written, and when; `RudePlc` resets connections, or answers nothing.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

READ_REGISTERS, WRITE_COIL = 3, 5
ON = 0xFF
COILS = 16


class Plc:
    """Unit 1 with coils 0..15. `start` again after `kill`: its coils are off then, as after power-up."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writes: list[tuple[int, int, bool]] = []  # (time.monotonic_ns(), coil, on)
        self.answers_after_s = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> Plc:
        """Serve; returns once it does."""
        serving = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(serving)), daemon=True)
        self._thread.start()
        assert serving.wait(5), "the PLC does not serve"
        return self

    def kill(self) -> None:
        """Break all connections off, and take no more."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(5)
            assert not self._thread.is_alive()
            self._thread = None

    def of_coil(self, coil: int) -> list[bool]:
        """Return what was written to a coil, in order."""
        return [is_on for _, which, is_on in self.writes if which == coil]

    async def _serve(self, serving: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        block = [SimData(0, count=COILS, values=False, datatype=DataType.BITS)]
        registers = [SimData(0, count=1, values=0, datatype=DataType.REGISTERS)]
        device = SimDevice(id=1, simdata=(block, block, registers, registers), action=self._note)
        server = ModbusTcpServer(device, address=("127.0.0.1", self.port))
        await server.serve_forever(background=True)
        serving.set()
        await self._over.wait()
        await server.shutdown()

    async def _note(
        self, code: int, _start: int, address: int, _count: int, _registers: list[int], values: Any
    ) -> None:
        if code == WRITE_COIL and values is not None:  # None: it reads back what was written
            self.writes.append((time.monotonic_ns(), address, bool(values[0])))
        await asyncio.sleep(self.answers_after_s)


class RudePlc:
    """One coil and one holding register, at every address. It serves from the start; `close` ends it."""

    def __init__(self) -> None:
        self.is_on = False  # the coil
        self.count = 0  # the register
        self.resets = False  # every request is answered with a reset of the connection, as by a PLC that boots
        self.cuts = False  # every answer says that it is whole, and has no value
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                threading.Thread(target=self._serve, args=(self._server.accept()[0],), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with end, suppress(OSError):
            while request := end.recv(260):
                if self.resets:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                end.sendall(self._answer(request))

    def _answer(self, request: bytes) -> bytes:
        """Return the answer: number, protocol, length, unit, function and what it says."""
        told = bytes([2]) + struct.pack(">H", self.count) if request[7] == READ_REGISTERS else bytes([1, self.is_on])
        if request[7] == WRITE_COIL:
            self.is_on, told = request[10] == ON, request[8:12]
        if self.cuts:
            told = bytes([0])
        return request[:4] + struct.pack(">H", 2 + len(told)) + request[6:8] + told
