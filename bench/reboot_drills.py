"""Whether a job survives the death of everything at once, as in a reboot, bit for bit.

A deployment runs in a process of its own. At random moments all its processes are killed with SIGKILL at the same time:
controller, gateway, which is in the middle of writing results, scheduler and workers. Then it is started again from the
same folder of jobs, until the job has ended. Its files must be those of an undisturbed run. What a reboot also loses,
the page cache, is not lost here: that is left to the fsync of SQLite and of uploads.

    python -m bench.reboot_drills --reboots 20 --save

The exit status is 1 if a byte differs or a process is left.
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.crowd import Born, left
from bench.job_drills import Tally, make_lines, results_of, run_job, settings_for, submit
from bench.report import add_report_options, publish, table
from cluster.local import LocalDeployment

_POLL_S = 0.05


def hold(jobs: Path, args: argparse.Namespace) -> None:
    """Serves until killed, or until the job has ended."""
    with LocalDeployment(settings_for(jobs, args), gateway=True):
        while num_done(jobs)[1] is None:
            time.sleep(_POLL_S)


def num_done(jobs: Path) -> tuple[int, int | None]:
    """Items that are recorded, and when the job ended."""
    database = sqlite3.connect(f"file:{jobs / 'jobs.sqlite'}?mode=ro", uri=True, timeout=60)
    try:
        done, ended_at = database.execute("SELECT completed + failed, ended_at FROM jobs").fetchone()
        return done, ended_at
    finally:
        database.close()


def descendants(pid: int) -> list[int]:
    """With the process itself."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def drill(jobs: Path, args: argparse.Namespace) -> tuple[list[int], set[Born]]:
    """Items that were recorded at each reboot, and all processes that there were."""
    rng = random.Random(args.seed)
    moments = sorted(rng.uniform(0.0, 0.97) * args.items for _ in range(args.reboots))
    done_at: list[int] = []
    born: set[Born] = set()
    while num_done(jobs)[1] is None:
        command = [sys.executable, "-m", "bench.reboot_drills", *sys.argv[1:], "--hold", str(jobs)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None:
                done, _ = num_done(jobs)
                if moments and done >= moments[0] and (not done_at or done > done_at[-1]):
                    time.sleep(rng.uniform(0.0, 0.3))
                    victims = descendants(child.pid)
                    born |= {Born.with_pid(pid) for pid in victims}
                    for pid in victims:
                        with contextlib.suppress(ProcessLookupError):  # it ended with its parent
                            os.kill(pid, signal.SIGKILL)
                    moments.pop(0)
                    done_at.append(done)
                    print(f"killed {len(victims)} processes after {done} items", file=sys.stderr)
                    break
                time.sleep(_POLL_S)
    return done_at, born


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reboots", type=int, default=20, help="in one job (default: 20)")
    parser.add_argument("--items", type=int, default=200, help="of the job (default: 200)")
    parser.add_argument("--tokens", type=int, default=48, help="of each sample (default: 48)")
    parser.add_argument("--tp", type=int, default=1, help="ranks of the target (default: 1)")
    parser.add_argument("--draft", action="store_true", help="with a draft model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    add_report_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.hold is not None:
        hold(args.hold, args)
        return 0
    with tempfile.TemporaryDirectory(prefix="reboot-drills-") as parent:
        calm, disturbed = Path(parent) / "calm", Path(parent) / "disturbed"
        job_id = submit(calm, make_lines(args.items, args.tokens))
        shutil.copytree(calm, disturbed)
        run_job(calm, job_id, 0, Tally(), args)
        done_at, born = drill(disturbed, args)
        (state, expected), (state_after, got) = results_of(calm, job_id), results_of(disturbed, job_id)
    is_equal, remains = expected == got and state == state_after, left(born)
    rows = [["undisturbed", state, str(len(expected[0])), str(len(expected[1]))]]
    rows.append([f"{len(done_at)} reboots", state_after, str(len(got[0])), str(len(got[1]))])
    lines = [
        table(["", "job", "output bytes", "error bytes"], rows),
        "",
        f"The files are {'equal' if is_equal else 'NOT equal'}; {len(remains)} of {len(born)} processes left.",
        f"Items that were recorded at each reboot: {', '.join(map(str, done_at))}.",
    ]
    command = shlex.join(["python", "-m", "bench.reboot_drills", *sys.argv[1:]])
    publish("reboot-drills", "\n".join(lines), command=command, save=args.save)
    return int(bool(remains) or not is_equal)


if __name__ == "__main__":
    sys.exit(main())
