"""A run's pages in `mlflow ui`, seen with a real browser: scores, models, the registry, charts, landings, a video.

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

sys.path.insert(0, str(Path(__file__).parent.parent))

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from machinery.mlflow_model import scored_models
from runs import CONFIG, TINY, command, only_run

TIMEOUT = 180  # seconds until a page must show what it shall; minutes where cores are few and busy
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=2000,1300")


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
        return self.see(shows, what)

    def see(self, shows, what):
        try:
            value = self.wait.until(shows)
        finally:
            time.sleep(2)  # until what fades in has faded in
            self.browser.save_screenshot(str(self.screenshots / f"{what.replace(' ', '-')}.png"))
        print(f"{what}: {value}", flush=True)
        return value


def click(browser, kind, selector, last=False):
    """Click what may still be on its way, and may be drawn again meanwhile."""
    found = browser.find_elements(kind, selector)
    try:
        found[-1 if last else 0].click()
    except (IndexError, WebDriverException):
        return False
    return True


def has_texts(*texts):
    return lambda browser: all(text in browser.find_element(By.TAG_NAME, "body").text for text in texts) and texts


def has_charts(least):
    def charts(browser):
        drawn = browser.execute_script("return document.querySelectorAll('.js-plotly-plot .scatterlayer path').length")
        return drawn >= least and f"{drawn} curves"
    return charts


def has_bars(least):
    """A chart of eval/return_mean with so many bars."""
    def bars(browser):
        drawn = browser.execute_script("return document.querySelectorAll('.js-plotly-plot .bars path').length")
        return drawn >= least and has_texts("eval/return_mean")(browser) and f"{drawn} bars"
    return bars


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


def lists(scores):
    """The table of models shows these scores, {name: eval/return_mean}."""
    def listed(browser):
        shown = browser.execute_script("""
            const header = [...document.querySelectorAll('.ag-header-cell')].find(
                cell => cell.textContent.trim() === 'eval/return_mean');
            if (!header) return {};
            const column = id => Object.fromEntries([...document.querySelectorAll('.ag-cell')].filter(
                cell => cell.getAttribute('col-id').replaceAll('&quot;', '"') === id).map(
                cell => [cell.closest('.ag-row').getAttribute('row-index'), cell]));
            const names = column('name'), values = column(header.getAttribute('col-id'));
            return Object.fromEntries(Object.keys(names).filter(row => values[row]).map(
                row => [names[row].querySelector('a').textContent.trim(), parseFloat(values[row].textContent)]));""")
        return {name: round(value, 3) for name, value in shown.items()} == {
            name: round(value, 3) for name, value in scores.items()} and shown
    return listed


def scrolled(browser):
    """Every part of the page is scrolled to its end, where the landings are."""
    browser.execute_script("""
        for (const part of document.querySelectorAll('*'))
            if (part.scrollHeight > part.clientHeight + 20 && getComputedStyle(part).overflowY !== 'visible')
                part.scrollTop = 1e6;""")
    return True


def shows_landing(frames):
    """The picture of the landing after so many frames."""
    def shown(browser):
        scrolled(browser)
        return browser.execute_script("""
            return [...document.querySelectorAll('img')].filter(
                i => i.naturalWidth > 200 && decodeURIComponent(i.src).includes(`+step+${arguments[0]}+`)).map(
                i => (i.scrollIntoView({block: 'center'}), `${i.naturalWidth}x${i.naturalHeight}`))[0];""", frames)
    return shown


def visit(browser, address, run_id, experiment, models, video, screenshots):
    pages = Pages(browser, address, screenshots)
    here = f"experiments/{experiment}/runs/{run_id}"
    scores = {model.name: metric.value for model in models for metric in model.metrics
              if metric.key == "eval/return_mean"}
    (best,) = (model for model in models if any(metric.key == "final/greedy_return_mean" for metric in model.metrics))
    final = next(metric.value for metric in best.metrics if metric.key == "final/greedy_return_mean")
    # A browser that has never been there shows the pages for language models, until it is told once.
    pages.open("", has_texts("Model training", "lunar-lander"), "home")
    pages.wait.until(lambda _: click(browser, By.XPATH, "//*[text()='Model training']"))
    pages.wait.until(lambda _: click(browser, By.LINK_TEXT, "lunar-lander"))
    pages.see(has_texts("watched", "Run Name", "Model registry"), "runs")
    pages.wait.until(lambda _: click(browser, By.XPATH, "//button[contains(., 'Sort: Created')]"))
    pages.wait.until(lambda _: click(browser, By.CSS_SELECTOR, "[data-testid='sort-select-final/greedy_return_mean']"))
    pages.see(has_texts("final/greedy_return_mean", f"{final:.2f}"), "runs with scores")
    pages.open(f"experiments/{experiment}/models", has_texts(best.name, "Registered models"), "models")
    assistant = "button[aria-label='Close']"  # beside the table, whose last columns have no room then
    pages.wait.until(lambda _: "eval/return_mean" in browser.find_element(By.TAG_NAME, "body").text
                     or (click(browser, By.CSS_SELECTOR, assistant) and False))
    pages.see(lists(scores), "models with scores")
    pages.open(f"experiments/{experiment}/models?viewMode=CHART", has_bars(len(scores)), "models ranked")
    pages.open(f"experiments/{experiment}/models/{best.model_id}", has_texts(
        best.name, "final/greedy_return_mean", "final/sampled_return_mean", "unseen seeds", "model.glimpse"), "model")
    pages.open(f"experiments/{experiment}/models/{best.model_id}/artifacts", has_texts(
        "MLmodel", "policy_model.py"), "model files")
    pages.wait.until(lambda _: click(browser, By.XPATH, "//*[text()='MLmodel']"))
    pages.see(has_texts("signature", "uint8"), "model signature")
    pages.open("models/lunar-lander", has_texts("lunar-lander", "champion"), "registry")
    pages.open("models/lunar-lander/versions/1", has_texts("champion", "Schema", "Inputs (1)", best.name), "champion")
    pages.open(f"{here}/model-metrics", has_charts(4), "metrics")
    pages.wait.until(lambda _: scrolled(browser) and browser.find_elements(By.CSS_SELECTOR, "[role=slider]"))
    for _ in scores:
        browser.find_elements(By.CSS_SELECTOR, "[role=slider]")[-1].send_keys(Keys.ARROW_RIGHT)
    pages.see(shows_landing(max(int(model.params["frames"]) for model in models)), "slider of landings")
    pages.open(here, has_texts("rollout/return_mean", "update/approx_kl", "ppo.gamma", "watched", "Finished"), "run")
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
        subprocess.run(
            command("--config", CONFIG, "run.name=watched", *TINY, "evaluation.interval=1000",
                    "tracking.register=lunar-lander"), cwd=folder, check=True)
        client, found = only_run(folder)
        models = scored_models(client, found.info.run_id).values()
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
                visit(browser, f"http://127.0.0.1:{port}", found.info.run_id, found.info.experiment_id, models,
                      videos[-1], screenshots)
            finally:
                browser.quit()
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    main()
