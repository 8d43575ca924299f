"""The study behind docs/results.md: computes the cells that have no record, and writes the page from the records.

    python benchmarks/study [--subset quick] [--page] [--only NAME] [--dry-run]

Needs C4, Alpaca and WikiText-2, and the tasks (hub or cache). Records are committed; runs are deleted once they are
recorded, except the pruned checkpoints, which several cells share. Everything can be stopped and continued at any time.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import cells
import page
import record
from runner import Study

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the running stage, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=["quick"], help="a few small cells, with a page of their own in --work")
    parser.add_argument("--page", action="store_true", help="only write the page, from the records that exist")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/study", help="directory of the runs (%(default)s)")
    parser.add_argument("--only", default="", help="only the cells whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="print what remains, and stop")
    arguments = parser.parse_args()
    scale, records, target = cells.FULL, HERE / "records", ROOT / "docs/results.md"
    if arguments.subset == "quick":
        scale, records = cells.QUICK, arguments.work / "quick/records"
        target = arguments.work / "quick/results.md"
    known = cells.current(scale, record.load(records))
    if not any(arguments.only in cell.name for cell in cells.all_cells(scale, known)):
        parser.error(f"--only {arguments.only}: no cell has this in its name, or its learning rate is not known yet")
    if not arguments.page:
        study = Study(scale, records, arguments.work.resolve(), arguments.only)
        print(study.remaining(), flush=True)
        if arguments.dry_run:
            return
        study.compute()
    page.write(scale, record.load(records), target)
    print(target)


if __name__ == "__main__":
    main()
