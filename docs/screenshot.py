"""Takes a screenshot of TensorBoard: `python docs/screenshot.py runs docs/images/tensorboard.png`; needs chromium on the PATH.

The picture in the README shows two runs of examples/mnist.py, with --lr 0.005 and with --lr 0.02.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def started(logdir, log):
    """Runs TensorBoard for a folder of runs on a free local port; yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text()):
            return server, found[0]
        time.sleep(0.2)
    server.terminate()
    sys.exit(f"TensorBoard didn't start:\n{log.read_text()}")


def take_screenshot(address, picture, size):
    """Saves the page as rendered by a browser, after it has finished loading."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("chromium isn't on the PATH")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += ["--disable-3d-apis"]  # otherwise the screenshot has no curves
        options += [f"--window-size={size}", "--force-device-scale-factor=1.5", "--virtual-time-budget=30000"]
        command = [browser, *options, f"--screenshot={picture.resolve()}", address]
        subprocess.run(command, check=True, timeout=180, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", help="the folder of the runs")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--page", default="custom_scalars", help="timeseries, scalars, custom_scalars, images, text, hparams")
    parser.add_argument("--size", default="1080,740", help="width,height of the window")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, address = started(args.logdir, Path(folder) / "log.txt")
        try:
            time.sleep(5)  # TensorBoard loads the runs in the background
            take_screenshot(f"{address}#{args.page}", args.picture, args.size)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
