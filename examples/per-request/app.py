"""A machine for each request: the router starts one, hands the request to it, answers, and the machine is gone.

Router and worker are one image. A worker serves a single request and ends; `auto_destroy` takes it away.
"""

import http.client
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

API = "http://_api.internal:4280/v1/apps/" + os.environ.get("FLY_APP_NAME", "") + "/machines"
PORT = 8080
UP_WITHIN_S = 20
TRIES = 5


class V6(ThreadingHTTPServer):
    address_family = socket.AF_INET6  # IPv4 too, and the private network


# -- the worker ----------------------------------------------------------------------------------------------------


class Work(BaseHTTPRequestHandler):
    """Whatever must not share a machine with another request: somebody's code, a browser, a big calculation."""

    def do_GET(self):
        answer(self, 200, f"{os.environ['FLY_MACHINE_ID']} did {self.path}\n")

    def log_message(self, *_):
        pass


class One(HTTPServer):
    address_family = socket.AF_INET6


def work():
    server = One(("::", PORT), Work)
    server.timeout = UP_WITHIN_S  # nobody came: end, and be gone
    server.handle_request()


# -- the router ----------------------------------------------------------------------------------------------------


class Route(BaseHTTPRequestHandler):
    def do_GET(self):
        machine = None
        try:
            machine = api("POST", "", {"config": config()})
            status, body = ask(machine["private_ip"], self.path)
            answer(self, status, body)
        except (OSError, http.client.HTTPException) as error:
            answer(self, 502, f"no machine did this: {error}\n")
            if machine:
                api("DELETE", f"/{machine['id']}?force=true")

    def log_message(self, *_):
        pass


def config():
    return {
        "image": os.environ["FLY_IMAGE_REF"],
        "init": {"cmd": ["python", "app.py", "work"]},
        "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256},
        "metadata": {"role": "worker"},
        "restart": {"policy": "no"},
        "auto_destroy": True,
    }


def ask(ip, path):
    """The worker's answer, as soon as it listens."""
    deadline = time.monotonic() + UP_WITHIN_S
    while True:
        connection = http.client.HTTPConnection(ip, PORT, timeout=UP_WITHIN_S)
        try:
            connection.connect()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def api(method, path, document=None):
    """One call; what is refused for now is tried again when the API says."""
    request = urllib.request.Request(
        API + path,
        method=method,
        data=json.dumps(document).encode() if document else None,
        headers={"Authorization": "Bearer " + os.environ["API_TOKEN"], "Content-Type": "application/json"},
    )
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 429 or not left:
                raise
            time.sleep(float(error.headers.get("Retry-After", "1")))


# ------------------------------------------------------------------------------------------------------------------


def answer(handler, status, text):
    body = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


if __name__ == "__main__":
    if "work" in sys.argv:
        work()
    else:
        V6(("::", PORT), Route).serve_forever()
