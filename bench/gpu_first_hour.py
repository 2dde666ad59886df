"""Runs the parts of ``bench/gpu_first_hour.sh``, which documents them: commands with time limits, logs and a summary.

It needs nothing but the standard library, so that it can report whatever is broken in the rest.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import NamedTuple, TextIO

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-m")
PYTEST = (*PYTHON, "pytest", "-p", "no:cacheprovider")
OPERATORS = (*PYTHON, "bench.operators_on_gpu")
TRAIN = ("patchkernels", "train", "--data.cache-dir", "{folder}/cache", "--out")
CUDA_COMMANDS = "/usr/local/cuda/bin"  # where the CUDA toolkit is installed by default, often not on PATH
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
MINUTES = 60.0  # of all parts together
PATIENCE = 20.0  # seconds that a command has to end after SIGINT, before it is killed
MORE_TO_DO = 75  # exit code of an experiment that ran out of time and can be continued
PACKED = (".csv", ".json", ".jsonl", ".log", ".md", ".png")  # endings of the files that are sent back
STATE = "parts.json"  # the file that holds the outcomes for later calls
CORPUS_MEGABYTES = 60
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
FAILURE = re.compile(r"^(E  |FAILED|ERROR |=+ (Invalid|Error|Program hit|Uninit|Barrier)|[\w.]*(Error|Exception)\b).*")


class Command(NamedTuple):
    """A command of a part. ``{folder}`` in its words stands for the folder of the results."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    output: str | None = None  # the file that the output goes to, instead of the log


class Part(NamedTuple):
    """Commands that share a log and a time limit. They run one after another, also after a failed one."""

    minutes: float  # of an hour
    commands: tuple[Command, ...]
    unavailable: str | None = None  # why the part cannot run on this machine
    continues: bool = False  # whether a later call goes on with the files of an earlier one


def all_parts(gpus: int) -> dict[str, Part]:
    """All parts in order, by name. What matters most comes first; the experiment takes the time that is left."""
    tests = (*PYTEST, "-p", "no:benchmark", "-p", "bench.gpu_use", "--durations=20", "tests/kernels", "tests/ops",
             "tests/model", "tests/test_nn.py", "tests/test_fsdp2.py")  # fmt: skip
    benchmarks = (*PYTEST, "bench", "--benchmark-only", "--benchmark-json={folder}/benchmarks.json")
    report = Command((*PYTHON, "bench.report", "{folder}/benchmarks.json"), output="{folder}/benchmarks.md")
    processes = (*PYTHON, "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m", *TRAIN)
    corpus = os.environ.get("CORPUS") and str(Path(os.environ["CORPUS"]).resolve())
    experiment = Command(
        ("bench/experiment_gpu.sh", corpus or "{folder}/corpus.parquet", "{folder}/experiment"),
        (("MINUTES", "{minutes}"), ("PYTHON", sys.executable)),
    )
    return {
        "facts": Part(2, (Command((*PYTHON, "bench.facts")),)),
        "tests": Part(14, (Command(tests),)),
        "operators": Part(4, (Command(OPERATORS),)),
        "sanitizer": sanitizer(),
        "tune": Part(5, (Command((*PYTHON, "bench.tune")),)),
        "benchmarks": Part(12, (Command(benchmarks),)),
        "report": Part(1, (report,)),
        "training": Part(3, (Command((*PYTHON, *TRAIN, "{folder}/training")),)),
        "several_gpus": Part(
            3,
            tuple(
                Command((*processes, f"{{folder}}/several_gpus/{kind}", "--parallel", kind)) for kind in ("fsdp", "ddp")
            ),
            None if gpus > 1 else f"it needs two GPUs, torch sees {gpus}",
        ),
        "corpus": Part(3, (Command(packed_corpus()),), "CORPUS is given" if corpus else None),
        "experiment": Part(MINUTES, (experiment,), continues=True),
    }


