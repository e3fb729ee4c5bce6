"""Requests URL until standard input ends, a line of REPORT each: when, how long, the status or what went wrong.

Each request has a connection of its own, verifies the certificate and is made once.
"""

import http.client
import pathlib
import select
import ssl
import sys
import time
import urllib.parse

PAUSE_S = 0.02
TIMEOUT_S = 10


def request(url, context):
    connection = http.client.HTTPSConnection(url.hostname, timeout=TIMEOUT_S, context=context)
    try:
        connection.request("GET", url.path)
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def main():
    url, context = urllib.parse.urlsplit(sys.argv[1]), ssl.create_default_context()
    with pathlib.Path(sys.argv[2]).open("w", buffering=1) as report:
        while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
            begun = time.time()
            seen = request(url, context)
            report.write(f"{begun:.3f} {time.time() - begun:.3f} {seen}\n")


main()
