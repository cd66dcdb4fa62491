# SPDX-License-Identifier: Apache-2.0
"""Answers as vLLM's OpenAI-compatible server does, at once: as a handler, and as the program that stands for vLLM."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    """Knows one model, which answers each question with its words in the other order."""

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer({"data": [{"id": "tiny"}]})
        else:
            self.answer({}, 200 if self.path == "/health" else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        if question == "refuse":
            return self.answer({"message": "no chat template"}, 400)
        words = question.split()[::-1][: body["max_tokens"]]
        message = {"role": "assistant", "content": " ".join(words)}
        self.answer({"choices": [{"message": message}], "usage": {"completion_tokens": len(words)}})

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    if "AQUA_PROJECTIONS" in os.environ and "--silent" not in sys.argv:
        print("(EngineCore pid=7) INFO [checks.py:65] AQUA attention:", os.environ["AQUA_CONFIG"], flush=True)
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
