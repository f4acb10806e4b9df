"""A run's pages in `mlflow ui`, seen with a real browser: metrics, charts, figures, and a video that plays.

    apt-get install chromium chromium-driver && pip install selenium    # beside requirements.txt
    python tests/mlflow_page.py --screenshots pages/

Trains for a moment in a temporary folder, opens `mlflow ui` there as a user would, and fails if a page lacks a thing.
Not collected by pytest: it needs a browser.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from runs import CONFIG, TINY, command, only_run

TIMEOUT = 180  # seconds until a page must show what it shall; minutes where cores are few and busy
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1500,1100")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pages:
    def __init__(self, browser, address, screenshots):
        self.browser, self.address, self.screenshots = browser, address, screenshots
        self.wait = WebDriverWait(browser, TIMEOUT)

    def open(self, page, shows, what):
        """Open a page, wait until `shows(browser)` is true, keep a picture of it."""
        self.browser.switch_to.new_window("tab")  # in the same one the page would only be changed, not opened
        self.browser.get(f"{self.address}/#/{page}")
        try:
            value = self.wait.until(shows)
        finally:
            time.sleep(2)  # until what fades in has faded in
            self.browser.save_screenshot(str(self.screenshots / f"{what.replace(' ', '-')}.png"))
        print(f"{what}: {value}", flush=True)
        return value


def has_texts(*texts):
    return lambda browser: all(text in browser.find_element(By.TAG_NAME, "body").text for text in texts) and texts


def has_charts(least):
    def charts(browser):
        drawn = browser.execute_script("return document.querySelectorAll('.js-plotly-plot .scatterlayer path').length")
        return drawn >= least and f"{drawn} curves"
    return charts


def shows_picture(browser):
    size = browser.execute_script("""
        const sizes = [...document.querySelectorAll('img')].map(i => [i.naturalWidth, i.naturalHeight]);
        return sizes.find(([width, height]) => width === 1300 && height === 650);""")
    return size and f"{size[0]}x{size[1]}"


def plays_video(browser):
    duration, at, error = browser.execute_script("""
        const video = document.querySelector('video');
        if (!video) return [0, 0, null];
        video.muted = true;
        if (video.paused && !video.ended) video.play();
        return [video.duration || 0, video.currentTime, video.error && video.error.message];""")
    assert not error, error
    return duration > 0 and at > 0 and f"at {at:.2f} of {duration:.2f} s"


def visit(browser, address, run_id, experiment, video, screenshots):
    pages = Pages(browser, address, screenshots)
    here = f"experiments/{experiment}/runs/{run_id}"
    pages.open(f"experiments/{experiment}/runs", has_texts("watched", "Training runs"), "experiment")
    pages.open(here, has_texts("rollout/return_mean", "update/approx_kl", "ppo.gamma", "watched", "Finished"), "run")
    pages.open(f"{here}/model-metrics", has_charts(4), "metrics")
    pages.open(f"{here}/system-metrics", has_charts(1), "system metrics")
    pages.open(f"{here}/artifacts/curves.png", shows_picture, "figure")
    pages.open(f"{here}/artifacts/videos/{video}", plays_video, "video")
    pages.wait.until(lambda _: browser.execute_script("return document.querySelector('video').ended"))
    print("it plays to its end")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path, default=Path("pages"), help="folder for pictures of the pages")
    args = parser.parse_args()
    screenshots = args.screenshots.resolve()
    screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run(command("--config", CONFIG, "run.name=watched", *TINY), cwd=folder, check=True)
        _, found = only_run(folder)
        videos = sorted(path.name for path in (folder / "runs/watched/videos").iterdir())
        port = free_port()
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--port", str(port)], cwd=folder, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        options.page_load_strategy = "none"  # what a page shall show is waited for
        for flag in (*FLAGS, f"--user-data-dir={folder / 'browser'}"):
            options.add_argument(flag)
        try:
            deadline = time.monotonic() + TIMEOUT
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline, "mlflow ui did not start"
                time.sleep(0.5)
            browser = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
            try:
                visit(browser, f"http://127.0.0.1:{port}", found.info.run_id, found.info.experiment_id, videos[-1],
                     screenshots)
            finally:
                browser.quit()
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    main()
