"""A browser without a window, spoken to over a pipe in the protocol of its developers' tools."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
OPTIONS += ["--disable-extensions", "--force-color-profile=srgb", "--remote-debugging-pipe"]


class Browser:
    """One page of a Chromium; a context that ends it."""

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        words = [PATH, *OPTIONS, f"--user-data-dir={self.profile.name}", "about:blank"]

        def hand_over():  # it reads 3 and writes 4
            reads, writes = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out))
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.child = subprocess.Popen(words, preexec_fn=hand_over, pass_fds=(3, 4), **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self.reads, self.writes, self.number, self.session = open(ours_in, "rb"), ours_out, 0, {}
        self.rest, self.events = b"", []
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        }
        self.ask("Page.enable")
        self.ask("Network.enable")
        return self

    def __exit__(self, *_error):
        self.child.kill()
        self.child.wait()
        self.reads.close()
        os.close(self.writes)
        self.profile.cleanup()

    def ask(self, method, **parameters):
        """The answer to one call; events that come before it are kept."""
        self.number += 1
        call = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.writes, json.dumps(call).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self):
        while b"\0" not in self.rest:
            part = os.read(self.reads.fileno(), 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def show(self, path, width, height, dark=False):
        """Loads a file in a window of this size; below 600 pixels as a phone does."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def run(self, script):
        """The value of a JavaScript expression."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def drag(self, start, end):
        """With the mouse from one point to another, where its button stays down."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end)):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def move(self, x, y):
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
