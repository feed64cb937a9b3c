"""Takes the pictures of the terminal and of the report page in docs/, of `run_default.json`.

The page is shown by Chromium, on Debian `apt-get install chromium`; without it that picture stays
as it is.

Usage: python scripts/make_screenshots.py [--out FOLDER]
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console

from keras_dwd.evaluation.report import table
from keras_dwd.page import write_report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "run_default.json"


def terminal(path):
    """What `keras-dwd run` prints at its end, as SVG."""
    results = json.loads(RESULTS.read_text())
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    console.print("$ keras-dwd run", highlight=False)
    console.print(table(results))
    console.print(results["protocol"]["text"], style="dim", highlight=False, markup=False)
    drawn = console.export_svg(title="keras-dwd run", unique_id="terminal")
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # which would be fetched
    path.write_text(re.sub(r"[ \t]+$", "", drawn, flags=re.MULTILINE) + "\n")


def page(path, size):
    """The top of the report page in a window of this size; nothing without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print(f"{path.name} stays as it is: Chromium is not installed (apt-get install chromium).")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_report(Path(folder) / "report.html", RESULTS)
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={folder}/profile", f"--window-size={size}"),
            *(f"--screenshot={path.resolve()}", f"file://{folder}/report.html"),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


def main():
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    terminal(options.out / "terminal.svg")
    page(options.out / "report.png", "1000,1250")
    page(options.out / "report_phone.png", "420,900")


if __name__ == "__main__":
    main()
