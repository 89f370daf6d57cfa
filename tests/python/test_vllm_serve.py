"""`vllm serve` with the plugin: 64 requests at once are all answered, one that is cut off in the
middle of its stream hurts no other, and the server stops cleanly.

    build/venv-vllm/bin/python tests/python/test_vllm_serve.py
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request
from pathlib import Path

import aiohttp

import awq_models
from vllm_testing import ENVIRONMENT

REQUESTS, TOKENS = 64, 24
MODE = "w4a8"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A `vllm serve` of one model; its output is in `log`."""

    def __init__(self, model, log, *options):
        self.log, self.url = log, f"http://127.0.0.1:{free_port()}"
        program = Path(sys.executable).with_name("vllm")
        command = [program, "serve", model, "--host", "127.0.0.1", "--port",
                   self.url.rpartition(":")[2], "--dtype", "float32", "--max-model-len", "512",
                   "--max-num-seqs", "64", "--enforce-eager", "--served-model-name", "test",
                   *options]
        environment = os.environ | ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0"}
        del environment["OMP_NUM_THREADS"]
        with open(log, "wb") as file:
            self.process = subprocess.Popen([str(word) for word in command], env=environment,
                                            stdout=file, stderr=subprocess.STDOUT,
                                            start_new_session=True)

    def wait_ready(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.get("/health").status == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"no server after {seconds} s:\n{self.output()[-4000:]}")

    def get(self, path):
        return urllib.request.urlopen(self.url + path, timeout=10)

    def output(self):
        return Path(self.log).read_text(errors="replace")

    def stop(self):
        """Exit status after Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None


def prompt_of(index):
    return [(7 * index + 11 * i) % 256 for i in range(4 + index % 9)]


async def complete(session, url, prompt, tokens, cut_after=None):
    """Streams one completion; its text, or None if it was cut after so many pieces."""
    body = {"model": "test", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    text, pieces, used = "", 0, None
    async with session.post(url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise AssertionError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                raise AssertionError(str(piece))
            if piece.get("usage"):
                used = piece["usage"]["completion_tokens"]
            if piece["choices"]:
                text += piece["choices"][0]["text"]
                pieces += 1
                if cut_after is not None and pieces >= cut_after:
                    response.close()  # the connection is dropped
                    return None
    if used != tokens:
        raise AssertionError(f"expected {tokens} tokens, found {used}")
    return text


async def many(url, count, victims):
    timeout = aiohttp.ClientTimeout(total=240)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        jobs = [complete(session, url, prompt_of(i), TOKENS) for i in range(count)]
        jobs += [complete(session, url, prompt_of(i), 400, cut_after=3) for i in range(victims)]
        return await asyncio.gather(*jobs)


class Serve(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        model = awq_models.make_tiny(Path(cls.directory.name) / "model")
        options = json.dumps({"nibble": {"mode": MODE}})
        cls.server = Server(model, Path(cls.directory.name) / "log", "--additional-config", options)
        cls.server.wait_ready(240)

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()
        cls.directory.cleanup()

    def test_1_says_what_runs(self):
        self.assertIn("libnibble.so) runs 4-bit linears in " + MODE, self.server.output())

    def test_2_many_at_once(self):
        alone = [asyncio.run(many(self.server.url, i + 1, 0))[i] for i in (0, 1)]
        start = time.monotonic()
        texts = asyncio.run(many(self.server.url, REQUESTS, 0))
        print(f"{REQUESTS} requests at once: {time.monotonic() - start:.2f} s", file=sys.stderr)
        self.assertEqual(alone, texts[:2])
        again = asyncio.run(many(self.server.url, REQUESTS, 1))
        self.assertIsNone(again[-1])
        self.assertEqual(texts, again[:-1])

    def test_3_chat(self):
        body = {"model": "test", "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(self.server.url + "/v1/chat/completions",
                                         json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        self.assertIn(answer["choices"][0]["finish_reason"], ("stop", "length"))
        self.assertEqual(200, self.server.get("/health").status)

    def test_4_stops(self):
        self.assertEqual(0, self.server.stop(), self.server.output()[-3000:])


if __name__ == "__main__":
    unittest.main(verbosity=2)
