"""Answers what a tenant can see of the place it runs in."""

import http.server
import os
import pathlib
import socket
import time
import urllib.parse

SICK_FOR_S = 15.0


def reach(host, port):
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return f"closed: {error.strerror}"
    return "open"


def resolve(name):
    try:
        found = socket.getaddrinfo(name, 8080, socket.AF_INET6, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"none: {error.strerror}"
    return " ".join(str(info[4][0]) for info in found)


class Handler(http.server.BaseHTTPRequestHandler):
    sick_until = 0.0

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        if url.path == "/proc":
            text = pathlib.Path("/proc/self", query["name"]).read_text()
        elif url.path == "/env":
            text = os.environ.get(query["name"], "")
        elif url.path == "/resolve":
            text = resolve(query["name"])
        elif url.path == "/sick":
            Handler.sick_until = time.monotonic() + SICK_FOR_S
            text = "not well for a while"
        elif url.path == "/exit":
            text = "gone in a moment"
        elif url.path == "/reach":
            text = reach(query["host"], query["port"])
        else:
            text = "Hello from a machine"
        body = text.encode()
        self.send_response(503 if time.monotonic() < Handler.sick_until else 200)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if url.path == "/exit":
            self.wfile.flush()
            os._exit(1)

    def log_request(self, code="-", size="-"):
        """Not logged: what is asked for here is not to be found elsewhere."""


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6  # and IPv4: the private network comes by the one, the edge by the other


Server(("::", 8080), Handler).serve_forever()
