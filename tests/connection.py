"""One connection as the preloaded library sees it: `python -m tests.connection`, with the steps as JSON on stdin.

A step is ["send", hex, ...] of the client in so many pieces, each read before the next; ["send unread", hex] and a read
with no room; ["answer", hex] of the server; ["leave"] of the client; or ["read"] once more. Prints what the server
read, as hex, for each step: "" is no bytes, the end of the connection, or that it was reset; null that nothing has
come.
"""

import json
import socket
import sys


def read(end: socket.socket, room: int = 1 << 20) -> str | None:
    try:
        return end.recvmsg(room)[0].hex()
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return ""


def run(steps: list[list[str]]) -> list[str | None]:
    """What the server read at each step; None also where it did not read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server = listener.accept()[0]
        read_of = []
        for what, *pieces in steps:
            got: str | None = None
            match what:
                case "send":
                    got = ""
                    for piece in pieces:
                        client.sendall(bytes.fromhex(piece))
                        got += read(server) or ""
                case "send unread":
                    client.sendall(bytes.fromhex(pieces[0]))
                    got = read(server, room=0)
                case "answer":
                    server.sendmsg([bytes.fromhex(pieces[0])])
                case "leave":
                    client.close()
                    got = read(server)
                case "read":
                    got = read(server)
            read_of.append(got)
        client.close()
        server.close()
    return read_of


if __name__ == "__main__":
    print(json.dumps([run(steps) for steps in json.load(sys.stdin)]))
