"""``make bench-quality``: the quality that we ask of ourselves on real logs, with a peer beside it, in one run.

    python -m benchmarks.quality_table DATA [--peer SCRIPT] [--delays 0s 5m 1h 6h 1d] [--modes live]
        [--only ebnerd|mind]

DATA holds ``ebnerd-demo`` and ``mind-subset`` in their official layouts. EB-NeRD: ``millstream replay`` on both parts
at each feedback delay, and the peer (LightGBM on counters under the same delays, where its script is there). MIND:
``millstream replay`` with the unclicked items of `validation`, of which one an impression was kept, standing for ten,
and the text encoder trained on the users' histories.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from models.errors import MillstreamError
from trainer.replay_settings import duration_seconds

DELAYS: Final = ("0s", "5m", "1h", "6h", "1d")
ASKED_EBNERD: Final = {"0s": 0.795, "5m": 0.780, "1h": 0.743, "6h": 0.675, "1d": 0.640}
ASKED_MIND: Final = 0.675
MIND_UNCLICKED_WEIGHT: Final = 10
_PEER_LINE: Final = re.compile(r"delay\s+(\d+) s\s+AUC (\d\.\d+)")


def main() -> int:
    """Print the table; return 0 where every figure asked for is reached, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--peer", type=Path, help="script of the LightGBM peer; left out where there is none")
    parser.add_argument("--delays", nargs="+", default=list(DELAYS))
    parser.add_argument("--modes", default="frozen,live,retrained")
    parser.add_argument("--only", choices=("ebnerd", "mind"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="keeps encodings and the learned space of MIND for the next run")
    parser.add_argument("--plot", type=Path, help="picture of EB-NeRD, PNG")
    args = parser.parse_args()
    reached = True
    try:
        if args.only != "mind":
            reached &= _ebnerd(args)
        if args.only != "ebnerd":
            reached &= _mind(args)
    except (MillstreamError, subprocess.CalledProcessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if reached else 1


def _ebnerd(args: argparse.Namespace) -> bool:
    delays: list[str] = args.delays
    path = args.data / "ebnerd-demo"
    began = time.monotonic()
    more = ["--plot", str(args.plot)] if args.plot else []
    rows = _replay("ebnerd", path, args.modes, ["--jobs", str(args.jobs), *more], delays)
    took = time.monotonic() - began
    peer = _peer(args.peer, path, delays) if args.peer else {}
    return _print(f"EB-NeRD validation, {took:.0f} s, the peer {time.monotonic() - began - took:.0f} s", rows, peer)


def _mind(args: argparse.Namespace) -> bool:
    began = time.monotonic()
    # Worth 0.01 there: docs/quality.md, "What fine-tuning is worth".
    more = ["--unclicked-weight", str(MIND_UNCLICKED_WEIGHT), "--train-encoder"]
    more += ["--cache", str(args.cache)] if args.cache else []
    rows = _replay("mind", args.data / "mind-subset", args.modes, more, ["0s"])
    return _print(f"MIND subset validation, {time.monotonic() - began:.0f} s", rows, {}, {"0s": ASKED_MIND})


def _replay(kind: str, path: Path, modes: str, more: list[str], delays: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of ``millstream replay`` by delay."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "replay.json"
        waits = [part for delay in delays for part in ("--feedback-delay", delay)]
        parts = [str(path / "train"), str(path / "validation")]
        command = [_millstream(), "replay", kind, *parts, *waits, "--modes", modes, *more, "--json", str(file)]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        results = json.loads(file.read_text("utf-8"))["results"]
    by_seconds = {duration_seconds(delay, "--delays"): delay for delay in delays}
    found: dict[str, list[dict[str, Any]]] = {delay: [] for delay in delays}
    for row in results:
        found[by_seconds[float(row["feedback_delay_seconds"])]].append(row)
    return found


def _millstream() -> str:
    return str(Path(sys.executable).with_name("millstream"))


def _peer(script: Path, path: Path, delays: list[str]) -> dict[str, float]:
    seconds = {f"{duration_seconds(delay, '--delays'):.0f}": delay for delay in delays}
    command = [sys.executable, str(script), "--data", str(path), "--delay", *seconds]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {seconds[wait]: float(auc) for wait, auc in _PEER_LINE.findall(done.stdout)}


def _print(
    title: str,
    rows: dict[str, list[dict[str, Any]]],
    peer: dict[str, float],
    asked: dict[str, float] | None = None,
) -> bool:
    asked = ASKED_EBNERD if asked is None else asked
    table = Table(title=title)
    for name in ("delay", "mode", "AUC", "95 %", "log loss", "asked", "LightGBM peer", "reached"):
        table.add_column(name, justify="left" if name in ("delay", "mode") else "right")
    all_reached = True
    for delay, own in rows.items():
        best = max((row["auc"] for row in own), default=0.0)
        wanted = asked.get(delay)
        reached = wanted is None or best >= wanted
        all_reached &= reached
        for row in own:
            is_best = row["auc"] == best
            table.add_row(
                delay,
                row["mode"],
                f"{row['auc']:.4f}",
                f"{row['auc_low']:.4f} to {row['auc_high']:.4f}",
                f"{row['log_loss']:.4f}",
                f"{wanted:.3f}" if wanted is not None and is_best else "",
                f"{peer[delay]:.4f}" if delay in peer and is_best else "",
                ("yes" if reached else "no") if wanted is not None and is_best else "",
            )
    Console(width=110).print(table)
    return all_reached


if __name__ == "__main__":
    raise SystemExit(main())