def sanitizer() -> Part:
    """The operators under each tool of compute-sanitizer.

    Not the tests: they fill all memory that is allocated, so that initcheck would find nothing. Without the caching
    allocator every tensor has an allocation of its own, beyond whose end memcheck sees each access.
    """
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{CUDA_COMMANDS}")
    commands = tuple(
        Command(
            (program or "", f"--tool={tool}", "--error-exitcode=9", *OPERATORS, "--checks", "results"),
            (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )
        for tool in SANITIZERS
    )
    return Part(8, commands, None if program else "compute-sanitizer is not installed")


def packed_corpus() -> tuple[str, ...]:
    """The command that packs text files of the installed packages: the most text that every machine has."""
    return (
        *PYTHON, "patchkernels", "corpus", "--out", "{folder}/corpus.parquet", "--path", sysconfig.get_path("purelib"),
        "--endings", ".py", ".md", ".rst", ".h", "--megabytes", str(CORPUS_MEGABYTES),
        "--origin", f"packages of Python {platform.python_version()}",
    )  # fmt: skip


class Outcome(NamedTuple):
    """What became of a part."""

    status: str  # passed, failed, unfinished, skipped or interrupted
    seconds: float = 0.0
    remark: str = ""


class Hour:
    """The folder of the results, the time that is left, and the outcome of every part so far."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.minutes = folder, minutes
        self.end = time.monotonic() + 60 * minutes
        self.state = folder / STATE
        self.commit = output_of("git", "rev-parse", "HEAD") or "unknown"
        self.outcomes: dict[str, Outcome] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.state.is_file():
            before = json.loads(self.state.read_text())
            if before["commit"] == self.commit:
                self.outcomes = {name: Outcome(*outcome) for name, outcome in before["outcomes"].items()}

    def run(self, parts: dict[str, Part], chosen: list[str]) -> bool:
        """Runs the chosen parts. Returns False if the user stopped it."""
        self.save()  # by which a later call knows the folder
        for name in chosen:
            print(f"{name} ...", flush=True)
            self.outcomes[name] = Outcome("interrupted")
            try:
                self.outcomes[name] = self.outcome_of(name, parts[name])
            except KeyboardInterrupt:
                return False
            finally:
                self.save()
            print(f"    {line_of(name, self.outcomes[name])}", flush=True)
        return True

    def outcome_of(self, name: str, part: Part) -> Outcome:
        """Runs a part."""
        start = time.monotonic()
        limit = min(60 * part.minutes * self.minutes / MINUTES, self.end - start)
        if part.unavailable:
            return Outcome("skipped", remark=part.unavailable)
        if limit <= 0:
            return Outcome("skipped", remark=f"the {self.minutes:g} minutes are over: call the script again")
        if not part.continues:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        failures, unfinished = [], False
        with open(self.folder / f"{name}.log", "w") as log:
            for place, command in enumerate(part.commands):  # which share the time that is left
                left = (start + limit - time.monotonic()) / (len(part.commands) - place)
                status = run(command, name, self.folder, left, log)
                unfinished |= status == f"exit status {MORE_TO_DO}"
                if status and status != f"exit status {MORE_TO_DO}":
                    failures.append(status)
        seconds = time.monotonic() - start
        if failures:
            first = first_failing_lines((self.folder / f"{name}.log").read_text(errors="replace"))
            return Outcome("failed", seconds, "; ".join([*dict.fromkeys(failures), *first]))
        return Outcome("unfinished" if unfinished else "passed", seconds)

    def save(self) -> None:
        """Writes the outcomes, for a later call, and the summary."""
        self.state.write_text(json.dumps({"commit": self.commit, "outcomes": self.outcomes}))
        rows = [
            f"| {name} | {o.status} | {o.seconds:.0f} | {o.remark.replace('|', '/')} |"
            for name, o in self.outcomes.items()
        ]
        table = ["| part | status | seconds | remark |", "| --- | --- | --- | --- |", *rows]
        (self.folder / "summary.md").write_text("\n".join([f"Commit {self.commit}", "", *table, ""]))

    def pack(self) -> Path:
        """Packs the files that are sent back, in which the names of the home folder and of the machine are replaced."""
        packed = self.folder.with_name(self.folder.name + ".tar.gz")
        private = {str(Path.home()).encode(): b"~", platform.node().encode(): b"HOST"}
        with tarfile.open(packed, "w:gz") as archive:
            for file in sorted(self.folder.rglob("*")):
                place = file.relative_to(self.folder)
                if (
                    not file.is_file()
                    or file.suffix not in PACKED
                    or {"cache", "checkpoints", "model"} & {*place.parts}
                ):
                    continue
                content = file.read_bytes()
                for name, replacement in private.items():
                    if file.suffix != ".png" and len(name) > 3:  # shorter ones are parts of words
                        content = content.replace(name, replacement)
                entry = tarfile.TarInfo(f"{self.folder.name}/{place.as_posix()}")
                entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
                archive.addfile(entry, io.BytesIO(content))
        return packed


def run(command: Command, part: str, folder: Path, seconds: float, log: TextIO) -> str:
    """Runs a command for at most ``seconds``, and returns what went wrong, or an empty string."""
    values = {"folder": str(folder), "minutes": f"{seconds / 60 - 1:.2f}"}
    options = shlex.split(os.environ.get(f"{part.upper()}_ARGS", ""))
    words = [*(word.format(**values) for word in command.words), *options]
    environment = OFFLINE | {name: value.format(**values) for name, value in command.environment}
    print("$", shlex.join(words), file=log, flush=True)
    with open(command.output.format(**values), "w") if command.output else contextlib.nullcontext(log) as output:
        process = subprocess.Popen(
            words, cwd=CHECKOUT, env=os.environ | environment, stdout=output, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped after {seconds:.0f} s, its limit"
        except KeyboardInterrupt:
            stop(process)
            raise
    return f"exit status {code}" if code else ""


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and its children: with SIGINT, on which pytest writes its results, then by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_failing_lines(log: str) -> list[str]:
    """The first lines of a log that tell of an error; if none does, the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return [line[:200] for line in lines if FAILURE.match(line)][:3] or lines[-1:]


def line_of(name: str, outcome: Outcome) -> str:
    return f"{outcome.status:11} {name:12} {outcome.seconds:6.0f} s  {outcome.remark}"


def output_of(*words: str) -> str:
    """What a command prints, or an empty string if it fails."""
    try:
        return subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    try:
        minutes = float(os.environ.get("MINUTES", MINUTES))
    except ValueError:
        print(f"MINUTES must be a number, got {os.environ['MINUTES']!r}", file=sys.stderr)
        return 1
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).is_file():
        print(f"{folder} holds other files: name a new folder", file=sys.stderr)
        return 1
    gpus = output_of(sys.executable, "-c", "import torch; print(torch.cuda.device_count())")
    if not gpus:
        print(f"{sys.executable} cannot import torch: set PYTHON to one that can", file=sys.stderr)
        return 1
    parts = all_parts(int(gpus))
    asked = os.environ.get("PARTS", "").split()
    if unknown := set(asked) - set(parts):
        print(f"PARTS must be some of {' '.join(parts)}, got {' '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    hour = Hour(folder, minutes)
    chosen = asked or [name for name in parts if hour.outcomes.get(name, Outcome("")).status != "passed"]
    print(f"{gpus} GPUs. At most {minutes:g} minutes for: {' '.join(chosen)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    finished = hour.run(parts, chosen)
    packed = hour.pack()
    print()
    for name, outcome in hour.outcomes.items():
        print(line_of(name, outcome), f" {folder / name}.log" if outcome.status == "failed" else "", sep="")
    print(f"To send back: {packed}")
    if not finished:
        return 130
    return int(any(outcome.status == "failed" for outcome in hour.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
