"""Jobs as machines: each runs in one of its own, which is destroyed when it ends; exit codes are collected by `wait`.

    python jobs.py --app NAME --image busybox:1.35 --jobs 1000 --at-once 8 -- sh -c 'exit $((JOB % 2))'

Needs a token in FLY_API_TOKEN and the API's address in FLY_FLAPS_BASE_URL. A job sees its number in JOB. Prints one
JSON document: how many jobs ended with which exit code, jobs a second, and for how long they waited in the queue (from
the moment they were given to it until their program ran) and for their machine alone.
"""

import argparse
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

ENDS_WITHIN_S = 600
TRIES = 8


class Api:
    def __init__(self, app):
        self._base = os.environ["FLY_FLAPS_BASE_URL"] + f"/v1/apps/{app}/machines"
        self._headers = {"Authorization": "Bearer " + os.environ["FLY_API_TOKEN"], "Content-Type": "application/json"}

    def call(self, method, path="", document=None):
        """What is refused for now (429, or a host without room) is tried again, when the API says so."""
        data = json.dumps(document).encode() if document else None
        request = urllib.request.Request(self._base + path, method=method, data=data, headers=self._headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=90) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                full = error.code == 422 and b"insufficient_capacity" in error.read()
                if attempt == TRIES - 1 or not (full or error.code == 429):
                    raise
                time.sleep(float(error.headers.get("Retry-After") or 0.25 * 2**attempt))


class Done:
    def __init__(self, exit_code, waited_s, came_up_s):
        self.exit_code, self.waited_s, self.came_up_s = exit_code, waited_s, came_up_s


def run(api, config, number, given_at):
    """One job to its end."""
    env = {**config["env"], "JOB": str(number)}
    taken_at = time.time()
    machine = api.call("POST", document={"config": {**config, "env": env}})
    deadline = time.monotonic() + ENDS_WITHIN_S
    while True:
        try:
            api.call("GET", f"/{machine['id']}/wait?state=destroyed&timeout=60")
            break
        except urllib.error.HTTPError as error:
            if error.code != 408 or time.monotonic() > deadline:
                raise
    events = api.call("GET", f"/{machine['id']}")["events"]  # what is destroyed stays readable for a day
    ran_at = next(one["timestamp"] for one in events if (one["type"], one["status"]) == ("start", "started")) / 1000
    ended = next(one["request"]["exit_event"] for one in events if one["type"] == "exit")
    return Done(ended["exit_code"], ran_at - given_at, ran_at - taken_at)


def work(api, config, jobs, done, failed):
    while True:
        try:
            number, given_at = jobs.get_nowait()
        except queue.Empty:
            return
        try:
            done.append(run(api, config, number, given_at))
        except (OSError, StopIteration) as error:
            failed.append(f"job {number}: {error!r}")


def percentile(values, share):
    ordered = sorted(values)
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000) if ordered else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--app", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    config = {
        "image": options.image,
        "init": {"exec": options.command},
        "env": {},
        "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256},
        "restart": {"policy": "no"},
        "auto_destroy": True,
    }
    jobs, done, failed = queue.Queue(), [], []
    begun = time.time()
    for number in range(options.jobs):
        jobs.put((number, begun))
    workers = [
        threading.Thread(target=work, args=(Api(options.app), config, jobs, done, failed))
        for _ in range(options.at_once)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.time() - begun
    waited, came_up = [one.waited_s for one in done], [one.came_up_s for one in done]
    print(
        json.dumps(
            {
                "jobs": options.jobs,
                "exit_codes": {str(code): n for code, n in sorted(Counter(one.exit_code for one in done).items())},
                "failed": failed,
                "took_s": round(took, 2),
                "jobs_per_s": round(len(done) / took, 2),
                "queue_delay_ms": {"p50": percentile(waited, 0.5), "p99": percentile(waited, 0.99)},
                "machine_ms": {"p50": percentile(came_up, 0.5), "p99": percentile(came_up, 0.99)},
            },
            indent=2,
        )
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
