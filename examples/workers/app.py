"""A web process that hands work to others: Flask and Celery from one image, Redis as a second app of the org."""

import os

from celery import Celery
from flask import Flask

broker = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
jobs = Celery("app", broker=broker, backend=broker)
app = Flask(__name__)


@jobs.task
def square(number):
    return number * number


@app.get("/squares/<int:count>")
def squares(count):
    """Done by workers, wherever they run."""
    waiting = [square.delay(number) for number in range(count)]
    return {"done": sum(task.get(timeout=60) == number * number for number, task in enumerate(waiting))}
