"""The pictures of docs/looking.md, their content invented: `python -m tests.look.screenshots docs/pictures`."""

import base64
import sys
import tempfile
import time
from pathlib import Path

from tests.look.helpers import Browser, find_chromium, write_evaluation, write_pairs, write_run
from trl_vlm.cli.main import main

MARK = """(() => {
  point(1);
  const row = document.querySelector('#row-1 .text.rejected'), range = document.createRange();
  range.selectNodeContents(row.querySelector('del'));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  row.querySelector('.annotation button').click();
  getSelection().removeAllRanges();
  const box = row.querySelector('textarea');
  box.value = document.querySelector('#row-1 .text.chosen .reply').textContent;
  box.dispatchEvent(new Event('input'));
  scrollTo(0, document.querySelector('#row-1').offsetTop - 120);
})()"""
VIEWS = {"pairs": "#pairs", "run": "#run", "models": "#models-mmhal-plain-judge", "annotate": "#pairs?q=source=bdhs"}


def take(folder: Path) -> None:
    """Writes one picture per view, 1400 pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        world = Path(place)
        given = [write_pairs(world, 120), write_run(world / "with facts"), write_run(world / "without facts", 1)]
        given.append(write_evaluation(world / "evaluation"))
        page, title = world / "look.html", "Invented rows, to show the page"
        options = ["--images", str(world / "pictures"), "--output", str(page), "--annotate", "--title", title]
        if main(["look", *map(str, given), *options]):
            sys.exit(1)
        browser = Browser(find_chromium() or "chromium", world)
        for name, address in VIEWS.items():
            tab = browser.open(page, address)
            tab.run(MARK if name == "annotate" else "state.annotating && KEYS.a()")
            time.sleep(0.3)
            (folder / f"look-{name}.png").write_bytes(base64.b64decode(tab.screenshot()))
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
