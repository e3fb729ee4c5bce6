import os

from flask import Flask

app = Flask(__name__)


@app.route("/")
def hello():
    return "Flask on Fly.io!"


@app.route("/greeting")
def greeting():
    return os.environ.get("GREETING", "no greeting is set")


@app.route("/region")
def region():
    return os.environ.get("FLY_REGION", "nowhere")
