"""A headless Chromium, driven through its pipe (DevTools protocol, standard library alone). For tests of the report."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time


def find() -> str | None:
    """Path of Chromium or Chrome; None if there is none (Debian: apt-get install chromium)."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """with Browser() as browser: browser.open(path); browser.run('1 + 1'); browser.requests, browser.errors."""

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self.size, self.dark = (width, height), dark
        self.number, self.events = 0, []

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        browser_in, self.out = os.pipe()
        self.back, browser_out = os.pipe()
        command = [
            find(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={self.profile.name}", "about:blank",
        ]  # fmt: skip
        # the browser reads its file descriptor 3 and writes 4
        script = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(browser_in, browser_out), stderr=subprocess.DEVNULL
        )
        os.close(browser_in), os.close(browser_out)
        self.waiting = b""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        width, height = self.size
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setScrollbarsHidden", hidden=True)
        self.send("Performance.enable", timeDomain="threadTicks")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.back)
        self.profile.cleanup()

    session = None

    def message(self) -> dict:
        while b"\0" not in self.waiting:
            piece = os.read(self.back, 1 << 20)
            if not piece:
                raise RuntimeError(f"the browser ended with {self.process.wait()}")
            self.waiting += piece
        text, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(text)

    def send(self, method: str, **params) -> dict:
        """Call a method of the protocol and return its result; events on the way are kept."""
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        call |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(call).encode() + b"\0")
        while True:
            reply = self.message()
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def open(self, path) -> float:
        """Load a file; the seconds until its load event."""
        started = time.monotonic()
        self.send("Page.navigate", url=f"file://{path}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        return time.monotonic() - started

    def cpu(self) -> float:
        """Seconds of processor time that the page's main thread has used since `open` began."""
        metrics = {one["name"]: one["value"] for one in self.send("Performance.getMetrics")["metrics"]}
        return metrics["TaskDuration"]

    def run(self, script: str):
        """The value of a JavaScript expression."""
        reply = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"]["exception"].get("description"))
        return reply["result"].get("value")

    @property
    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    @property
    def errors(self) -> list[str]:
        """Messages of the console and the log, of any kind, and uncaught exceptions."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def picture(self, file, whole: bool = True) -> None:
        """A PNG of the whole page, or of what the window shows."""
        reply = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(file, "wb") as target:
            target.write(base64.b64decode(reply["data"]))

    def print(self, file) -> None:
        """A PDF, as a printer would get it."""
        with open(file, "wb") as target:
            target.write(base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"]))
