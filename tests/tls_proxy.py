"""Proxies that end TLS in front of a plain server: one in this process, and the nginx of deploy/."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_tools.measuring.services import free_ports
from clip_tools.paths import ROOT


@contextmanager
def tls_proxy(context: ssl.SSLContext, port: int) -> Iterator[int]:
    """A port on localhost that decrypts and forwards to `port`."""
    loop = asyncio.new_event_loop()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(carry(reader, behind_writer), carry(behind_reader, writer))

    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:

        async def finish() -> None:
            server.close()
            under_way = asyncio.all_tasks() - {asyncio.current_task()}
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(finish(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


@contextmanager
def nginx(
    cert: Path, key: Path, http_port: int, grpc_port: int, folder: Path, client_ca: Path | None = None
) -> Iterator[int]:
    """The port of an nginx with deploy/'s configuration, filled in as its container would."""
    (port,) = free_ports(1)
    for name, file in (("cert.pem", cert), ("key.pem", key), ("client-ca.pem", client_ca or cert)):
        shutil.copy(file, folder / name)
    values = {
        "TLS_PORT": f"127.0.0.1:{port}",
        "CERTIFICATES": folder,
        "VERIFY_CLIENT": "on" if client_ca else "off",
        "CLIENT_CA": "client-ca.pem",
        "TRITON_HTTP": f"127.0.0.1:{http_port}",
        "TRITON_GRPC": f"127.0.0.1:{grpc_port}",
    }
    template = (ROOT / "deploy" / "nginx" / "default.conf.template").read_text()
    site = re.sub(r"\$\{(\w+)}", lambda found: str(values[found[1]]), template)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}} http {{ access_log off; "
        + " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        + f"{site} }}"
    )
    user = ["-g", "user root;"] if os.getuid() == 0 else []
    process = subprocess.Popen(["nginx", "-p", folder, "-c", folder / "nginx.conf", *user])
    try:
        deadline = time.monotonic() + 20
        while True:
            assert process.poll() is None, (folder / "error.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(20)
